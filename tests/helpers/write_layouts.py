"""Trace the layout of every tested family and write what is kept of it: `python -m tests.helpers.write_layouts`.

Of another vLLM than before only its digests are added; a family whose layout it changes is named, and not written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import vllm
from transformers import AutoConfig

from grpo.model import layout_records
from grpo.model.layout import Record
from grpo.rollout.layout_trace import trace
from tests.helpers.families import NEWCOMERS, family_config
from tests.helpers.family_tail import TAIL
from tests.helpers.tiny import COMMON, FAMILIES

TARGET = Path(layout_records.__file__)


def version() -> str:
    """vLLM's minor version."""
    return ".".join(vllm.__version__.split("+")[0].split(".")[:2])


def traced() -> dict[str, Record]:
    """The layout of every family that has a tiny model, as the installed vLLM has it."""
    configs = {name: AutoConfig.for_model(name, **{**COMMON, **values}) for name, values in FAMILIES.items()}
    configs |= {name: family_config(name) for name in NEWCOMERS | TAIL}
    return {name: trace(config) for name, config in configs.items()}


def content(records: dict[str, Record], digests: dict[str, dict[str, str]]) -> str:
    """The text of the module. Families that are laid out alike share one entry of LAYOUTS."""
    layouts: dict[str, Record] = {}
    for record in records.values():
        layouts.setdefault(record.digest(), record)
    lines = [
        f'"""{layout_records.__doc__}"""\n',
        "# ruff: noqa: E501\n",
        "from typing import Any\n",
        "LAYOUTS: dict[str, dict[str, Any]] = {",
    ]
    for digest, record in sorted(layouts.items()):
        lines += [f'    "{digest}": {{', '        "linears": {']
        for fused, parts in record.linears.items():
            lines += [f'            "{fused}": (', *(f'                "{part}",' for part in parts), "            ),"]
        lines += ["        },", *renamed_lines(record.renamed)]
        rare = ("others", "unread", "float32")
        lines += [f'        "{key}": {each!r},' for key in rare if (each := getattr(record, key))]
        lines.append("    },")
    lines += ["}", '"""What vLLM stacks: its linear layers, each with the graph\'s in order."""\n']
    lines += [
        "FAMILIES: dict[str, str] = {",
        *(f'    "{name}": "{each.digest()}",' for name, each in sorted(records.items())),
    ]
    lines += ["}", '"""model_type -> its layout."""\n', "SEEN: dict[str, dict[str, str]] = {"]
    for seen, by_family in sorted(digests.items()):
        lines += [
            f'    "{seen}": {{',
            *(f'        "{name}": "{each}",' for name, each in sorted(by_family.items())),
            "    },",
        ]
    return "\n".join([*lines, "}", '"""vLLM\'s version -> model_type -> the layout that was traced with it."""', ""])


def renamed_lines(renamed: dict[str, str]) -> list[str]:
    """The entry of that name, an item a line."""
    if not renamed:
        return ['        "renamed": {},']
    return [
        '        "renamed": {',
        *(f'            "{ours}": "{theirs}",' for ours, theirs in sorted(renamed.items())),
        "        },",
    ]


def main() -> int:
    found = traced()
    changed = [
        name for name, record in found.items() if layout_records.FAMILIES.get(name, record.digest()) != record.digest()
    ]
    for name in changed:
        print(f"vLLM {vllm.__version__} lays out {name} differently: {found[name]}", file=sys.stderr)
    digests = layout_records.SEEN | {version(): {name: record.digest() for name, record in found.items()}}
    if not changed:
        TARGET.write_text(content(found, digests), encoding="utf-8")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
