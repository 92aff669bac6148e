"""A batch that was not trained on, kept in the run folder so that it can be looked at and replayed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grpo.config.schema import Config, config_toml
from grpo.distributed.ranks import Ranks
from grpo.images import Image
from grpo.rollout.types import Segment
from grpo.run.checkpoint import replace_folder
from grpo.run.tensor_state import save_tensors
from grpo.run.versions import hardware, versions
from grpo.training.batch import TrainingGroup, TrainingSequence
from grpo.training.update_check import Batch, SkippedUpdate

KEPT_DUMPS = 3


BATCH, REPORT = "batch.safetensors", "report.json"


def dump_folder(run: Path, step: int) -> Path:
    """Where the dump of `step` belongs."""
    return run / "nonfinite" / f"step-{step}"


def write_dump(run: Path, step: int, config: Config, policy: Any, skipped: SkippedUpdate) -> Path:
    """Write what it takes to compute the update again to its `dump_folder`, and return that.

    Holds the batch and the adapter as safetensors, the configuration, and `report.json`. Only the newest
    `KEPT_DUMPS` dumps are kept. Raises OSError where the disk refuses.
    """
    folder = dump_folder(run, step)

    def write(partial: Path) -> None:
        (partial / policy.artefact).mkdir()
        policy.save(partial / policy.artefact)
        (partial / "config.toml").write_text(config_toml(config))
        save_tensors(partial / BATCH, encoded(skipped.batch))
        figures = {name: value if value is None else repr(value) for name, value in skipped.figures.items()}
        report = {"step": step, "problem": skipped.problem, "figures": figures}
        report |= {"versions": versions(), "hardware": hardware()}
        (partial / REPORT).write_text(json.dumps(report, indent=1))

    folder.parent.mkdir(exist_ok=True)
    replace_folder(folder, write)
    matches = (re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.parent.iterdir())
    for number in sorted(int(match[1]) for match in matches if match)[:-KEPT_DUMPS]:
        shutil.rmtree(folder.parent / f"step-{number}")
    return folder


def encoded(batch: Batch) -> dict[str, Any]:
    """`batch` as `save_tensors` takes it."""
    return {
        "prompts": [[sequence_state(sequence) for sequence in group.sequences] for group in batch.groups],
        "idle": [group.zero_advantage for group in batch.groups],
        "rng": batch.rng,
    }


def decoded(state: Mapping[str, Any]) -> Batch:
    """The batch that `encoded` made `state` of."""
    prompts = [[restored_sequence(sequence) for sequence in prompt] for prompt in state["prompts"]]
    pairs = zip(prompts, state["idle"], strict=True)
    return Batch(
        [TrainingGroup.of(sequences, zero_advantage=zero_advantage) for sequences, zero_advantage in pairs],
        state["rng"],
    )


def gather_batch(batch: Batch, ranks: Ranks) -> Batch:
    """`batch` with the sequences that other ranks computed. Every rank calls it; what differs is only the rng."""
    if ranks.size == 1:
        return batch
    here = {index: group for index, group in enumerate(batch.groups) if group.sequences}
    local = {index: [sequence_state(sequence) for sequence in group.sequences] for index, group in here.items()}
    prompts = ranks.gather_indexed(local, len(batch.groups))
    groups = [
        replace(group, sequences=[restored_sequence(sequence) for sequence in prompt])
        for group, prompt in zip(batch.groups, prompts, strict=True)
    ]
    return Batch(groups, batch.rng)


def sequence_state(sequence: TrainingSequence) -> dict[str, Any]:
    return {
        "prompt_ids": torch.tensor(sequence.prompt_ids, dtype=torch.int64),
        "completion_ids": torch.tensor(sequence.completion_ids, dtype=torch.int64),
        "rollout_logprobs": torch.tensor(sequence.rollout_logprobs, dtype=torch.float64),
        "advantage": sequence.advantage,
        "truncated": sequence.truncated,
        "old_logprobs": sequence.old_logprobs,
        "sampled": mask_state(sequence.sampled),
        "token_advantages": float_state(sequence.token_advantages),
        "rewritten": [
            [
                torch.tensor(part.prompt_ids),
                torch.tensor(part.token_ids),
                mask_state(part.sampled),
                on_cpu(part.routes),
                [image_state(image) for image in part.images],
            ]
            for part in sequence.rewritten
        ],
        "routes": on_cpu(sequence.routes),
        "images": [image_state(image) for image in sequence.images],
    }


def image_state(image: Image) -> list[Any]:
    return [torch.frombuffer(bytearray(image.data), dtype=torch.uint8), image.width, image.height, image.digest]


def restored_images(states: Sequence[Sequence[Any]]) -> tuple[Image, ...]:
    return tuple(restored_image(*state) for state in states)


def restored_image(data: torch.Tensor, width: int, height: int, digest: str) -> Image:
    return Image(data.numpy().tobytes(), width, height, digest)


def float_state(values: Sequence[float] | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def mask_state(sampled: Sequence[bool] | None) -> torch.Tensor | None:
    return None if sampled is None else torch.tensor(sampled, dtype=torch.bool)


def restored_sequence(state: Mapping[str, Any]) -> TrainingSequence:
    lists = {name: state[name].tolist() for name in ("prompt_ids", "completion_ids", "rollout_logprobs")}
    return TrainingSequence(
        **lists,
        advantage=state["advantage"],
        truncated=state["truncated"],
        old_logprobs=state["old_logprobs"],
        sampled=listed(state.get("sampled")),
        token_advantages=listed(state.get("token_advantages")),
        rewritten=[
            Segment(prompt.tolist(), tokens.tolist(), listed(sampled), routes, restored_images(images))
            for prompt, tokens, sampled, routes, images in state.get("rewritten", ())
        ],
        routes=state.get("routes"),
        images=restored_images(state.get("images", ())),
    )


def on_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()


def listed(tensor: torch.Tensor | None) -> list[Any] | None:
    return None if tensor is None else tensor.tolist()
