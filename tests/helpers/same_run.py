"""Whether two run folders hold the same run: everything but times, memory and what names the folder, bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

MEASURED = re.compile(r"seconds|per_second|memory_gib|time")
"""Metrics that are not the same when a run is repeated."""


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in the two folders, in words."""
    found = []
    for name in ("adapter", "best_adapter", "model", "best_model", *(f"checkpoints/{last_checkpoint(one)}",)):
        for file in sorted((one / name).rglob("*.safetensors")):
            inside = file.relative_to(one)
            if not (other / inside).is_file():
                found.append(f"{inside} is missing")
            elif not same_tensors(file, other / inside):
                found.append(f"{inside} differs")
    for name in ("metrics.jsonl", "eval.jsonl"):
        if lasting(one / name) != lasting(other / name):
            found.append(f"{name} differs")
    mine, others = completions(one), completions(other)
    found += [f"{name} differs" for name in sorted(mine.keys() | others.keys()) if mine.get(name) != others.get(name)]
    return found


def last_checkpoint(run: Path) -> str:
    names = [entry.name for entry in (run / "checkpoints").iterdir() if entry.name.startswith("step-")]
    return max(names, key=lambda name: int(name.removeprefix("step-")))


def same_tensors(one: Path, other: Path) -> bool:
    with safe_open(one, "pt") as mine, safe_open(other, "pt") as others:
        return (
            mine.metadata() == others.metadata()
            and mine.keys() == others.keys()
            and all(same_bits(mine.get_tensor(name), others.get_tensor(name)) for name in mine.keys())
        )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def lasting(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    entries = map(json.loads, file.read_text().splitlines())
    return [{name: value for name, value in entry.items() if not MEASURED.search(name)} for entry in entries]


def completions(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "completions").glob("*.jsonl")}
