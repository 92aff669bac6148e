"""A supervised run: TRL's SFTTrainer over the shared base, recorded in a run folder like a GRPO run's.

TRL packs, batches and steps; the model is the one that `grpo.load` gives, and vLLM is not started. Checkpoints are
transformers' own, in `checkpoints/checkpoint-N`, and continue with `--resume`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from grpo.errors import UserError
from grpo.model.vocabulary import check_tokens
from grpo.monitor.run_log import RunLog
from grpo.policy.hf_forward import show_images
from grpo.policy.keep_16bit import record_base
from grpo.policy.marked_images import MarkedImages
from grpo.policy.policy import Policy
from grpo.run.checkpoint import CONFIG, create_run_folder, replace_folder, write_atomically
from grpo.run.signals import Interrupts
from grpo.session import open_session, read_model
from grpo.sft.config import SftConfig, sft_config_toml
from grpo.sft.data import Example, SftData, load_data
from grpo.sft.evaluation import held_out_loss

if TYPE_CHECKING:
    from grpo.session import Session

STATE = "trainer_state.json"
"""What transformers writes last into a checkpoint: with it, the checkpoint is whole."""
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
FIGURES = ("loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate", "epoch")
"""What TRL logs of a step, by the names in metrics.jsonl."""


def run_sft(config: SftConfig, *, resume: bool = False, verbose: bool = False) -> dict[str, Any]:
    """Train as `config` says and return the summary. Raises UserError for what cannot be used."""
    with Interrupts() as interrupts, create_run_folder(config.checkpoint.output_dir, resume) as run:
        settings, configuration = config.for_policy(), sft_config_toml(config)
        if not resume:
            write_atomically(run.path / CONFIG, configuration.encode())
        with RunLog(
            run.path, settings, max_steps=config.train.max_steps or 0, verbose=verbose, configuration=configuration
        ) as log:
            files = read_model(settings, log.status, log.notice)
            data = load_data(config, files.tokenizer, files.stop_token_ids, files.image_tokens)
            texts = [("a training row", each.input_ids) for each in data.examples]
            texts += [("a held-out row", each.input_ids) for each in data.held_out]
            check_tokens(texts, files.tokenizer, files.source.config)
            for notice in data.notices:
                log.notice(notice)
            resumed = run.path if resume else None
            with open_session(settings, files=files, status=log.status, start_engine=False, resumed=resumed) as session:
                record_base(session.base, settings.lora, run.path)
                mark_images(session.policy, data)
                tokens = config.sft.per_device_train_batch_size * config.sft.max_length

                def evaluate() -> dict[str, float]:
                    return held_out_loss(session.policy, data.held_out, tokens)

                record = Record(log, interrupts, evaluate, config.eval.every)
                trainer = sft_trainer(session, config, data.examples, run.path, record, log.notice)
                checkpoint = newest(run.path) if resume else None
                if resume:
                    log.resume(0 if checkpoint is None else step_of(checkpoint))
                log.status("training")
                with interrupts.deferred():
                    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                interrupts.check()
                adapter = run.path / "adapter"
                replace_folder(adapter, session.policy.save_adapter)
                summary = {"adapter": str(adapter), "model": config.model.name, "sequences": len(data.examples)}
                log.finish(summary)
                return summary


def mark_images(policy: Policy, data: SftData) -> None:
    """Give the tokens of images in `data` numbers of their own, under which the graph knows them wherever they go."""
    if policy.tower is None or not data.images:
        return
    marked = MarkedImages(policy.tower, data.images)
    for examples in (data.examples, data.held_out):
        examples[:] = [replace(one, input_ids=marked.marked(one.input_ids, one.images)) for one in examples]
    show_images(policy.decoder, marked)


def newest(run: Path) -> Path | None:
    """The last whole checkpoint of the run."""
    whole = [file.parent for file in (run / "checkpoints").glob(f"checkpoint-*/{STATE}")]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def sft_trainer(
    session: Session,
    config: SftConfig,
    examples: list[Example],
    run: Path,
    record: Record,
    notice: Callable[[str], None],
) -> Any:
    """TRL's trainer on the session's model, with our labels and our checkpointing of layers."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise UserError("supervised training needs TRL, which is not installed; pip install 'trl>=1.16'") from None
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    columns = {"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]}
    session.policy.recompute_layers(checkpointing(config.train.gradient_checkpointing, session))
    arguments = SFTConfig(**trainer_arguments(config, session.base.device, run, notice))
    trainer = SFTTrainer(
        session.policy.model,
        arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=session.tokenizer,
        callbacks=[record],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def checkpointing(asked: str | bool, session: Session) -> str:
    """What layers keep. "auto" is "layer" on a GPU; on a CPU, where memory is rarely short, "none"."""
    if asked == "mlp" and not hasattr(session.policy.decoder.model.layers[0], "keep_mlp"):
        raise UserError(
            'train.gradient_checkpointing = "mlp" needs the Triton kernels, which are off here; set "layer" or "none"'
        )
    if asked == "auto":
        return "layer" if session.base.device.type == "cuda" else "none"
    return str(asked)


def trainer_arguments(
    config: SftConfig, device: torch.device, run: Path, notice: Callable[[str], None]
) -> dict[str, Any]:
    """The configuration in TRL's words."""
    train, sft = config.train, config.sft
    optim = train.optim
    if optim != "adamw" and device.type != "cuda":
        notice(f"train.optim = {optim!r} needs a GPU; adamw is used")
        optim = "adamw"
    return {
        "output_dir": str(run / "checkpoints"),
        "max_length": sft.max_length,
        "packing": sft.packing,
        "per_device_train_batch_size": sft.per_device_train_batch_size,
        "gradient_accumulation_steps": sft.gradient_accumulation_steps,
        "learning_rate": train.learning_rate,
        "max_steps": train.max_steps or -1,
        "num_train_epochs": train.num_train_epochs,
        "lr_scheduler_type": SCHEDULES[train.lr_scheduler_type],
        "warmup_steps": train.warmup_ratio,
        "optim": {"adamw": "adamw_torch"}.get(optim, optim),
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        "save_strategy": "steps",
        "save_steps": config.checkpoint.save_steps,
        "save_total_limit": config.checkpoint.save_total_limit,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        # The model's dtype decides, and its layers know what to keep.
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": device.type == "cpu",
    }


class Record(TrainerCallback):
    """Hands each step's figures to the run log, evaluates, and ends the run at a step's end after a signal."""

    def __init__(
        self, log: RunLog, interrupts: Interrupts, evaluate: Callable[[], dict[str, float]], every: int | None
    ):
        """`evaluate` is called before the first step, every `every` steps and after the last; not where it is None."""
        self.log, self.interrupts = log, interrupts
        self.evaluate, self.every = evaluate, every
        self.started = time.perf_counter()
        self.tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.max_steps = state.max_steps
        if self.every is not None and state.global_step == 0:
            self.held_out(0)
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        total = float(logs.get("num_tokens", 0.0))
        tokens, self.tokens = total - self.tokens, total
        figures = {name: logs[name] for name in FIGURES if name in logs}
        rate = tokens / seconds if seconds > 0 else None
        timing = {"tokens": tokens, "tokens_per_second": rate, "train_seconds": seconds, "step_seconds": seconds}
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else None
        self.log.step({"step": state.global_step, **figures, **timing, "peak_memory_gib": peak})
        due = self.every is not None and (state.global_step % self.every == 0 or state.global_step == state.max_steps)
        if due and self.interrupts.number is None:  # a run that is to end has seconds for its checkpoint
            self.held_out(state.global_step)
            self.started = time.perf_counter()

    def held_out(self, step: int) -> None:
        self.log.status("evaluating")
        self.log.evaluation(step, self.evaluate())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupts.number is not None:
            control.should_save = control.should_training_stop = True
