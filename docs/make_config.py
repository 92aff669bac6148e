"""Write `docs/config.md` from the docstrings of `grpo.config` and `grpo.sft.config`: `make docs`.

Needs the project installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo.config.messages import accepts, section_of
from grpo.config.schema import Config
from grpo.config.toml import write_value
from grpo.sft.config import KEYS, SftConfig

INTRODUCTION = """\
<!-- Made by docs/make_config.py from the docstrings in grpo/config/sections/ and grpo/sft/config.py; edit them,
then run `make docs`. -->
# Configuration

An experiment is one TOML file. Every key has a default but `name` in `[model]` and `[task]` and `function` in
`[[rewards]]`; unknown keys are refused. `--set section.key=value` overrides a key from the command line, `--dry-run`
prints the whole configuration.

The configuration of a supervised run (`python -m grpo.sft`, see [sft.md](sft.md)) has `[sft]`, which stands last here,
and of the other sections those that the paragraph there names.
"""


def reference() -> str:
    """The whole file."""
    sections, supervised = sections_of(Config), sections_of(SftConfig)
    own = [section_text(section, shared(sections)) for name, section in supervised.items() if name not in sections]
    return "\n".join([INTRODUCTION, *map(section_text, sections.values()), *own])


def sections_of(config: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {name: section for name, field in config.model_fields.items() if (section := section_of(field))}


def shared(sections: Iterable[str]) -> str:
    """Which other sections and keys a supervised run has."""
    whole = [f"`[{name}]`" for name in SftConfig.model_fields if name in sections and name not in KEYS]
    whole[0] += " (without `max_seq_length`)"
    parts = [f"of `[{name}]` " + ", ".join(f"`{key}`" for key in keys) for name, keys in KEYS.items()]
    return f"Beside it a supervised run has {', '.join(whole)}; {'; '.join(parts)}.\n"


def section_text(section: type[BaseModel], more: str = "") -> str:
    """One section of the reference: its docstring as a heading and a paragraph, `more`, then its keys."""
    name, _, about = (section.__doc__ or "").partition(": ")
    lines = [f"## {name}", "", about[:1].upper() + about[1:], "", *([more] if more else [])]
    for key, field in section.model_fields.items():
        description = " ".join((field.description or "").split())
        lines += [f"**`{key}`** ({accepts(field)}; {default(field)})  ", description, ""]
    return "\n".join(lines)


def default(field: FieldInfo) -> str:
    """The default in TOML's notation."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "not set by default" if value is None else f"default `{write_value(value)}`"


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(reference())
