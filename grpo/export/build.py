"""Take a trained adapter elsewhere: alone, merged into its base in 16 or 4 bit, or as GGUF for llama.cpp and Ollama.

    python -m grpo.export runs/gsm8k --to merged-16bit
    python -m grpo.export runs/gsm8k --to gguf --gguf-type q8_0
    python -m grpo.export my_adapter --base models/Qwen2.5-3B-Instruct --to merged-4bit --out served

This file finds adapter and base, gives the export a folder that appears only when it is whole, and compares what was
written with base + adapter. The formats themselves are written by `hf_folder.py` and `gguf.py`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.model.locate import BASE_SAMPLE, local_path, recorded_name
from grpo.run.checkpoint import CONFIG, step_numbers
from grpo.run.model_reference import (
    ADAPTER_CONFIG,
    MODEL,
    ModelReference,
    folder_of_model,
    is_trained_whole,
    of_whole_run,
    resolve_model,
)
from grpo.run.records import TRAINING, completions_files, read_entries

if TYPE_CHECKING:
    from grpo.export.merge import MergedSource
    from grpo.export.modelfile import Chat
    from grpo.model.initial_adapter import InitialLayer
    from grpo.model.weight_source import Source
    from grpo.policy.adapter_files import AdapterFile

EXPORT_FORMATS = ("adapter", "merged-16bit", "merged-4bit", "gguf")
GGUF_TYPES = ("f16", "bf16", "q8_0", "q4_k_m")
FAITHFUL_SHARE = 0.9
"""Of an adapter's effect, below which an export says what would keep more."""
FAITHFUL_KL = 0.05
"""Nats by which a format that is not quantised to 4 bit may differ from base + adapter; rounding costs a hundredth."""


def export(
    source: str | Path,
    to: str = "merged-16bit",
    out: str | Path | None = None,
    base: str | Path | None = None,
    *,
    checkpoint: str | None = None,
    gguf_type: str = "f16",
    llama_quantize: str | Path | None = None,
    system: str | None = None,
    check: bool = True,
    notice: Callable[[str], None] = print,
) -> Path:
    """Write the adapter of `source` in the format `to` and return the folder.

    Args:
        source: a run folder (its final adapter, or that of its newest checkpoint), or the folder of a peft adapter.
        to: one of `EXPORT_FORMATS`.
        out: the folder to make. Default: `exports/FORM` in the run, or a folder beside the adapter.
        base: the base's folder, file or hub id, where it is not the recorded one: it has moved, or the recorded one
            is 4-bit and this is its 16-bit original.
        checkpoint: "step-N" or "best": another adapter of the run than its final one.
        gguf_type: one of `GGUF_TYPES`.
        llama_quantize: llama.cpp's quantiser, which q4_k_m needs; else LLAMA_QUANTIZE, the one on the PATH, cyllama's.
        system: the system prompt in a Modelfile. Default: that of the run's questions.
        check: compare the logits of what was written with those of base + adapter.
        notice: called with what is done and found, a sentence at a time.

    Raises UserError, with nothing written, for whatever cannot be exported as asked.
    """
    check_choice("to", to, EXPORT_FORMATS)
    check_choice("gguf_type", gguf_type, GGUF_TYPES)
    reference = find_adapter(Path(source).expanduser(), checkpoint, base)
    export_format = f"gguf-{gguf_type}" if to == "gguf" else to
    target = Path(out).expanduser() if out is not None else default_folder(reference, export_format, checkpoint)
    started = time.monotonic()
    with made_whole(target) as folder:
        if to == "adapter" and reference.adapter is None:
            raise UserError(f"{source}: this run trained all weights, and has no adapter; take merged-16bit or gguf")
        if to == "adapter":
            write_adapter(reference, folder, notice)
        else:
            merged = open_merged(reference, notice)
            if to == "gguf":
                from grpo.export.gguf import find_quantizer, write_gguf

                if merged.vision is not None:
                    notice("a GGUF file holds the language model; images need an mmproj file of the base beside it")
                quantizer = find_quantizer(llama_quantize) if gguf_type == "q4_k_m" else None
                write_gguf(merged, folder, gguf_type, chat_of(reference, merged, system), quantizer, notice)
            else:
                write_folder(reference, merged, folder, to, notice)
            if check:
                compare(merged, folder, export_format, notice)
        size = sum(file.stat().st_size for file in folder.iterdir())
    notice(f"wrote {target}: {size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s")
    return target


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} = {value!r} is no export format; take one of {', '.join(choices)}")


# What is exported


def find_adapter(source: Path, checkpoint: str | None, base: str | Path | None) -> ModelReference:
    """The adapter that is meant, and the tables that name its base. Raises UserError where there is none."""
    if (source / CONFIG).is_file() and is_trained_whole(source):
        model = folder_of_model(source) if checkpoint is None else model_of_checkpoint(source, checkpoint)
        return of_whole_run(source, model, base)
    if checkpoint is not None:
        source = adapter_of_checkpoint(source, checkpoint)
    if not (source / CONFIG).is_file() and not (source / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{source}: neither a run nor the folder of an adapter (no {CONFIG}, no {ADAPTER_CONFIG}); pass one of them"
        )
    return resolve_model(source, base)


def adapter_of_checkpoint(run: Path, checkpoint: str) -> Path:
    """The adapter of the run's checkpoint "step-N", or of "best". Raises UserError naming those there are."""
    folder = run / "best_adapter" if checkpoint == "best" else run / "checkpoints" / checkpoint / "adapter"
    if Path(checkpoint).name != checkpoint or not (folder / ADAPTER_CONFIG).is_file():
        there = [f"step-{step}" for step in step_numbers(run)]
        there += ["best"] if (run / "best_adapter" / ADAPTER_CONFIG).is_file() else []
        raise UserError(f"{run}: there is no checkpoint {checkpoint!r}; there are {', '.join(there) or 'none'}")
    return folder


def model_of_checkpoint(run: Path, checkpoint: str) -> Path:
    """The model of the checkpoint "step-N", or of "best", of a run that trained all weights. Raises UserError naming
    those there are."""
    folder = run / f"best_{MODEL}" if checkpoint == "best" else run / "checkpoints" / checkpoint / MODEL
    if Path(checkpoint).name != checkpoint or not (folder / "config.json").is_file():
        there = [f"step-{step}" for step in step_numbers(run)]
        there += ["best"] if (run / f"best_{MODEL}").is_dir() else []
        raise UserError(f"{run}: there is no checkpoint {checkpoint!r}; there are {', '.join(there) or 'none'}")
    return folder


def run_of(reference: ModelReference) -> Path | None:
    """The run that the adapter belongs to."""
    return Path(reference.source).parent if Path(reference.source).name == CONFIG else None


def default_folder(reference: ModelReference, export_format: str, checkpoint: str | None) -> Path:
    """Where the export goes unless it is said."""
    run, suffix = run_of(reference), f"-{checkpoint}" if checkpoint else ""
    if run is not None:
        return run / "exports" / f"{export_format}{suffix}"
    assert reference.adapter is not None
    adapter = reference.adapter.resolve()
    return adapter.with_name(f"{adapter.name}-{export_format}")


def title(reference: ModelReference) -> str:
    """What to call the model, and its file: the run's name, else the adapter's."""
    named = run_of(reference) or reference.adapter
    assert named is not None
    return re.sub(r"[^\w.-]+", "-", named.resolve().name)


def base_model(reference: ModelReference) -> Model:
    """The [model] table of the base, without what only training needs."""
    table = reference.tables["model"]
    keys = ("name", "revision", "trust_remote_code", "chat_template", "images")
    values = {key: table[key] for key in keys if table.get(key) is not None and table[key] != "none"}
    return Model.model_validate(values)


def open_merged(reference: ModelReference, notice: Callable[[str], None]) -> MergedSource:
    """The base with the adapter folded in; says which weights it is made of."""
    from grpo.export.merge import MergedSource
    from grpo.model.adapter_config import read_adapter_config
    from grpo.model.architectures import check_supported
    from grpo.model.fingerprint import UNQUANTISED, Fingerprint, check_base
    from grpo.model.inventory import account
    from grpo.model.source import open_source
    from grpo.policy.adapter_files import AdapterFile

    model = base_model(reference)
    if reference.adapter is None:
        base = open_source(model)
        for sentence in account(base):
            notice(sentence)
        notice(f"the {base.stored_as} weights of {model.name}, all of which were trained")
        return MergedSource(base, None)
    adapter = AdapterFile(read_adapter_config(reference.adapter))
    base = open_source(model)
    check_supported(base.config, str(base.path))
    for sentence in account(base):
        notice(sentence)
    source, initial = started_from(reference, base, adapter)
    merged = MergedSource(base, adapter, initial)
    check_base(reference.adapter, Fingerprint.of(source), model.name)
    if base.stored_as in UNQUANTISED:
        notice(f"merging {reference.adapter} into the {base.stored_as} weights of {model.name}")
    else:
        notice(
            f"merging {reference.adapter} into the dequantised {base.stored_as} weights of {model.name}; where you "
            "have its 16-bit original, name it with --base"
        )
    return merged


def started_from(
    reference: ModelReference, base: Source, adapter: AdapterFile
) -> tuple[Source, dict[str, InitialLayer]]:
    """(the base as the adapter was trained on it, what the adapter started from in it); mostly `base` and nothing."""
    import torch

    from grpo.config.schema import Config, Train
    from grpo.model.initial_adapter import ResidualSource
    from grpo.policy.starting_base import starting_source

    assert reference.adapter is not None
    # The sections by themselves: what holds between them and others was the run's to hold.
    config = Config.model_construct(
        model=Model.model_validate(reference.tables["model"]),
        lora=adapter.saved.lora,
        train=Train.model_validate(reference.tables.get("train", {})),
    )
    folders = [reference.adapter, *([run] if (run := run_of(reference)) is not None else [])]
    source = starting_source(base, config, folders, torch.device("cpu"))
    return source, source.read_all() if isinstance(source, ResidualSource) else {}


def chat_template(reference: ModelReference) -> str | None:
    """The template that the run replaced its model's by."""
    from grpo.model.source import read_template

    path = base_model(reference).chat_template
    return None if path is None else read_template(path)


# What is written


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends well, and vanishes when it does not."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} already exists; name another folder with --out, or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}; nothing was exported") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_adapter(reference: ModelReference, folder: Path, notice: Callable[[str], None]) -> None:
    """The adapter in peft's format, with its base named so that it is found from anywhere."""
    from grpo.export.plain_lora import write_plain_lora
    from grpo.export.whole_model import write_for_whole_model
    from grpo.model.adapter_config import ADAPTER_WEIGHTS, read_adapter_config, takes_from_base
    from grpo.model.fingerprint import Fingerprint, check_base
    from grpo.policy.adapter_files import AdapterFile

    assert reference.adapter is not None
    adapter = AdapterFile(read_adapter_config(reference.adapter))
    model = base_model(reference)
    if local_path(model.name) is not None:
        base = open_accounted(model)
        adapter.check(base.config.get_text_config())
        if not takes_from_base(adapter.saved.lora.init_lora_weights):
            check_base(reference.adapter, Fingerprint.of(base), model.name)
    config = {**adapter.saved.values, "base_model_name_or_path": recorded_name(model.name), "inference_mode": True}
    config["revision"] = model.revision
    if takes_from_base(adapter.saved.lora.init_lora_weights):
        base = open_accounted(model)
        source, initial = started_from(reference, base, adapter)
        check_base(reference.adapter, Fingerprint.of(source), model.name)
        write_plain_lora(adapter, initial, config, folder)
        Fingerprint.of(base).write(folder)
        notice(f"{reference.adapter} started from a part of its base; written as plain LoRA of twice its rank")
        return
    if model.images:
        write_for_whole_model(adapter, open_accounted(model), config, folder)
    else:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(reference.adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    if (reference.adapter / BASE_SAMPLE).is_file():
        shutil.copyfile(reference.adapter / BASE_SAMPLE, folder / BASE_SAMPLE)
    notice(f"{len(adapter.names) // 2} layers of {reference.adapter}, for {config['base_model_name_or_path']}")


def open_accounted(model: Model) -> Source:
    """The base, of which every tensor is accounted for."""
    from grpo.model.inventory import account
    from grpo.model.source import open_source

    base = open_source(model)
    account(base)
    return base


def write_folder(
    reference: ModelReference, merged: MergedSource, folder: Path, to: str, notice: Callable[[str], None]
) -> None:
    """A merged model in Hugging Face format."""
    from grpo.export.hf_folder import write_4bit, write_16bit

    if to == "merged-16bit":
        write_16bit(merged, folder, chat_template(reference))
        return
    in_16bit = reference.tables["model"].get("keep_16bit", [])
    if in_16bit == "auto":
        in_16bit = chosen_16bit(reference)
    lost = write_4bit(merged, folder, chat_template(reference), in_16bit)
    notice(f"quantising to NF4 changed the weights by {lost:.1%} of their norm")


def chosen_16bit(reference: ModelReference) -> list[str]:
    """What `keep_16bit = "auto"` came to in the run. Raises UserError where it was not asked."""
    from grpo.model.fingerprint import read

    assert reference.adapter is not None
    fingerprint = read(reference.adapter)
    if fingerprint is None or fingerprint.kept_16bit is None:
        raise UserError(
            f'{reference.source}: keep_16bit = "auto" is decided when a 4-bit base is loaded, and {reference.adapter} '
            "records no decision; name the layers in its place"
        )
    return fingerprint.kept_16bit


def chat_of(reference: ModelReference, merged: MergedSource, system: str | None = None) -> Chat:
    """What a chat with the exported model needs: the base's tokenizer and template, and `system` or the run's own."""
    from grpo.export.gguf_metadata import starts_with_bos
    from grpo.export.modelfile import Chat

    tokenizer = tokenizer_of(merged)
    template = chat_template(reference) or getattr(tokenizer, "chat_template", None)
    run = run_of(reference)
    if system is None and run is not None:
        system = trained_system_prompt(run)
    template = template if isinstance(template, str) else None
    return Chat(title(reference), tokenizer, template, system, starts_with_bos(merged.base, tokenizer))


def trained_system_prompt(run: Path) -> str | None:
    """The system prompt of the questions that the run kept; None where they had none, or several."""
    prompts = set()
    for file in completions_files(run, TRAINING).values():
        for entry in read_entries(file):
            prompt = entry.get("prompt")
            first = prompt[0] if isinstance(prompt, list) and prompt else {}
            prompts.add(first.get("content") if first.get("role") == "system" else None)
    return prompts.pop() if len(prompts) == 1 else None


def compare(merged: MergedSource, folder: Path, export_format: str, notice: Callable[[str], None]) -> None:
    """Say how far what was written is from base + adapter in float32, and how much of the adapter it shows.

    Raises UserError where it is not the same model.
    """
    from grpo.export.compare import Distance, adapter_share, sample_tokens, streamed_logits

    written = open_written(merged, folder)
    trained = "the trained model" if merged.adapter is None else "base + adapter"
    config = merged.config.get_text_config()
    tokens = sample_tokens(tokenizer_of(merged), config.vocab_size)
    expected, base = streamed_logits(merged, tokens), streamed_logits(merged.base, tokens)
    written_logits = streamed_logits(written, tokens, config)
    distance = Distance.between(expected, written_logits)
    notice(f"read back and compared with {trained} on {len(tokens)} texts: {distance}")
    if export_format in ("merged-4bit", "gguf-q4_k_m") and merged.adapter is not None:
        moved = Distance.between(expected, base)
        notice(f"for comparison, base without adapter: {moved}")
        if distance.kl > moved.kl:
            notice("quantising moved the model further than training did; prefer more bits, or the adapter on its base")
    elif export_format not in ("merged-4bit", "gguf-q4_k_m") and not distance.kl < FAITHFUL_KL:
        raise UserError(f"{folder.name}: the export does not compute what {trained} does; nothing was exported")
    share = adapter_share(base, expected, written_logits)
    if not math.isnan(share):
        notice(f"of what the adapter does to these texts in float32, {share:.0%} is in what was written")
    if share < FAITHFUL_SHARE:
        notice("rounding took back part of so small an adapter; --to adapter keeps all of it, on its base")


def open_written(merged: MergedSource, folder: Path) -> Source:
    """What was written into `folder`, opened as a base would be."""
    from grpo.model.gguf_source import GGUFSource
    from grpo.model.source import open_source

    gguf = next(folder.glob("*.gguf"), None)
    if gguf is not None:
        return GGUFSource(gguf, merged.config)
    return open_source(Model(name=str(folder)))


def tokenizer_of(merged: MergedSource) -> Any:
    """The base's tokenizer; None where it has none."""
    try:
        return merged.tokenizer()
    except UserError:
        return None
