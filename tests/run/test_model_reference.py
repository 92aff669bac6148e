"""What a name stands for, and where the base of an adapter is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.run.model_reference import resolve_model


def test_a_base_that_has_moved_is_named_anew(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    for base, expected in (("./gone/model", "its base has moved .*--base"), (None, "does not say what its base is")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": base}))
        with pytest.raises(UserError, match=expected):
            resolve_model(tmp_path)
        (tmp_path / "model").mkdir(exist_ok=True)
        assert resolve_model(tmp_path, tmp_path / "model").tables["model"]["name"] == str(tmp_path / "model")
    with pytest.raises(UserError, match="neither an adapter nor a run"):
        resolve_model(tmp_path / "model", base="elsewhere")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(UserError, match="only LoRA adapters are taken"):
        resolve_model(tmp_path)
