"""The Python API, for notebooks and scripts: load a model once; ask it, train it and save it as often as you like.

    policy = grpo.load("Qwen/Qwen2.5-3B-Instruct", max_seq_length=1024)
    policy.generate([{"role": "user", "content": "What is 21 + 14?"}])
    policy.close()

Loading builds the training graph, an ordinary peft model, and does not start vLLM; the first generation does. What a
setting means is `grpo.config`'s: every name of the TOML is a keyword here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grpo.config import Config, Lora, parse_config
from grpo.errors import UserError
from grpo.keywords import SECTIONS, Tables, merged, tables_of, with_lengths
from grpo.log import quiet_libraries
from grpo.target import resolve_target

if TYPE_CHECKING:
    from peft import PeftModel

    from grpo.session import Session

GENERATED_AT_ONCE = 64
"""Sequences that vLLM decodes at once unless training needs more: the KV cache has room for all at full length."""
NO_TASK = {"task": {"name": "none"}}
"""Stands where a configuration names a task, while there is none."""


def load(
    model: str | Path,
    *,
    load_in_4bit: bool | None = None,
    max_seq_length: int | None = None,
    lora: Lora | Mapping[str, Any] | None = None,
    base: str | Path | None = None,
    verbose: bool = False,
    **settings: Any,
) -> LoadedPolicy:
    """Load a base model with a LoRA adapter, ready to generate and to train.

    Args:
        model: whatever `model.name` may be: a folder, a hub id, a `.gguf` file, "package:NAME/FILE". Or the folder of
            a run or of an adapter, whose base is then loaded with the adapter's values.
        load_in_4bit: hold the base as NF4; a run's own choice, else True.
        max_seq_length: longest prompt plus completion in tokens. Default: that of training, 1,024.
        lora: the adapter's shape, as `grpo.config.Lora` or a dict of `[lora]` keys; not for an adapter or a run.
        base: where the base of the adapter or run is now, if it has moved.
        verbose: let vLLM and transformers write their logs.
        settings: further names of `[model]`, `[rollout]`, `[train]` and so on. They hold for this policy's
            generation and are the defaults of its training.

    Raises UserError for a model, an adapter or a setting that cannot be used.
    """
    return open_policy(
        model,
        load_in_4bit=load_in_4bit,
        max_seq_length=max_seq_length,
        lora=lora,
        base=base,
        verbose=verbose,
        settings=settings,
        status=print,
    )


def open_policy(
    model: str | Path,
    *,
    load_in_4bit: bool | None,
    max_seq_length: int | None,
    lora: Lora | Mapping[str, Any] | None,
    base: str | Path | None,
    verbose: bool,
    settings: Mapping[str, Any],
    status: Callable[[str], None],
) -> LoadedPolicy:
    """`load`, with the say on where it is told what is being done."""
    decline(settings)
    target = resolve_target(model, base)
    if lora is not None and target.adapter is not None:
        raise UserError(f"{model}: the adapter brings its own shape; leave lora out")
    chosen = {"load_in_4bit": load_in_4bit, "max_seq_length": max_seq_length}
    tables = merged(
        {name: target.tables[name] for name in ("model", "lora", "rollout") if name in target.tables},
        {"lora": lora.model_dump() if isinstance(lora, Lora) else dict(lora or {})},
        tables_of(settings, "grpo.load", SECTIONS, tuple(load.__kwdefaults__)),
        {"model": {key: value for key, value in chosen.items() if value is not None}},
    )
    first = merged({"rollout": {"max_num_seqs": GENERATED_AT_ONCE}}, tables, NO_TASK)
    config = parse_config(with_lengths(first), "grpo.load")
    quiet_libraries(verbose)
    from grpo.session import open_session

    session = open_session(config, adapter=target.adapter, status=status, start_engine=False)
    return LoadedPolicy(session, tables)


def decline(settings: Mapping[str, Any]) -> None:
    """Raise UserError for what other libraries' loaders do and this one cannot."""
    if settings.get("load_in_8bit"):
        raise UserError(
            "load_in_8bit is not supported: sampling and training share one copy of the base, whose kernels read NF4 "
            "or 16 bit; use load_in_4bit=True, or False for a 16-bit base"
        )
    if settings.get("full_finetuning"):
        raise UserError(
            "full_finetuning is not supported: the base is shared with vLLM and frozen, only a LoRA adapter is "
            "trained; leave it out and raise r in lora, or use TRL's trainers on a transformers model"
        )


class LoadedPolicy:
    """A model with its adapter, made by `grpo.load`. A context manager: leaving it frees the memory."""

    def __init__(self, session: Session, tables: Tables):
        self._session: Session | None = session
        self._tables = tables

    @property
    def session(self) -> Session:
        """The parts that hold the model. Raises UserError after `close`."""
        if self._session is None:
            raise UserError("this policy is closed; load it again with grpo.load")
        return self._session

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.session.config

    @property
    def model(self) -> PeftModel:
        """The training graph as a peft model. Its base is shared with vLLM and frozen."""
        return self.session.policy.model

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        return self.session.tokenizer

    def save_lora(self, folder: str | Path) -> Path:
        """Write the adapter to `folder` in peft's format and return the folder."""
        self.session.policy.save_adapter(Path(folder))
        return Path(folder)

    def load_lora(self, folder: str | Path) -> None:
        """Replace the adapter's values by those in `folder`. Raises UserError unless its shape is the same."""
        self.session.policy.load_adapter(Path(folder))

    def close(self) -> None:
        """Stop vLLM and give all memory back. May be called twice."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> LoadedPolicy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._session is None:
            return "<closed policy>"
        base, lora = self._session.base, self.config.lora
        form = "NF4" if base.load_in_4bit else str(base.dtype).removeprefix("torch.")
        return f"<{self.config.model.name} in {form} on {base.device.type}, LoRA of rank {lora.r}>"
