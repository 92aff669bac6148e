"""A run on real weights: what is trained is what is sampled, from the first step of the adapter on.

Random adapters hide rounding, since what they do is large; this one is trained, and small.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

import grpo
from grpo.policy import adapter_survival
from tests.helpers.real_weights import save_first_layers
from tests.helpers.tiny_run import SMOLLM2

ON_HOST = Path("/tmp/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
"""Where a GPU host may have the model without its package."""


SCORES = """
def brevity(completion_ids, **kwargs):
    return [1 - len(ids) / 16 for ids in completion_ids]


def commas(completions, **kwargs):
    return [completion[-1]["content"].count(",") for completion in completions]
"""


def steps_of_a_run(folder, model, device, rewards, *, four_bit=True, rank=8, **keys):
    (folder / "scores.py").write_text(SCORES)
    lora = {"r": rank, "lora_alpha": 2 * rank}
    policy = grpo.load(model, max_seq_length=384, load_in_4bit=four_bit, dtype="bfloat16", device=device, lora=lora)
    policy.train(
        "arithmetic",
        rewards=[name if name == "numeric_answer" else f"{folder / 'scores.py'}:{name}" for name in rewards],
        learning_rate=3e-4,
        adapter_survival_every=1,
        output_dir=str(folder / "run"),
        **keys,
    )
    policy.close()
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def assert_sampled_as_trained(steps):
    idle, *moved = (step["mismatch_kl"] for step in steps if step["mismatch_kl"] is not None)
    assert statistics.fmean(moved) <= 1.5 * idle, (idle, moved)
    shares = [step["adapter_survival"] for step in steps if step.get("adapter_survival") is not None]
    assert shares[0] >= 0.9 and statistics.fmean(shares) >= 0.9, shares


@pytest.mark.vllm
@pytest.mark.slow
def test_the_first_steps_of_an_adapter_show_and_bring_no_mismatch(tmp_path):
    """With a term added to a rounded result, this run's shares are 0.34, 0.56."""
    model = str(save_first_layers(tmp_path / "model", 2))
    sizes = {"prompts_per_step": 3, "num_generations": 4, "max_completion_length": 48}
    assert_sampled_as_trained(steps_of_a_run(tmp_path, model, "cpu", ["commas"], max_steps=2, **sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("four_bit", [True, False], ids=["NF4", "16 bit"])
@pytest.mark.parametrize("rank", [8, 64])
def test_on_a_gpu_the_first_steps_show_and_bring_no_mismatch(four_bit, rank, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_survival, "SEQUENCES", 256)  # for a firm value; a run is content with less
    monkeypatch.setattr(adapter_survival, "TOKENS", 4096)
    model = str(ON_HOST) if ON_HOST.is_file() else SMOLLM2
    sizes = {"prompts_per_step": 32, "max_completion_length": 12, "max_steps": 6}
    rewards = ["numeric_answer", "brevity"]
    steps = steps_of_a_run(tmp_path, model, "cuda", rewards, four_bit=four_bit, rank=rank, **sizes)
    assert_sampled_as_trained(steps)
    assert max(step["mismatch_kl"] for step in steps) <= 0.004
