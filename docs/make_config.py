"""Write `docs/config.md` from the docstrings of `grpo.config`: `make docs`. Needs the project installed."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo.config import Config
from grpo.explain import accepts, section_of
from grpo.toml import write_value

INTRODUCTION = """\
<!-- Made by docs/make_config.py from the docstrings in grpo/config.py; edit them, then run `make docs`. -->
# Configuration

An experiment is one TOML file. Every key has a default but `name` in `[model]` and `[task]` and `function` in
`[[rewards]]`; unknown keys are refused. `--set section.key=value` overrides a key from the command line, `--dry-run`
prints the whole configuration.
"""


def reference() -> str:
    """The whole file."""
    sections = [section for field in Config.model_fields.values() if (section := section_of(field))]
    return "\n".join([INTRODUCTION, *map(section_text, sections)])


def section_text(section: type[BaseModel]) -> str:
    """One section of the reference: its docstring as a heading and a paragraph, then its keys."""
    name, _, about = (section.__doc__ or "").partition(": ")
    lines = [f"## {name}", "", about[:1].upper() + about[1:], ""]
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
