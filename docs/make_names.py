"""Write `docs/names.md` from `grpo.config.familiar_names`: `make docs`. Needs the project installed."""

from __future__ import annotations

from pathlib import Path

from grpo.config.familiar_names import ALWAYS_SO, ATTRIBUTES, INSTEAD, RENAMED, VALUES

HEAD = """\
<!-- Made by docs/make_names.py from grpo/config/familiar_names.py; edit that, then run `make docs`. -->
# Names of TRL and Unsloth

Arguments of TRL's GRPOConfig and GRPOTrainer, transformers' TrainingArguments, Unsloth's from_pretrained,
get_peft_model and fast_generate, and older ones of notebooks that are still about, that are not keys here by the same
name ([config.md](config.md) has those), as `grpo.load`, `policy.train` and `policy.generate` take them. A value in the
last column is taken and changes nothing, since it says what is so anyhow.

| argument | here | taken as it is |
| --- | --- | --- |
"""


def row(name: str) -> str:
    here = f"`{RENAMED[name]}`" if name in RENAMED else INSTEAD.get(name, "")
    if name in VALUES and name not in INSTEAD:
        here = ", ".join(f"`{key}={value!r}` for `True`" for key, value in VALUES[name](True).items())
    taken = ", ".join(f"`{value!r}`" for value in ALWAYS_SO.get(name, ()))
    return f"| `{name}` | {here.replace('|', '/')} | {taken} |"


def page() -> str:
    names = sorted({*RENAMED, *INSTEAD, *ALWAYS_SO, *VALUES} - {"optim", "scale_rewards", "min_p", "dtype", "top_k"})
    methods = [f"| `{name}` | {sentence} | |" for name, sentence in sorted(ATTRIBUTES.items())]
    return HEAD + "\n".join([*map(row, names), *methods]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("names.md").write_text(page(), encoding="utf-8")
