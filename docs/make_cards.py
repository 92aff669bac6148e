"""Write `docs/cards.md`, and the plans in README.md's gallery, from the plans' own arithmetic: `make docs`.

Nothing is measured here; what the predictions rest on is `grpo/memory/roofline.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

from grpo.config.schema import Config, parse_config, read_config
from grpo.memory.fit import CONTEXT, best_fit, usable_bytes
from grpo.memory.gpus import Gpu, gpu_named
from grpo.memory.plan import Shape, plan_memory, sequence_limits
from grpo.memory.roofline import (
    AGAIN_SHARE,
    COPY_SHARE,
    LAYER_SECONDS,
    PACKED_SHARE,
    PRODUCT_SHARE,
    TRAIN_SHARE,
    Work,
    decode_seconds,
    pass_seconds,
)
from grpo.memory.shapes import known_sizes, model_tower
from grpo.memory.summary import memory_plan

ROOT = Path(__file__).resolve().parent.parent
CARDS = ("T4", "RTX 3090", "RTX 4090", "RTX 5090", "L4", "A10", "A100 40GB")
MODELS = ("Qwen2.5-3B", "Llama-3.1-8B")
ROWS = (1, 8, 32, 128)
MICRO_BATCH, LENGTH, CONTEXT_TOKENS = 8192, 1024, 512
OF_SIZE = {8: "RTX 2070", 15: "T4", 16: "RTX 4080", 24: "RTX 3090", 32: "RTX 5090", 80: "A100 80GB"}
"""GB that a configuration is made for -> the GPU that its plan is printed for."""
SIZE = re.compile(r"# (\d+) GB: ")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


INTRODUCTION = f"""\
<!-- Made by docs/make_cards.py; edit it or grpo/memory, then run `make docs`. -->
# Which card does what

Everything on this page is predicted. The project was run on an H100, an H200 and a CPU; no other card has been
measured. `python -m grpo.train CONFIG --dry-run --card 3090` prints the same for a configuration of yours, with or
without a GPU, and for well-known models without having them.

What the predictions rest on:

- Memory is counted tensor by tensor, and the formulas are held to within 1 % of what steps on an H200 took
  (`tests/memory/test_plan.py`). Beside that a plan leaves {CONTEXT / 1e9:.1f} GB to the CUDA context, 0.3 GB to kernels
  that are loaded later, 3 % to fragments and, on a card under 24 GB, 1 GB to a desktop.
- Decoding: the code for sm_80 to sm_89 and sm_120 was run on an H200, whose driver compiles PTX for sm_80
  ([nf4_as_sm80.json](../benchmarks/results/nf4_as_sm80.json)). It read 4-bit weights at {percent(PACKED_SHARE)} of a
  copy's speed with 1 to 16 rows, and at 44 % with 32. From about 64 rows the matrix instructions decide, at about
  {percent(PRODUCT_SHARE)} of what they can. The code for sm_75 reached 50 % of a copy's speed with 1 row and 43 % with
  8 ([nf4_as_sm75.json](../benchmarks/results/nf4_as_sm75.json)). A copy is taken to reach {percent(COPY_SHARE)} of the
  bandwidth that a maker states, and a layer to cost {LAYER_SECONDS * 1e6:.0f} us beside its products, which on an H200
  gives what was measured to within a third.
- Training: {percent(TRAIN_SHARE)} of the 16-bit products with float32 sums, as on an H200
  ([whole_step.json](../benchmarks/results/whole_step.json)). Layers that are computed again take
  {percent(AGAIN_SHARE)} of a forward pass more ([train_step_8b.json](../benchmarks/results/train_step_8b.json)).
"""


def page() -> str:
    """The whole file."""
    parts = [INTRODUCTION, "## The cards\n", cards_table(), "## A decoding step\n", DECODING, decoding_table()]
    parts += ["## A training micro-batch\n", TRAINING, training_table(), "## The configurations\n", CONFIGURATIONS]
    return "\n".join([*parts, *map(plan_text, carded())])


def cards_table() -> str:
    lines = [
        "| | architecture | memory, GB | bandwidth, GB/s | 16-bit products, TFLOP/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for gpu in map(gpu_named, CARDS):
        memory, flops = f"{gpu.memory / 1e9:.1f}", f"{gpu.flops / 1e12:.0f}"
        lines.append(f"| {gpu.name} | sm_{gpu.architecture} | {memory} | {gpu.bandwidth / 1e9:,.0f} | {flops} |")
    return "\n".join(lines) + "\n"


DECODING = f"""\
One token for each of so many sequences with {CONTEXT_TOKENS} tokens each, weights in 4 bit. Read are weights, output
head and KV cache; a multiplication and an addition are two FLOP. Tokens a second, predicted:
"""


def plain(model: str) -> tuple[Config, Shape]:
    sizes = known_sizes(model)
    assert sizes is not None, model
    return parse_config({"model": {"name": model}, "task": {"name": "arithmetic"}}), Shape.of(sizes)


def decoding_table() -> str:
    lines = ["| model | sequences | GB read | GFLOP | " + " | ".join(CARDS) + " |", "| --- " * (4 + len(CARDS)) + "|"]
    for model in MODELS:
        config, shape = plain(model)
        work = Work.of(config, shape, 2)
        for rows in ROWS:
            read = work.linear_bytes + 2 * work.head + rows * CONTEXT_TOKENS * work.kv_token
            products = 2 * rows * (work.linear + work.head)
            speeds = [rows / decode_seconds(work, gpu_named(card), rows, CONTEXT_TOKENS) for card in CARDS]
            cells = " | ".join(f"{speed:,.0f}" for speed in speeds)
            lines.append(f"| {model} | {rows} | {read / 1e9:.2f} | {products / 1e9:,.0f} | {cells} |")
    return "\n".join(lines) + "\n"


TRAINING = f"""\
{MICRO_BATCH:,} tokens in sequences of {LENGTH:,}, forward and backward, MLPs computed again. Moved are the weights,
which are dequantised and read by products three times. Tokens a second, predicted:
"""


def training_table() -> str:
    lines = ["| model | GB moved | TFLOP | " + " | ".join(CARDS) + " |", "| --- " * (3 + len(CARDS)) + "|"]
    for model in MODELS:
        config, shape = plain(model)
        work = Work.of(config, shape, 2)
        seconds = [
            pass_seconds(work, gpu_named(card), "mlp", MICRO_BATCH, LENGTH, MICRO_BATCH, predicted=MICRO_BATCH)
            for card in CARDS
        ]
        moved = 3 * (work.linear_bytes + 4 * work.linear)
        products = MICRO_BATCH * (4 * work.linear + 2 * work.gate_up + 4 * work.head)
        cells = " | ".join(f"{MICRO_BATCH / one:,.0f}" for one in seconds)
        lines.append(f"| {model} | {moved / 1e9:.0f} | {products / 1e12:.0f} | {cells} |")
    return "\n".join(lines) + "\n"


CONFIGURATIONS = """\
What `--dry-run` prints of each configuration that is made for a card.
"""


def carded() -> list[Path]:
    """Configurations that name the memory of a card, the smallest first."""
    files = [file for file in sorted((ROOT / "configs").glob("*.toml")) if SIZE.match(file.read_text())]
    return sorted(files, key=size)


def size(file: Path) -> int:
    """GB of the card that a configuration is made for."""
    found = SIZE.match(file.read_text())
    assert found is not None, file
    return int(found[1])


def card_of(file: Path) -> Gpu:
    return gpu_named(OF_SIZE[size(file)])


def plan_text(file: Path) -> str:
    lines = "\n".join(memory_plan(read_config(file), card_of(file)))
    return f"### {file.name}\n\n```text\n{lines}\n```\n"


def cell(file: Path) -> str:
    """A configuration's plan in a cell of README.md's gallery."""
    config, gpu = read_config(file), card_of(file)
    sizes = known_sizes(config.model.name)
    assert sizes is not None, config.model.name
    shape = Shape.of(sizes)
    plan = plan_memory(config, shape, 2, on_gpu=True, flash=gpu.flash, tower=model_tower(config.model))
    usable = usable_bytes(gpu.memory - CONTEXT, gpu.memory)
    fit = best_fit(config, shape, 2, plan, usable, gpu)
    assert fit is not None, f"{file.name} does not fit"
    taken = plan.peak(fit.kv_cache, fit.mode) + gpu.memory - usable
    return (
        f"{gpu.name}: {taken / 1e9:.1f} of {gpu.memory / 1e9:.1f} GB, {fit.sequences} of {sequence_limits(config)[1]} "
        f"sequences at once, {fit.seconds:,.0f} s a step"
    )


def readme(text: str) -> str:
    """README.md with the plans as they are now."""
    for file in carded():
        row = re.compile(rf"^(\| \[configs/{re.escape(file.name)}\][^|]*\|[^|]*\|[^|]*\|)[^|\n]*\|$", re.MULTILINE)
        assert row.search(text), f"README.md's gallery has no {file.name}"
        text = row.sub(lambda found, file=file: f"{found[1]} {cell(file)} |", text)
    return text


if __name__ == "__main__":
    (ROOT / "docs" / "cards.md").write_text(page())
    (ROOT / "README.md").write_text(readme((ROOT / "README.md").read_text()))
