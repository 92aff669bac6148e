"""The gate at the start of a run sees an image, and what is wrong with images alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config.schema import parse_config
from grpo.errors import UserError
from grpo.policy.image_rows import ImageRows
from grpo.session import Session, open_session
from grpo.training.self_check import check_start, gate_prompt
from tests.helpers.seeing import SEEING, save_seeing_chat

pytestmark = pytest.mark.vllm


def session_of(folder: Path, **model: Any) -> Session:
    values = {
        "model": {"name": str(folder), "dtype": "float32", "device": "cpu", "images": True, **model},
        "lora": {"r": 4},
        "task": {"name": "arithmetic"},
        "rollout": {"max_num_seqs": 4, "max_prompt_length": 96, "max_completion_length": 32},
    }
    return open_session(parse_config(values))


@pytest.mark.parametrize("family", list(SEEING))
def test_the_gate_passes_with_an_image_in_its_prompt_and_a_base_in_4_bit(family: str, tmp_path: Path) -> None:
    with session_of(save_seeing_chat(tmp_path, family)) as session:
        assert len(gate_prompt(session).images) == 1
        assert check_start(session) is None
        assert session.policy.tower is not None and session.policy.tower.encoded == 1


def test_images_at_other_positions_than_vllms_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(self: ImageRows, sources: Any, device: torch.device) -> torch.Tensor:
        places = [place for _, first, count in sources for place in range(first, first + count)]
        return torch.tensor([places]).expand(3, 1, -1)

    with session_of(save_seeing_chat(tmp_path)) as session:
        monkeypatch.setattr(ImageRows, "positions", flat)
        with pytest.raises(UserError, match="self-test: .*vLLM's logprobs differ from the training graph's"):
            check_start(session)
