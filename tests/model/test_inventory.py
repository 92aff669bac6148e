"""grpo.model.inventory.py: a checkpoint is read as transformers reads it, every tensor accounted for, or refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.export.compare import streamed_logits
from grpo.model.base_weights import BaseWeights
from grpo.model.inventory import account
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.checkpoints import edit_tensors, quantize_folder, write_gguf
from tests.helpers.mutated_checkpoints import MUTATIONS, Change, save_mutated
from tests.helpers.tiny import save_tiny, tiny_model

PROMPT, COMPLETION = [5, 9, 33, 7, 21, 64, 90, 11], [8, 15, 99, 4]
MANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "database": None}


def load(path: Path, **keys: Any) -> Policy:
    model = Model(name=str(path), **{"load_in_4bit": False, "dtype": "float32", **keys})
    base = BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=torch.float32)
    return Policy(base, Lora(r=2), kernels="torch")


def logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.score([PROMPT], [COMPLETION], temperature=1.0).logprobs


def of_logits(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float()[0], -1)[len(PROMPT) - 1 : -1][range(len(COMPLETION)), COMPLETION]


def transformers_logprobs(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return of_logits(model(torch.tensor([PROMPT + COMPLETION])).logits)


def check_mutation(family: str, changes: list[Change], layout: str) -> None:
    """Equal logprobs in the training graph and in what exports are made of, or one sentence."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_mutated(folder, family, changes, layout)
        try:
            mine = logprobs(load(folder))
        except UserError as error:
            sentence = str(error)
            assert sentence.startswith(str(folder)) and "\n" not in sentence and len(sentence) < 500, sentence
            event("a sentence")
            return
        event("equal logprobs")
        theirs = transformers_logprobs(folder)
        assert (mine - theirs).abs().max() < 1e-4
        source = open_source(Model(name=str(folder)))
        account(source)
        merged = streamed_logits(source, torch.tensor([PROMPT + COMPLETION]))
        assert (of_logits(merged) - theirs).abs().max() < 1e-4


@settings(max_examples=60, derandomize=True, **MANY)
@given(MUTATIONS)
def test_a_checkpoint_is_read_as_transformers_reads_it_or_refused(drawn: tuple[str, list[Change], str]) -> None:
    check_mutation(*drawn)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=1500, **MANY)
@given(MUTATIONS)
def test_many_checkpoints_are_read_as_transformers_reads_them_or_refused(
    drawn: tuple[str, list[Change], str],
) -> None:
    check_mutation(*drawn)


# By example


def read(path: Path) -> list[str]:
    """The notices with which the model at `path` is accounted for."""
    return account(open_source(Model(name=str(path))))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    return str(caught.value)


def test_fp8_without_scales_is_refused_by_name(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = load_file(tmp_path / "model.safetensors")[name]
    edit_tensors(tmp_path, **{name.replace(".", "__"): (weight * 100).to(torch.float8_e4m3fn)})
    message = refusal(tmp_path)
    assert f"model.safetensors: {name} is kept as F8_E4M3, without the scales of a form that is read" in message


def test_known_extras_are_named_once(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    plain = logprobs(load(tmp_path))
    surplus = ("model__rotary_emb__inv_freq", "vision_tower__a__weight", "vision_tower__b__weight", "mtp__fc__weight")
    edit_tensors(tmp_path, **{name: torch.ones(2) for name in surplus})
    source = open_source(Model(name=str(tmp_path)))
    message = account(source)
    assert len(message) == 3
    assert any("not used: vision_tower.a.weight and 1 more, a part for images or sound" in each for each in message)
    assert account(source) == [] and not any(name.startswith(("vision", "mtp")) for name in source.names)
    assert logprobs(load(tmp_path)).equal(plain)


def test_a_head_that_is_not_the_embedding_is_kept_with_a_notice(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "qwen2", tie_word_embeddings=True)
    head = reference.get_input_embeddings().weight.detach().flip(0).contiguous()
    edit_tensors(tmp_path, lm_head__weight=head)
    (message,) = read(tmp_path)
    assert "lm_head.weight has other values; the two are kept apart" in message
    assert (logprobs(load(tmp_path)) - transformers_logprobs(tmp_path)).abs().max() < 1e-4
    edit_tensors(tmp_path, lm_head__weight=reference.get_input_embeddings().weight.detach().clone())
    source = open_source(Model(name=str(tmp_path)))
    assert account(source) == [] and source.config.tie_word_embeddings and "lm_head.weight" not in source.names


@pytest.mark.vllm
def test_vllm_and_exports_keep_such_a_head(tmp_path: Path) -> None:
    from grpo.export.hf_folder import write_16bit
    from grpo.export.merge import MergedSource
    from grpo.rollout.engine import Engine
    from grpo.rollout.types import EngineSettings, Request, SamplingSettings

    reference = save_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    head = reference.get_input_embeddings().weight.detach().flip(0).contiguous()
    edit_tensors(tmp_path / "model", lm_head__weight=head)
    policy = load(tmp_path / "model")
    engine = Engine(policy.base, policy, EngineSettings(max_seq_length=64, max_num_seqs=2))
    try:
        (done,) = engine.generate([Request(0, PROMPT, seed=0)], SamplingSettings(1.0, 8))
    finally:
        engine.close()
    with torch.no_grad():
        mine = policy.score([PROMPT], [done.token_ids], temperature=1.0).logprobs
    assert (torch.tensor(done.logprobs) - mine).abs().max() < 1e-4
    source = open_source(Model(name=str(tmp_path / "model")))
    account(source)
    (tmp_path / "written").mkdir()
    write_16bit(MergedSource(source, None), tmp_path / "written", None)
    assert json.loads((tmp_path / "written" / "config.json").read_text())["tie_word_embeddings"] is False
    assert load_file(tmp_path / "written" / "model.safetensors")["lm_head.weight"].equal(head.bfloat16())


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_a_head_that_vllm_would_replace_by_the_embedding_is_refused(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    edit_tensors(tmp_path, lm_head__weight=torch.randn(160, 128))
    assert "lm_head.weight differs from model.embed_tokens.weight, and vLLM's Gemma" in refusal(tmp_path)


def test_biases_that_the_configuration_does_not_give_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    edit_tensors(tmp_path, model__layers__0__self_attn__o_proj__bias=torch.ones(128))
    assert "tensor model.layers.0.self_attn.o_proj.bias has no use in transformers' Llama" in refusal(tmp_path)


def test_the_whole_file_counts_before_the_index(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    names = load_file(tmp_path / "model.safetensors")
    other = {name: tensor * 2 for name, tensor in names.items()}
    save_file(other, tmp_path / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (message,) = read(tmp_path)
    assert "those of model.safetensors, as for transformers; not read: model-00001-of-00001.safetensors" in message
    assert (logprobs(load(tmp_path)) - transformers_logprobs(tmp_path)).abs().max() < 1e-4


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="150KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    doubled = next(iter(load_file(first)))
    save_file(load_file(second) | {doubled: load_file(first)[doubled]}, second)
    assert f"{second}: holds {doubled}, and so does {first.name}" in refusal(tmp_path)


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, norm = data[8 : 8 + size].rstrip(), json.loads(data[8 : 8 + size])["model.norm.weight"]
    header = header[:-1] + b',"model.norm.weight":' + json.dumps(norm).encode() + b"}"
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    assert f"{file}: damaged safetensors" in refusal(tmp_path) and "model.norm.weight" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["q_proj.weight.extra", "q_proj.weight_scale", "q_proj.SCB", "q_proj.weight.quant_state"]
)
def test_entries_that_bitsandbytes_nf4_has_not_are_refused(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    quantize_folder(tmp_path, nested=True)
    assert read(tmp_path) == []
    edit_tensors(tmp_path, **{f"model.layers.0.self_attn.{name}": torch.ones(2)})
    assert f"tensor model.layers.0.self_attn.{name} has no use" in refusal(tmp_path)


@pytest.mark.parametrize(("entry", "said"), [("quant_map", "is not that of NF4"), ("absmax", "is missing")])
def test_bitsandbytes_entries_that_give_codes_another_meaning_are_refused(
    entry: str, said: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, "llama")
    quantize_folder(tmp_path, nested=False)
    name = f"model.layers.1.mlp.up_proj.weight.{entry}"
    edit_tensors(tmp_path, **{name: torch.linspace(-1, 1, 16) if entry == "quant_map" else None})
    assert f"{name} {said}" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["qweight", "weight_packed", "base_layer.weight"])
def test_a_weight_that_is_there_in_another_form_is_named(kind: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    layer = "model.layers.1.self_attn.q_proj"
    edit_tensors(tmp_path, **{f"{layer}.weight": None, f"{layer}.{kind}": torch.zeros(16, 8, dtype=torch.int32)})
    assert f"{layer}.weight is missing (there is {layer}.{kind}, and only plain" in refusal(tmp_path)


def test_an_adapter_that_transformers_would_put_on_the_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds a model and, by adapter_config.json, an adapter on it" in refusal(tmp_path)


def test_codes_that_bitsandbytes_keeps_under_another_type_are_read(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    quantize_folder(tmp_path, nested=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    before = open_source(Model(name=str(tmp_path))).read(name)
    codes = load_file(tmp_path / "model.safetensors")[name]
    edit_tensors(tmp_path, **{name: codes.reshape(-1).view(torch.bfloat16).reshape(-1, 1)})
    assert open_source(Model(name=str(tmp_path))).read(name).codes.equal(before.codes)


def test_what_a_gguf_file_has_beyond_its_model_is_accounted_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, said in (
        ("blk.0.attn_q.scale", "tensor blk.0.attn_q.scale has no use"),
        ("blk.0.attn_q_norm.weight", "tensor blk.0.attn_q_norm.weight has no use"),
        ("v.patch_embd.weight", None),
        ("blk.1.nextn.eh_proj.weight", None),
    ):
        file = tmp_path / f"{name}.gguf"
        write_gguf(file, tiny_model("llama"), {name: torch.ones(32)})
        if said is None:
            (message,) = read(file)
            assert f"not used: {name}" in message
        else:
            assert said in refusal(file)


def test_a_gguf_file_with_a_tensor_of_integers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_model("llama")
    model.model.norm.weight = torch.nn.Parameter(torch.ones(128, dtype=torch.int32), requires_grad=False)
    write_gguf(tmp_path / "tiny.gguf", model)
    assert "model.norm.weight is kept as I32, which the gguf package does not read" in refusal(tmp_path / "tiny.gguf")
