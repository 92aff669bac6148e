"""The model card of a run that is pushed to the hub: what it is, how it was trained, what it reached, how to load it.

Everything in it is read from the run folder. A card is public, so that paths of this machine are cut to their last
name and values under keys such as `api_key` are hidden. Uploading is `push.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config.toml import write_toml
from grpo.errors import UserError
from grpo.report.data import RunData, mean, read_run
from grpo.run.records import without_secrets
from grpo.version import __version__

PICTURE = "curves.png"
ENDS = 5
"""Steps at either end of a run that a figure is the mean of."""
RELATION = {"adapter": "adapter", "merged-16bit": "finetune", "merged-4bit": "quantized", "gguf": "quantized"}
"""The hub's words for what a form is to its base."""
LIBRARY = {"adapter": "peft", "merged-16bit": "transformers", "merged-4bit": "transformers"}
SHOWN = {
    "lora": ("r", "lora_alpha", "target_modules", "use_rslora", "init_lora_weights"),
    "sft": ("max_length", "train_on", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "rollout": ("prompts_per_step", "num_generations", "max_prompt_length", "max_completion_length", "temperature"),
    "loss": ("loss_type", "beta", "epsilon", "scale_rewards", "importance_sampling_correction"),
    "train": ("learning_rate", "lr_scheduler_type", "optim", "num_iterations", "seed"),
}
"""The settings that are in the card's table; all of them are below it."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of."""

    repository: str
    """OWNER/NAME."""
    form: str
    """One of the formats of `grpo.export`."""
    base: str
    """What the base is called for others."""
    revision: str | None = None
    run: RunData | None = None
    """None for an adapter that belongs to no run."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    gguf_type: str = "f16"
    has_picture: bool = False

    @property
    def supervised(self) -> bool:
        return self.run is not None and "sft" in self.run.config

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]


def card(facts: CardFacts) -> str:
    """README.md of the repository."""
    parts = [front_matter(facts), f"# {facts.name}", introduction(facts), loading(facts)]
    if facts.run is not None:
        parts += [results(facts, facts.run), training(facts, facts.run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: CardFacts) -> str:
    """What the hub reads: base, form, data sets, tags."""
    lines = []
    if is_hub_id(facts.base):
        lines += [f"base_model: {facts.base}", f"base_model_relation: {RELATION[facts.form]}"]
    if facts.form in LIBRARY:
        lines.append(f"library_name: {LIBRARY[facts.form]}")
    lines.append("pipeline_tag: text-generation")
    if sets := data_sets(facts.run):
        lines += ["datasets:", *(f"- {name}" for name in sets)]
    tags = ["sft" if facts.supervised else "grpo", "lora", *(["gguf"] if facts.form == "gguf" else [])]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def data_sets(run: RunData | None) -> list[str]:
    """The hub's data sets that the run names."""
    if run is None:
        return []
    tables = [run.config.get("sft"), *(task.get("options") for task in tasks(run))]
    names = [table["hub"] for table in tables if isinstance(table, dict) and isinstance(table.get("hub"), str)]
    return [name for name in dict.fromkeys(names) if is_hub_id(name)]


def tasks(run: RunData) -> list[dict[str, Any]]:
    """The tables of [task] or [[task]]."""
    found = run.config.get("task", [])
    return [entry for entry in (found if isinstance(found, list) else [found]) if isinstance(entry, dict)]


def introduction(facts: CardFacts) -> str:
    """What it is, in two sentences."""
    form = {
        "adapter": "A LoRA adapter for",
        "merged-16bit": "A fine-tune of",
        "merged-4bit": "A fine-tune, in bitsandbytes' NF4, of",
        "gguf": f"A fine-tune, as GGUF in {facts.gguf_type}, of",
    }[facts.form]
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if is_hub_id(facts.base) else f"`{facts.base}`"
    revision = f" at revision `{facts.revision}`" if facts.revision else ""
    how = "supervised, on examples of" if facts.supervised else "by reinforcement learning (GRPO) on"
    trained = "" if facts.run is None else f", trained {how} {', '.join(task_names(facts.run)) or 'its rewards'}"
    return f"{form} {base}{revision}{trained}. Made with grpo {__version__}."


def task_names(run: RunData) -> list[str]:
    """What the run was trained on."""
    sft = run.config.get("sft")
    if isinstance(sft, dict):
        return [public(str(sft.get("hub") or sft.get("path") or "examples"))]
    return [public(str(task.get("name"))) for task in tasks(run)]


# Loading


def loading(facts: CardFacts) -> str:
    """How to load it in peft or transformers, vLLM and Ollama."""
    make = {"adapter": load_adapter, "gguf": load_gguf}.get(facts.form, load_merged)
    system = ""
    if facts.system_prompt:
        system = f"\n\nIt was trained with this system prompt:\n\n{fenced(facts.system_prompt)}"
    return "## Loading\n\n" + "\n\n".join(make(facts)) + system


def load_adapter(facts: CardFacts) -> Iterator[str]:
    rank = facts.lora.get("r", 16)
    yield "With peft:"
    yield fenced(
        "from peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{facts.repository}")',
        "python",
    )
    yield "With vLLM:"
    yield fenced(
        f"vllm serve {facts.base} --enable-lora --max-lora-rank {served_rank(rank)} "
        f"--lora-modules {facts.name}={facts.repository}",
        "bash",
    )
    yield "Ollama takes whole models: merge it first, with grpo installed and the adapter downloaded."
    yield fenced(
        f"hf download {facts.repository} --local-dir adapter\n"
        "python -m grpo.export adapter --to gguf --gguf-type q8_0 --out gguf\n"
        f"ollama create {facts.name.lower()} -f gguf/Modelfile",
        "bash",
    )


def served_rank(rank: int) -> int:
    """The least rank that vLLM can be told which is enough."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def load_merged(facts: CardFacts) -> Iterator[str]:
    yield "With transformers:"
    yield fenced(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{facts.repository}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.repository}")',
        "python",
    )
    yield "With vLLM:"
    yield fenced(f"vllm serve {facts.repository}", "bash")
    yield "Ollama takes GGUF files: `python -m grpo.export RUN --to gguf` makes one of the same run."


def load_gguf(facts: CardFacts) -> Iterator[str]:
    yield "With Ollama:"
    yield fenced(
        f"hf download {facts.repository} --local-dir {facts.name}\n"
        f"cd {facts.name} && ollama create {facts.name.lower()} -f Modelfile && ollama run {facts.name.lower()}",
        "bash",
    )
    yield "With llama.cpp:"
    yield fenced(f"llama-cli -hf {facts.repository}", "bash")
    yield "peft and vLLM take the adapter: `python -m grpo.export RUN --to adapter` makes it of the same run."


def fenced(text: str, language: str = "") -> str:
    """`text` as a block of code, whatever stands in it."""
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


# What it reached


def results(facts: CardFacts, run: RunData) -> str:
    """Rewards and held-out figures at the beginning and the end, and their curves."""
    rows = [
        f"| {label} | {weight} | {first:.4g} | {last:.4g} |"
        for key, label, weight in shown_metrics(run)
        if (ends := first_and_last(run, key)) is not None
        for first, last in (ends,)
    ]
    parts = ["## Results"]
    if rows:
        span = min(ENDS, len(run.steps))
        head = f"| in training | weight | first {span} steps | last {span} |\n| --- | --- | --- | --- |"
        parts.append("\n".join([head, *rows]))
    if held := held_out(run):
        parts.append("\n".join(["| held out | before or first | last |\n| --- | --- | --- |", *held]))
    if facts.has_picture:
        parts.append(f"![Curves of the run]({PICTURE})")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def shown_metrics(run: RunData) -> Iterator[tuple[str, str, str]]:
    """(metric, what to call it, its weight) of the rewards, and of a supervised run of its loss."""
    if "reward" in run.series:
        yield "reward", "reward", ""
    weights = reward_weights(run)
    for name in run.rewards:
        yield f"rewards/{name}", f"`{name}`", f"{weights.get(name, 1.0):g}"
    if not run.rewards and "loss" in run.series:
        yield "loss", "loss", ""


def reward_weights(run: RunData) -> dict[str, float]:
    """The weights of the run's rewards, by their names in the metrics."""
    tables = run.config.get("rewards", [])
    found = {}
    for table in tables if isinstance(tables, list) else []:
        if isinstance(table, dict):
            name = table.get("name") or re.split(r"[:.]", str(table.get("function")))[-1]
            found[str(name)] = float(table.get("weight", 1.0))
    return found


def first_and_last(run: RunData, key: str) -> tuple[float, float] | None:
    """The metric's means over the first and the last steps that have it."""
    values = run.known(key)
    first, last = mean(values[:ENDS]), mean(values[-ENDS:])
    return None if first is None or last is None else (first, last)


def held_out(run: RunData) -> Iterator[str]:
    """Rows of a table of held-out figures."""
    for key in ("eval/strict_accuracy", "eval/flexible_accuracy", "eval/loss"):
        values = [entry[key] for entry in run.evaluations if isinstance(entry.get(key), int | float)]
        if values:
            label = key.removeprefix("eval/").replace("_", " ")
            yield f"| {label} | {values[0]:.4g} | {values[-1]:.4g} |"


def draw_curves(run: RunData, file: Path, notice: Callable[[str], None]) -> bool:
    """Write the rewards', lengths' and held-out curves as a picture; says why there is none."""
    from grpo.monitor.curves import Curve, draw

    panels: dict[str, dict[str, Curve]] = {}
    keys = [key for key, _, _ in shown_metrics(run)] + ["completion_length"]
    for key in [key for key in keys if run.known(key)]:
        pairs = [(s, v) for s, v in zip(run.steps, run.series[key], strict=True) if v is not None]
        panels[title(key)] = {"training": ([s for s, _ in pairs], [v for _, v in pairs])}
    for key in ("eval/strict_accuracy", "eval/flexible_accuracy", "eval/loss"):
        points = [(e["step"], e[key]) for e in run.evaluations if isinstance(e.get(key), int | float)]
        if points:
            panels[title(key)] = {"held out": ([s for s, _ in points], [v for _, v in points])}
    if not panels:
        return False
    try:
        draw(panels).save(file)
    except UserError as error:
        notice(f"the card has no curves: {error}")
        return False
    return True


def title(key: str) -> str:
    return key.removeprefix("rewards/").replace("eval/", "held-out ", 1).replace("_", " ")


# How it was trained


def training(facts: CardFacts, run: RunData) -> str:
    """Method, settings, versions, machine."""
    steps = run.steps[-1] if run.steps else 0
    method = "Supervised fine-tuning by TRL's SFTTrainer" if facts.supervised else "GRPO"
    held = "NF4 (4 bit)" if run.setting("model", "load_in_4bit") is not False else "16 or 32 bit"
    parts = ["## Training", f"{method}, {steps:,} steps, over a base held in {held}, with LoRA."]
    rows = [
        f"| `{section}.{key}` | `{public(run.config[section][key])}` |"
        for section, keys in SHOWN.items()
        for key in keys
        if isinstance(run.config.get(section), dict) and run.config[section].get(key) is not None
    ]
    parts.append("\n".join(["| setting | value |\n| --- | --- |", *rows]))
    if facts.run is not None and run.config:
        whole = fenced(write_toml(public(without_secrets(run.config))).rstrip(), "toml")
        parts.append(f"<details><summary>All settings</summary>\n\n{whole}\n\n</details>")
    if versions := run.summary.get("versions"):
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts.append(f"Versions: {named}.")
    if gpus := (run.summary.get("hardware") or {}).get("gpus"):
        parts.append(f"Trained on {', '.join(map(str, gpus))}.")
    return "\n\n".join(parts)


def public(value: Any) -> Any:
    """`value` with paths of this machine cut to their last names, in nested tables too."""
    if isinstance(value, Mapping):
        return {key: public(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    path, colon, function = value.partition(":")
    if value.startswith("package:"):
        return value
    return public_path(path) + colon + function if colon else public_path(value)


def public_path(text: str) -> str:
    """A path of this machine as its last name; any other text as it is."""
    is_path = text.startswith(("/", "~", "./", "../")) or ("/" in text and "\n" not in text and Path(text).exists())
    return Path(text).name if is_path and len(text) < 4096 else text


def run_data(folder: Path | None) -> RunData | None:
    """The run in `folder`."""
    return None if folder is None else read_run(folder)
