"""An adapter knows its base again however it is stored, and tells it from another of the same shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.export.__main__ import main
from grpo.model.base_weights import BaseWeights
from grpo.model.fingerprint import Fingerprint, check_base
from grpo.model.locate import BASE_SAMPLE
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.checkpoints import quantize_folder, write_gguf
from tests.helpers.tiny import save_tiny, tiny_model


def fingerprint(path: Path) -> Fingerprint:
    return Fingerprint.of(open_source(Model(name=str(path))))


def altered(folder: Path, share: float) -> Path:
    """A tiny Llama whose weights are each `share` away from those of `save_tiny`, as further training leaves them."""
    save_tiny(folder)
    file = folder / "model.safetensors"
    torch.manual_seed(1)
    tensors = {
        name: tensor + share * tensor.std() * torch.randn_like(tensor) for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_every_form_of_the_base_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("plain", "packed", "nested", "half"):
        save_tiny(tmp_path / name)
    file = tmp_path / "half" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    quantize_folder(tmp_path / "packed", nested=False)
    quantize_folder(tmp_path / "nested", nested=True)
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    forms = [fingerprint(tmp_path / name) for name in ("plain", "packed", "nested", "half", "tiny.gguf")]
    assert all(ours.admits(theirs) for ours in forms for theirs in forms)


@pytest.mark.parametrize(
    ("share", "quantised", "known"), [(0.02, False, False), (1.0, True, False), (0.02, True, True)]
)
def test_another_model_is_told_as_far_as_the_forms_allow(
    share: float, quantised: bool, known: bool, tmp_path: Path
) -> None:
    """Two per cent is what fine-tuning changes: seen between equal storages, hidden by quantisation otherwise."""
    save_tiny(tmp_path / "base")
    other = altered(tmp_path / "other", share)
    if quantised:
        quantize_folder(other, nested=True)
    assert fingerprint(tmp_path / "base").admits(fingerprint(other)) == known


def policy(folder: Path) -> Policy:
    model = Model(name=str(folder), load_in_4bit=False, dtype="float32")
    base = BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=torch.float32)
    return Policy(base, Lora(r=2), base_name=str(folder))


def test_a_saved_adapter_is_refused_by_another_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "base")
    altered(tmp_path / "other", 0.02)
    policy(tmp_path / "base").save_adapter(tmp_path / "adapter")
    policy(tmp_path / "base").load_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match="right shapes, but is not the model that this adapter was trained on"):
        policy(tmp_path / "other").load_adapter(tmp_path / "adapter")
    arguments = [str(tmp_path / "adapter"), "--to", "adapter", "--base"]
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "other"), "--out", str(tmp_path / "wrong")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "is not the model that this adapter was trained on" in message
    assert not (tmp_path / "wrong").exists()
    assert main([*arguments, str(tmp_path / "base"), "--out", str(tmp_path / "right")]) == 0
    assert (tmp_path / "right" / BASE_SAMPLE).read_text() == (tmp_path / "adapter" / BASE_SAMPLE).read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"stored_as": "x"}', '{"stored_as": "x", "values": {"a": "b"}}'])
def test_a_damaged_sample_is_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / BASE_SAMPLE).write_text(content)
    with pytest.raises(UserError, match=f"{BASE_SAMPLE}: damaged"):
        check_base(tmp_path, Fingerprint("float32", {}), "base")


def test_an_adapter_from_elsewhere_passes(tmp_path: Path) -> None:
    check_base(tmp_path, Fingerprint("float32", {}), "base")
