"""An adapter is loaded only as what it is: whatever peft saves gives peft's logprobs here, or a sentence."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from grpo.config.schema import Config, Lora, Model, Task
from grpo.errors import UserError
from grpo.export.compare import streamed_logits
from grpo.export.merge import MergedSource
from grpo.model.adapter_config import HONOURED, REFUSED, WITHOUT_EFFECT, read_adapter_config, takes_from_base
from grpo.model.adapter_layers import adapted_layers, check_selected
from grpo.model.base_weights import BaseWeights
from grpo.model.initial_adapter import ResidualSource
from grpo.model.inventory import account
from grpo.model.source import open_source
from grpo.policy.adapter_files import AdapterFile
from grpo.policy.policy import Policy
from grpo.policy.starting_base import starting_source
from tests.helpers.lora_configs import LORA_CONFIGS
from tests.helpers.tiny import save_tiny, tiny_model

PROMPT, COMPLETION = [5, 9, 33, 7, 21, 64, 90, 11], [8, 15, 99, 4]
FAMILIES = ("llama", "qwen2", "phi3")
MANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "database": None}


@lru_cache
def base_of(family: str) -> tuple[Path, BaseWeights]:
    """A tiny model's folder, and its weights as training holds them."""
    folder = Path(tempfile.mkdtemp())
    save_tiny(folder, family)
    settings = Model(name=str(folder), load_in_4bit=False, dtype="float32")
    return folder, BaseWeights(open_source(settings), settings, device=torch.device("cpu"), dtype=torch.float32)


def base_without_start(family: str, lora: Lora, folder: Path) -> BaseWeights:
    """The weights without what the adapter in `folder` started from."""
    model = Model(name=str(base_of(family)[0]), load_in_4bit=False, dtype="float32")
    config = Config(model=model, lora=lora, task=[Task(name="none")])
    source = starting_source(open_source(model), config, [folder], torch.device("cpu"))
    return BaseWeights(source, model, device=torch.device("cpu"), dtype=torch.float32)


def save_random(family: str, keys: dict[str, Any], folder: Path) -> None:
    """An adapter of random values as peft saves it. Raises whatever peft does where it refuses the configuration."""
    model = get_peft_model(tiny_model(family), LoraConfig(**keys))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.peft_config["default"].base_model_name_or_path = str(base_of(family)[0])
    model.save_pretrained(folder, save_embedding_layers=False)


@torch.no_grad()
def of_peft(family: str, folder: Path) -> torch.Tensor:
    """Logprobs of COMPLETION by peft's own model."""
    model = PeftModel.from_pretrained(tiny_model(family), folder).eval()
    return completion_logprobs(model(torch.tensor([PROMPT + COMPLETION])).logits)


def completion_logprobs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float()[0], -1)[len(PROMPT) - 1 : -1][range(len(COMPLETION)), COMPLETION]


def loaded(family: str, folder: Path) -> Policy:
    """The adapter in `folder` as generate, evaluate and lora.init have it."""
    base, lora = base_of(family)[1], Lora.model_validate(read_adapter_config(folder).table)
    check_selected(base.config, lora, (name.rpartition(".")[0] for name in base.tensors))
    if takes_from_base(lora.init_lora_weights):
        base = base_without_start(family, lora, folder)
    policy = Policy(base, lora, kernels="torch")
    policy.load_adapter(folder)
    return policy


@torch.no_grad()
def of_policy(policy: Policy) -> torch.Tensor:
    return policy.score([PROMPT], [COMPLETION], temperature=1.0).logprobs


def of_export(family: str, folder: Path) -> torch.Tensor:
    """Logprobs by what merged exports are made of."""
    source = open_source(Model(name=str(base_of(family)[0])))
    account(source)
    adapter = AdapterFile(read_adapter_config(folder))
    initial = None
    if takes_from_base(adapter.saved.lora.init_lora_weights):
        initial = ResidualSource(source, adapter.saved.lora, in_16bit=None).read_all()
    merged = MergedSource(source, adapter, initial)
    return completion_logprobs(streamed_logits(merged, torch.tensor([PROMPT + COMPLETION])))


def check_config(family: str, keys: dict[str, Any]) -> None:
    """peft's logprobs in the training graph, in exports and in the adapter saved again; or one sentence."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, again = Path(name) / "adapter", Path(name) / "again"
        try:
            save_random(family, keys, folder)
            theirs = of_peft(family, folder)
        except Exception:
            assume(False)
        try:
            policy = loaded(family, folder)
        except UserError as error:
            sentence = str(error)
            assert "\n" not in sentence and len(sentence) < 700, sentence
            assert "the installed peft" not in sentence, sentence  # would be a fault of adapter_layers.py
            event("a sentence")
            return
        event("equal logprobs")
        policy.save_adapter(again)
        found = {"graph": of_policy(policy), "export": of_export(family, folder), "saved": of_peft(family, again)}
        for where, mine in found.items():
            # The float32 of logprobs near -20 has steps of 2e-6, of which an adapter that large takes many.
            torch.testing.assert_close(mine, theirs, rtol=3e-5, atol=1e-4, msg=where)


DRAWN = st.tuples(st.sampled_from(FAMILIES), LORA_CONFIGS)


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
@pytest.mark.parametrize("whole", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"])
def test_a_whole_name_beside_others_is_meant_whatever_its_layers_number(whole: str, layers: list[int]) -> None:
    targets = ["q_proj", whole, "layers.1.self_attn.v_proj"]
    keys = {"r": 4, "lora_alpha": 8, "target_modules": targets, "layers_to_transform": layers}
    with tempfile.TemporaryDirectory() as name:
        save_random("llama", keys, Path(name))
        lora = Lora.model_validate(read_adapter_config(Path(name)).table)
        assert whole in adapted_layers(base_of("llama")[1].config, lora)
        torch.testing.assert_close(
            of_policy(loaded("llama", Path(name))), of_peft("llama", Path(name)), rtol=3e-5, atol=1e-4
        )


@settings(max_examples=30, derandomize=True, **MANY)
@given(DRAWN)
def test_an_adapter_of_peft_is_what_it_is_for_peft_or_refused(drawn: tuple[str, dict[str, Any]]) -> None:
    check_config(*drawn)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=800, **MANY)
@given(DRAWN)
def test_many_adapters_of_peft_are_what_they_are_for_peft_or_refused(drawn: tuple[str, dict[str, Any]]) -> None:
    check_config(*drawn)


# By example


def test_every_entry_of_peft_is_decided_about() -> None:
    decided = [*HONOURED, *WITHOUT_EFFECT, *REFUSED]
    assert len(set(decided)) == len(decided)
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= set(decided)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as peft saves it."""
    save_random("llama", {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}, tmp_path)
    return tmp_path


def changed(folder: Path, **keys: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        *((key, ["x"], "only plain LoRA is taken; ") for key in REFUSED),
        ("use_dora", True, "have peft merge it into its base (merge_and_unload"),
        ("alora_invocation_tokens", [5], "train a plain LoRA adapter in its place"),
        ("bias", "lora_only", "biases of the base were trained too"),
        ("init_lora_weights", "corda", "have peft convert it to plain LoRA"),
        ("init_lora_weights", "pissa_niter_0", "have peft convert it to plain LoRA"),
        ("task_type", "SEQ_CLS", "another head than CAUSAL_LM"),
        ("peft_type", "LOHA", "only LoRA adapters are taken"),
        ("spectral_gate", 0.5, "this entry of a newer peft is not known here"),
        ("base_model_name_or_path", 3, "must be text"),
        ("target_modules", None, "target_modules is missing"),
        ("target_modules", "(", "is no regular expression"),
        ("target_modules", ["q_proj", 3], "each text in quotes"),
        ("rank_pattern", {"q_proj": "8"}, "must be a table, each value an integer from 1 to 512"),
        ("alpha_pattern", {"*": 8}, "alpha_pattern: '*' is no regular expression"),
        ("layers_pattern", ["h"], "layers_pattern has no use without layers_to_transform"),
        ("r", 0, "must be an integer from 1 to 512"),
        ("lora_alpha", 0, "must be a number above 0"),
    ],
)
def test_what_would_be_another_adapter_is_refused_by_name(key: str, value: Any, said: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_adapter_config(changed(folder, **{key: value}))
    assert str(caught.value).startswith(f"{folder / 'adapter_config.json'}: {key}") and said in str(caught.value)


def test_entries_of_a_newer_peft_that_are_not_used_are_taken(folder: Path) -> None:
    before = read_adapter_config(folder).lora
    after = read_adapter_config(
        changed(folder, new_flag=False, new_config=None, new_list=[], new_table={}, new_text="")
    )
    assert after.lora == before


def test_patterns_act_and_are_saved_again(tmp_path: Path) -> None:
    keys = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [1],
        "rank_pattern": {"v_proj": 7}, "alpha_pattern": {r"layers\.1\.mlp.*": 64}, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    save_random("llama", keys, tmp_path / "peft")
    policy = loaded("llama", tmp_path / "peft")
    layers = {name: (each.r["default"], each.scaling["default"]) for name, each in policy.adapter_layers().items()}
    block = "model.layers.1."
    assert layers == {
        f"{block}self_attn.q_proj": (4, 2.0), f"{block}self_attn.v_proj": (7, 8 / 7), f"{block}mlp.up_proj": (4, 16.0)
    }  # fmt: skip
    policy.save_adapter(tmp_path / "again")
    again, first = read_adapter_config(tmp_path / "again"), read_adapter_config(tmp_path / "peft")
    assert again.table == first.table and again.values["alpha_pattern"] == {r"layers\.1\.mlp.*": 64.0}


@pytest.mark.vllm
def test_vllm_samples_from_an_adapter_of_several_ranks_and_scales(tmp_path: Path) -> None:
    from grpo.rollout.engine import Engine
    from grpo.rollout.types import EngineSettings, Request, SamplingSettings

    keys = {
        "r": 3, "lora_alpha": 6, "target_modules": "all-linear", "exclude_modules": ["k_proj"], "use_rslora": True,
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp.*": 1}, "alpha_pattern": {"v_proj": 40, "0.mlp.up_proj": 9},
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    save_random("llama", keys, tmp_path)
    policy = loaded("llama", tmp_path)
    engine = Engine(policy.base, policy, EngineSettings(max_seq_length=64, max_num_seqs=2))
    try:
        engine.sync_adapter()
        (done,) = engine.generate([Request(0, PROMPT, seed=0)], SamplingSettings(1.0, 8))
    finally:
        engine.close()
    with torch.no_grad():
        mine = policy.score([PROMPT], [done.token_ids], temperature=1.0).logprobs
        with policy.model.disable_adapter():
            without = policy.score([PROMPT], [done.token_ids], temperature=1.0).logprobs
    assert (torch.tensor(done.logprobs) - mine).abs().max() < 1e-4 < (mine - without).abs().max()


@pytest.mark.parametrize(("name", "said"), [
    ("lora_A.weight", "has shape (4, 64), on this base it has (4, 128)"),
    ("lora_magnitude_vector", "which is no A or B of a layer that adapter_config.json selects"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(name: str, said: str, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file, key = folder / "adapter_model.safetensors", f"base_model.model.model.layers.0.self_attn.q_proj.{name}"
    save_file(load_file(file) | {key: torch.zeros(4, 64)}, file)
    with pytest.raises(UserError) as caught:
        loaded("llama", folder)
    assert key in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_tensors_of_a_type_that_needs_scales_are_refused(dtype: torch.dtype, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match="is kept as .*; save the adapter in float32"):
        loaded("llama", folder)
