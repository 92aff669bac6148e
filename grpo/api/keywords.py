"""Keyword arguments of the Python API as tables of the configuration: `learning_rate=1e-4` is `[train] learning_rate`.

Every name of the TOML is a keyword, and so is a whole section (`eval={"every": 10}`), which is the only way to write
names that two sections have. Values are checked by `grpo.config`, not here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.config.messages import section_of
from grpo.config.schema import Config, Rollout
from grpo.errors import UserError

Tables = dict[str, Any]

SECTIONS = ("rollout", "train", "loss", "log", "checkpoint", "model")
"""Sections whose names are keywords; of a name that two have, the first is meant."""


def tables_of(settings: Mapping[str, Any], call: str, sections: Sequence[str], arguments: Sequence[str] = ()) -> Tables:
    """`settings` sorted into the tables of `sections`. `call` is named in errors, `arguments` are its other arguments.

    A section outside `SECTIONS`, such as eval, is only taken as a whole.

    Raises UserError for an unknown keyword, with the nearest, and for one that is set elsewhere.
    """
    tables: Tables = {}
    for keyword, value in settings.items():
        home = next((name for name in sections if name in SECTIONS and keyword in keys_of(name)), None)
        if keyword in sections:
            if not isinstance(value, Mapping):
                raise UserError(f"{call}: {keyword} = {value!r} must be a dict of [{keyword}] keys")
            tables[keyword] = {**tables.get(keyword, {}), **value}
        elif home is not None:
            tables[home] = {**tables.get(home, {}), keyword: value}
        else:
            raise UserError(f"{call}: {unknown(keyword, sections, arguments)}")
    return tables


def unknown(keyword: str, sections: Sequence[str], arguments: Sequence[str]) -> str:
    """Why there is no such keyword, and what there is instead."""
    if "model" not in sections and (keyword in ("model", "lora") or keyword in {*keys_of("model"), *keys_of("lora")}):
        return f"{keyword!r} is decided when the model is loaded; pass it to grpo.load"
    for section in ("eval", "alarms", "lora", "task"):
        if keyword in keys_of(section):
            return f"{keyword!r} belongs to {section}; write {section}={{{keyword!r}: ...}}"
    known = [*arguments, *sections, *(key for section in sections for key in keys_of(section))]
    near = difflib.get_close_matches(keyword, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "docs/config.md lists them all"
    return f"there is no keyword {keyword!r}; {hint}"


def keys_of(section: str) -> list[str]:
    """The keys of a section of the configuration, without those that only an own argument can set."""
    model = section_of(Config.model_fields[section])
    assert model is not None, "every field of the configuration is a section"
    return [key for key in model.model_fields if key != "name"]


def merged(*layers: Mapping[str, Any]) -> Tables:
    """Tables laid over one another, key by key; the last has the say."""
    tables: Tables = {}
    for layer in layers:
        for section, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(tables.get(section), Mapping)
            tables[section] = {**tables[section], **value} if both else value
    return tables


def with_lengths(tables: Tables) -> Tables:
    """`tables`, with the lengths of prompts and completions that they leave open made to fit `model.max_seq_length`."""
    longest, given = tables.get("model", {}).get("max_seq_length"), tables.get("rollout", {})
    left_open = [key for key in ("max_prompt_length", "max_completion_length") if key not in given]
    if not isinstance(longest, int) or not left_open:
        return tables
    rest = longest - sum(given.get(key, 0) for key in ("max_prompt_length", "max_completion_length"))
    fitting = max(rest // len(left_open), 1)
    return merged(tables, {"rollout": {key: min(Rollout.model_fields[key].default, fitting) for key in left_open}})
