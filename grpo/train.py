"""The command line of training: `python -m grpo.train configs/gsm8k.toml`.

It reads the configuration and hands it to `grpo.training.trainer`; nothing else happens here. torch and vLLM are
imported only once the configuration is known to be right, so that `--help`, `--dry-run` and a misspelt key answer at
once.

For the exit codes see `grpo.command`. An interrupted run leaves a checkpoint of its last whole step within 30 seconds;
a second signal ends it at once.

    torchrun --nproc-per-node 2 -m grpo.train configs/gsm8k.toml

trains the same run on two GPUs; a process that ends because another one did has code 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.command import BAD_INPUT, LOST, CommandEnd, command
from grpo.config.schema import Config, config_toml, read_config
from grpo.config.toml import write_value
from grpo.distributed.launch import Launch, RankLost, check_share, read_launch
from grpo.errors import UserError
from grpo.memory.gpus import Gpu, gpu_named
from grpo.memory.shapes import model_shape
from grpo.memory.summary import memory_plan
from grpo.model.checks import BEYOND_FLOAT16, beyond_float16, no_bfloat16
from grpo.rollout.attention_backend import Served, choose_backend, decodes_by_ours, served_by
from grpo.rollout.import_ahead import import_ahead
from grpo.run.checkpoint import check_run, moved_base, saved_config, step_numbers
from grpo.run.compile_ahead import begin
from grpo.run.importing import lean
from grpo.run.machine import check_machine
from grpo.run.read_ahead import read_ahead
from grpo.run.signals import leaving_at_once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    job = Job(parsed)
    return command(job.program, job.run, interrupted=job.interrupted, again="continue with --resume")


class Job:
    """What the command line asks for, in a process that may be one rank of several."""

    def __init__(self, parsed: argparse.Namespace):
        self.parsed = parsed
        self.launch = Launch()
        self.config: Config | None = None

    def run(self) -> None:
        """Train, or print what a run would be. Raises UserError, CommandEnd for a rank that ends with another one."""
        if self.parsed.card is not None and not self.parsed.dry_run:
            raise UserError("--card plans for a GPU that is not here; add --dry-run")
        self.launch = read_launch()
        try:
            config = self.config = configuration(self.parsed)
            check_share(config.rollout.prompts_per_step, self.launch.size)
            if config.model.full_finetuning and self.launch.size > 1:
                raise UserError(
                    f"model.full_finetuning: {self.launch.size} processes would exchange the gradient of every weight, "
                    "which they do not; start one, or train a LoRA adapter"
                )
        except UserError:
            # Every rank of a machine finds the same, and one says it.
            if self.launch.local_rank:
                raise CommandEnd(None, BAD_INPUT) from None
            raise
        if self.parsed.dry_run:
            if self.launch.first:
                print(dry_run(config, card(self.parsed, config)))
            return
        try:
            train(config, self.launch, resume=self.parsed.resume is not None, verbose=self.parsed.verbose)
        except RankLost as error:
            raise CommandEnd(f"{error}; what ended it is said by that rank", LOST) from None

    def program(self) -> str:
        """Who speaks."""
        return "grpo.train" if self.launch.size == 1 else f"grpo.train, rank {self.launch.rank}"

    def interrupted(self) -> str | None:
        """What the first rank says after Ctrl-C or SIGTERM: where the run can be taken up again."""
        if not self.launch.first:
            return None
        run = self.config.checkpoint.output_dir if self.config is not None else None
        steps = step_numbers(run) if run is not None else []
        if not steps:
            return "interrupted; no checkpoint was written yet"
        return f"interrupted; the last checkpoint is step {steps[-1]}, continue with --resume {run}"


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.train`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.train",
        description="Train a LoRA adapter with GRPO, as the configuration says.",
        epilog="Every key of the configuration is explained in docs/config.md.",
        allow_abbrev=False,
    )
    result.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="a .toml file")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key, such as train.learning_rate=1e-5; may be given several times",
    )
    result.add_argument(
        "--dry-run", action="store_true", help="print the whole configuration, what a step is, and its memory; stop"
    )
    result.add_argument("--card", metavar="GPU", help="with --dry-run: plan for this GPU, such as 3090, T4 or A100")
    result.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_FOLDER",
        help="continue the run in this folder (default: the configuration's) from its last checkpoint; without CONFIG, "
        "with the configuration saved there",
    )
    result.add_argument("--base", metavar="MODEL", help="with --resume: where the run's base is now, if it has moved")
    result.add_argument("--output", type=Path, metavar="DIR", help="the run folder, instead of checkpoint.output_dir")
    result.add_argument("--verbose", action="store_true", help="let vLLM and transformers write their logs")
    return result


def configuration(parsed: argparse.Namespace) -> Config:
    """The configuration that the command line asks for. Raises UserError."""
    folder = Path(parsed.resume) if parsed.resume else None
    if folder is not None and folder.is_file():
        raise UserError(f"--resume {folder}: this is a file, not a run folder; put CONFIG before --resume")
    if folder is not None and parsed.output is not None:
        raise UserError(f"--resume {folder} and --output {parsed.output}: a run goes on in its own folder; keep one")
    overrides = list(parsed.set)
    if output := folder or parsed.output:
        overrides.append(f"checkpoint.output_dir={write_value(output)}")
    if parsed.base is not None:
        overrides += moved_base(parsed.base, resume=parsed.resume is not None)
    if parsed.config is not None:
        return read_config(parsed.config, overrides)
    if folder is not None:
        return saved_config(folder, overrides)
    raise UserError(
        "no configuration given; pass a .toml file, for example: python -m grpo.train configs/quickstart.toml"
    )


def train(config: Config, rank: Launch, *, resume: bool, verbose: bool) -> None:
    """Train; imports torch and vLLM once the run folder is known to be free, or to fit."""
    from grpo.run.library_logs import quiet_libraries

    quiet_libraries(verbose)
    if rank.first and rank.restarts == 0:
        check_run(config, resume=resume)
    if rank.local_rank == 0 and config.model.device != "cpu":
        start_ahead(config, alone=rank.size == 1)
    check_machine(config.model.device)
    with lean():
        from grpo.training.run import launch

    with leaving_at_once():
        launch(config, resume=resume, verbose=verbose, rank=rank)


def start_ahead(config: Config, *, alone: bool) -> None:
    """Have others begin with what needs no torch: reading the weights' files and, at a first start, compiling the run's
    kernels and reading vLLM. Processes are started only where this one is `alone`. Whatever fails is
    left to the run, which does the same where it needs it, or refuses it."""
    try:
        read_ahead(config.model)
        if alone and begin(config, lambda architecture: own_decoding(config, architecture)):
            import_ahead()
    except Exception:
        return


def own_decoding(config: Config, architecture: int) -> bool:
    """Whether decoding steps will be by the project's kernels throughout on a GPU of that architecture."""
    return decodes_by_ours(config.rollout.attention_backend, needed(config, architecture))


def needed(config: Config, architecture: int, *, network: bool = False) -> Served:
    """What an attention backend has to serve."""
    shape = model_shape(config.model, network=network)
    cache, dtype = config.rollout.kv_cache_dtype, config.model.dtype
    return Served(architecture, cache, dtype) if shape is None else served_by(shape, architecture, cache, dtype)


def card(parsed: argparse.Namespace, config: Config) -> Gpu | None:
    """The GPU that --card names. Raises UserError for one that is not known, or does not serve `config`."""
    if parsed.card is None:
        return None
    gpu = gpu_named(parsed.card)
    shape = model_shape(config.model, network=True)
    choose_backend(config.rollout.attention_backend, needed(config, gpu.architecture, network=True))
    if gpu.architecture < 80 and config.model.dtype == "bfloat16":
        raise UserError(no_bfloat16(gpu.name))
    if shape is not None and shape.model_type in BEYOND_FLOAT16 and gpu.architecture < 80:
        reason = beyond_float16(shape.model_type)
        raise UserError(f"{config.model.name}: {reason}, and the {gpu.name} has no bfloat16; use another model")
    return gpu


def dry_run(config: Config, gpu: Gpu | None = None) -> str:
    """The resolved configuration as TOML, and below it, as TOML comments, what a step, the run and its memory are."""
    comments = "\n".join(f"# {line}".rstrip() for line in (*arithmetic(config), *memory_plan(config, gpu)))
    return f"{config_toml(config)}\n{comments}"


def arithmetic(config: Config) -> list[str]:
    """The sizes of a step and of the run in words, one sentence a line. Token counts are upper limits."""
    rollout, training = config.rollout, config.train
    completions = config.completions_per_step
    longest = rollout.max_prompt_length + rollout.max_completion_length
    updates = training.num_iterations * training.optimizer_steps_per_rollout
    prompts_each = math.ceil(rollout.prompts_per_step / training.optimizer_steps_per_rollout)
    sequences_each = prompts_each * rollout.num_generations
    fit = max(training.tokens_per_micro_batch // longest, 1)
    most = math.ceil(sequences_each / fit)
    lines = [
        f"A step: {_count(rollout.prompts_per_step, 'prompt')} x {rollout.num_generations} generations = {completions} "
        f"completions, of at most {rollout.max_completion_length} tokens each:",
        f"  at most {completions * rollout.max_completion_length:,} sampled tokens, and "
        f"{completions * longest:,} with prompts.",
        f"  {_count(updates, 'optimiser step')} ({_count(training.num_iterations, 'pass', 'passes')} over the batch, "
        f"{_count(training.optimizer_steps_per_rollout, 'update')} in each),",
        f"  each on at most {sequences_each} completions, in at most {_count(most, 'micro-batch', 'micro-batches')} of "
        f"{training.tokens_per_micro_batch:,} tokens; the longest sequence is {longest:,}.",
    ]
    if config.loss.dynamic_sampling:
        rounds = config.loss.dynamic_sampling_max_rounds
        lines.append(f"  Dynamic sampling: at most {rounds} times as many completions are sampled to fill the batch.")
    if training.max_steps is not None:
        lines.append(
            f"The run: {_count(training.max_steps, 'step')} = {training.max_steps * updates:,} optimiser steps on "
            f"{training.max_steps * completions:,} completions."
        )
    else:
        lines.append(
            f"The run: {training.num_train_epochs:g} x the training rows / {rollout.prompts_per_step} steps; "
            "train.max_steps sets a number."
        )
    return lines


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


if __name__ == "__main__":
    sys.exit(main())
