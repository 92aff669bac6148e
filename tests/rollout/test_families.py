"""Families beyond the first eight: vLLM and the training graph agree on one copy, whatever is particular about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config.schema import Model
from grpo.model.inventory import account
from grpo.model.source import open_source
from tests.helpers.families import NEWCOMERS, WITH_IMAGES, save_family, save_mxfp4, save_with_images
from tests.helpers.family_tail import TAIL
from tests.helpers.graph_comparison import PROMPTS, largest_difference, load


def check(reference: Any, folder: Path) -> None:
    """The training graph computes what transformers' model `reference` does on text, and vLLM what the graph does."""
    base, policy = load(folder)
    completion = [(13 * number) % 150 for number in range(30)]
    with policy.reference():
        scored = policy.score(PROMPTS, [completion, completion], temperature=0.7, chunk_tokens=3)
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected.append(torch.log_softmax(logits / 0.7, -1)[range(30), completion])
    if base.config.model_type != "phi3":  # transformers chooses its factors by the longest of a row, we of a run
        torch.testing.assert_close(scored.logprobs, torch.cat(expected), atol=3e-5, rtol=1e-5)
    assert largest_difference(base, policy) < 1e-4


QUICK = ("ministral3", "smollm3", "phi3")
"""Families whose exceptions are of different kinds; `make test-wide` has all."""


@pytest.mark.vllm
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.wide) for name in NEWCOMERS | TAIL]
)
def test_vllm_the_training_graph_and_transformers_agree(family: str, tmp_path: Path) -> None:
    check(save_family(tmp_path, family), tmp_path)


@pytest.mark.vllm
@pytest.mark.wide
def test_experts_in_mxfp4_compute_what_their_values_do(tmp_path: Path) -> None:
    check(save_mxfp4(tmp_path), tmp_path)


@pytest.mark.vllm
@pytest.mark.wide
@pytest.mark.parametrize("family", WITH_IMAGES)
def test_of_a_model_that_takes_images_the_decoder_of_text_is_read(family: str, tmp_path: Path) -> None:
    check(save_with_images(tmp_path, family), tmp_path)
    (notice,) = account(open_source(Model(name=str(tmp_path))))
    assert "not used:" in notice and "images" in notice
