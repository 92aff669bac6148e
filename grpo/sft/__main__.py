"""The command line of supervised training: `python -m grpo.sft sft.toml`.

It reads the configuration and hands it to `grpo.sft.trainer`. For the exit codes see `grpo.command`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.command import command
from grpo.config.toml import write_value
from grpo.distributed.launch import refuse_several
from grpo.errors import UserError
from grpo.memory.gpus import Gpu, gpu_named
from grpo.run.checkpoint import CONFIG, check_base_of_run, moved_base
from grpo.run.signals import leaving_at_once
from grpo.sft.config import SftConfig, read_sft_config, sft_config_toml
from grpo.sft.plan import memory_lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    return command(
        "grpo.sft",
        lambda: run(parsed),
        interrupted=lambda: "interrupted; --resume continues from the last checkpoint, if one was written",
        again="continue with --resume",
    )


def run(parsed: argparse.Namespace) -> None:
    """Train, or print what a run would be. Raises UserError."""
    if parsed.card is not None and not parsed.dry_run:
        raise UserError("--card plans for a GPU that is not here; add --dry-run")
    refuse_several("grpo.sft")
    config = configuration(parsed)
    if parsed.dry_run:
        print(dry_run(config, None if parsed.card is None else gpu_named(parsed.card)))
    else:
        train(config, resume=parsed.resume is not None, verbose=parsed.verbose)


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.sft`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.sft",
        description="Train a LoRA adapter to imitate examples, as the configuration says.",
        epilog="docs/sft.md explains the configuration.",
        allow_abbrev=False,
    )
    result.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="a .toml file")
    result.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; may be repeated"
    )
    result.add_argument(
        "--dry-run", action="store_true", help="print the whole configuration, what a step is, and its memory; stop"
    )
    result.add_argument("--card", metavar="GPU", help="with --dry-run: plan for this GPU, such as 3090, T4 or A100")
    result.add_argument(
        "--resume", type=Path, metavar="RUN_FOLDER", help="continue the run in this folder from its last checkpoint"
    )
    result.add_argument("--base", metavar="MODEL", help="with --resume: where the run's base is now, if it has moved")
    result.add_argument("--output", type=Path, metavar="DIR", help="the run folder, instead of checkpoint.output_dir")
    result.add_argument("--verbose", action="store_true", help="let transformers and TRL write their logs")
    return result


def configuration(parsed: argparse.Namespace) -> SftConfig:
    """The configuration that the command line asks for. Raises UserError."""
    if parsed.resume is not None and (parsed.output is not None or parsed.config is not None):
        raise UserError("--resume takes the folder of a run, which has its own CONFIG and output; leave these out")
    file = parsed.resume / CONFIG if parsed.resume is not None else parsed.config
    if file is None:
        raise UserError("no configuration given; pass a .toml file, for example: python -m grpo.sft sft.toml")
    overrides = list(parsed.set)
    if output := parsed.resume or parsed.output:
        overrides.append(f"checkpoint.output_dir={write_value(output)}")
    if parsed.resume is not None and not file.is_file():
        raise UserError(f"{parsed.resume}: there is no run to resume here (no {CONFIG}); start it without --resume")
    if parsed.base is not None:
        overrides += moved_base(parsed.base, resume=parsed.resume is not None)
    config = read_sft_config(file, overrides)
    if parsed.resume is not None:
        saved = read_sft_config(file)
        check_resumable(saved, config)
        check_base_of_run(parsed.resume, saved.model, config.model)
    return config


def check_resumable(saved: SftConfig, new: SftConfig) -> None:
    """Raise UserError where `new` has another model, adapter, data or order than the run that `saved` describes."""
    if saved.rows_held_out != new.rows_held_out:
        raise UserError("--resume: [eval] would hold out other rows than the run did; leave it as it is")
    name_of_base = {"name": new.model.name, "revision": new.model.revision}  # may have moved
    if saved.model.name != new.model.name:
        saved = saved.model_copy(update={"model": saved.model.model_copy(update=name_of_base)})
    for name, before, now in (
        *((f"[{name}]", getattr(saved, name), getattr(new, name)) for name in ("model", "lora", "sft")),
        ("train.seed", saved.train.seed, new.train.seed),
        ("train.optim", saved.train.optim, new.train.optim),
    ):
        if before != now:
            raise UserError(f"--resume: {name} is not that of the run; leave it as it is, or start a new run")


def train(config: SftConfig, *, resume: bool, verbose: bool) -> None:
    """Train; imports torch and TRL only now."""
    from grpo.run.library_logs import quiet_libraries

    quiet_libraries(verbose)
    from grpo.sft.trainer import run_sft

    with leaving_at_once():
        run_sft(config, resume=resume, verbose=verbose)


def dry_run(config: SftConfig, gpu: Gpu | None = None) -> str:
    """The resolved configuration as TOML, and below it, as TOML comments, what a step, the run and its memory are."""
    sft, train = config.sft, config.train
    rows = sft.per_device_train_batch_size * sft.gradient_accumulation_steps
    kind = "packed rows" if sft.packing else "sequences"
    step = f"# A step: {rows} {kind} of at most {sft.max_length:,} tokens, together {rows * sft.max_length:,}"
    if sft.gradient_accumulation_steps > 1:
        step += f", in {sft.gradient_accumulation_steps} forwards and backwards"
    length = f"{train.num_train_epochs:g} x the rows" if train.max_steps is None else f"{train.max_steps:,} steps"
    memory = "\n".join(f"# {line}".rstrip() for line in memory_lines(config, gpu))
    return f"{sft_config_toml(config)}\n{step}.\n# The run: {length}.\n{memory}"


if __name__ == "__main__":
    sys.exit(main())
