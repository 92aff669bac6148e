"""grpo/policy/adapter_files.py: what peft's configuration holds beyond plain LoRA is refused by name, never ignored."""

from __future__ import annotations

import json

import pytest
import torch

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.tiny import save_tiny


@pytest.fixture
def policy(tmp_path):
    save_tiny(tmp_path / "model", "llama")
    settings = Model(name=str(tmp_path / "model"), load_in_4bit=False)
    base = BaseWeights(open_source(settings), settings, device=torch.device("cpu"), dtype=torch.float32)
    policy = Policy(base, Lora(r=4), kernels="torch")
    policy.save_adapter(tmp_path / "adapter")
    return policy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_pattern", {"q_proj": 64}),
        ("rank_pattern", {"q_proj": 8}),
        ("use_dora", True),
        ("layers_to_transform", [0]),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("init_lora_weights", "pissa"),
        ("target_modules", ".*q_proj"),
    ],
)
def test_what_would_change_the_adapter_is_refused_by_name(key, value, policy, tmp_path):
    file = tmp_path / "adapter" / "adapter_config.json"
    policy.load_adapter(tmp_path / "adapter")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key}"):
        policy.load_adapter(tmp_path / "adapter")
