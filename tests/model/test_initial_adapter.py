"""grpo/model/initial_adapter.py and what stands on it: PiSSA, OLoRA and LoftQ are peft's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft.utils.loftq_utils as peft_loftq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo.config.schema import Lora, Model, parse_config
from grpo.errors import UserError
from grpo.export.build import export
from grpo.export.compare import Distance
from grpo.model.adapter_config import read_adapter_config
from grpo.model.base_weights import BaseWeights
from grpo.model.fingerprint import Fingerprint
from grpo.model.initial_adapter import RECORD, ResidualSource, loftq, read_record
from grpo.model.source import open_source
from grpo.policy.adapted_linears import AdaptedLinears
from grpo.policy.policy import Policy
from grpo.policy.starting_base import starting_source
from grpo.rollout.lora_buffers import RolloutAdapter
from grpo.session import open_session
from tests.helpers.adapters import TOKENS, logits
from tests.helpers.tiny import save_tiny, tiny_model
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, save_tiny_chat_model, write_config

KINDS = ("pissa", "olora", "loftq", "pissa_niter_4")
PROMPTS, COMPLETIONS = [[5, 9, 33, 7]], [[21, 64, 90, 11]]
CPU = torch.device("cpu")


def shape(kind: str, **more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "init_lora_weights": kind, **more}


def opened(
    folder: Path, lora: dict[str, Any], in_4bit: bool, like: list[Path] | None = None, *, in_8bit: bool = False
) -> Policy:
    """The policy on the tiny model in `folder`, as a session has it."""
    storage = {"load_in_4bit": in_4bit, "load_in_8bit": in_8bit}
    config = parse_config(
        {
            "model": {"name": str(folder), **storage, "dtype": "float32", "device": "cpu"},
            "lora": lora,
            "task": {"name": "none"},
        }
    )
    source = starting_source(open_source(config.model), config, like or [], CPU)
    return Policy(BaseWeights(source, config.model, device=CPU, dtype=torch.float32), config.lora)


@torch.no_grad()
def score(policy: Policy) -> torch.Tensor:
    return policy.score(PROMPTS, COMPLETIONS, temperature=1.0).logprobs


@torch.no_grad()
def move(policy: Policy) -> None:
    torch.manual_seed(5)
    for parameter in policy.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tiny")
    save_tiny(found, "llama")
    return found


def pefts(kind: str, **more: Any) -> Any:
    """peft's own model of that kind, fresh."""
    torch.manual_seed(0)
    return get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **shape(kind), **more)
    )


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_base_and_start_are_those_of_peft(kind: str, folder: Path) -> None:
    policy, theirs = opened(folder, shape(kind), in_4bit=False), pefts(kind)
    for name, layer in policy.adapter_layers().items():
        module = theirs.get_base_model().get_submodule(name)
        torch.testing.assert_close(layer.base_layer.dense(), module.base_layer.weight.data, rtol=0, atol=1e-5)
        for mine, factor in zip(layer.initial(), (module.lora_A, module.lora_B), strict=True):
            expected = factor.default.weight.data * (2.0 if factor is module.lora_B else 1.0)
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


def peft_loftq_on_cpu(weight: torch.Tensor, rank: int, iterations: int) -> tuple[torch.Tensor, ...]:
    """peft's function, which asks for a GPU, on the CPU."""
    source = inspect.getsource(peft_loftq.loftq_init).replace('"cuda"', '"cpu"')
    names: dict[str, Any] = dict(vars(peft_loftq))
    exec(source, names)
    return names["loftq_init"](weight, num_bits=4, reduced_rank=rank, num_iter=iterations)


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_loftq_is_pefts_with_the_scale_taken_into_account(iterations: int, scale: float) -> None:
    torch.manual_seed(3)
    weight = torch.randn(96, 128)
    base, a, b = peft_loftq_on_cpu(weight, 8, iterations)
    start, taken = loftq(weight, 8, scale, iterations)
    torch.testing.assert_close(scale * start.b @ start.a, b @ a, rtol=0, atol=1e-5)
    if scale == 1.0:
        torch.testing.assert_close(start.a, a, rtol=0, atol=1e-5)
    from grpo.model.initial_adapter import rounded_to_nf4

    residual = weight if taken is None else weight - scale * taken.b @ taken.a
    torch.testing.assert_close(rounded_to_nf4(residual), base, rtol=0, atol=1e-5)
    plain = (weight - rounded_to_nf4(weight)).norm()
    assert (weight - base - scale * start.b @ start.a).norm() < plain


def error_at_start(policy: Policy, folder: Path) -> float:
    """How far base and start are from the weights of the model in `folder`, relative to these."""
    weights, error, size = load_file(folder / "model.safetensors"), 0.0, 0.0
    for name, layer in policy.adapter_layers().items():
        a, b = layer.initial() or (torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1))
        whole = weights[f"{name}.weight"].float()
        error += float((layer.base_layer.dense() + b @ a - whole).square().sum())
        size += float(whole.square().sum())
    return (error / size) ** 0.5


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_off_is_the_adapter_as_it_started_in_both_graphs(kind: str, bits: int, folder: Path) -> None:
    in_4bit = bits == 4
    if kind == "loftq" and not in_4bit:
        with pytest.raises(UserError, match="no layer with an adapter is held in 4 bits here"):
            opened(folder, shape(kind), in_4bit=False, in_8bit=bits == 8)
        return
    policy = opened(folder, shape(kind), in_4bit=in_4bit, in_8bit=bits == 8)
    start, whole = score(policy), score(opened(folder, {"r": 4}, in_4bit=False))
    assert policy.adapter_is_zero()
    if in_4bit:
        assert error_at_start(policy, folder) < error_at_start(opened(folder, {"r": 4}, in_4bit=True), folder)
    elif bits == 8:
        plain = error_at_start(opened(folder, {"r": 4}, in_4bit=False, in_8bit=True), folder)
        assert 1e-4 < error_at_start(policy, folder) < plain < 0.02, "less is left to be rounded"
    else:
        torch.testing.assert_close(start, whole, rtol=0, atol=1e-4)
    move(policy)
    assert not policy.adapter_is_zero() and (score(policy) - start).abs().max() > 1e-3
    with policy.model.disable_adapter():
        torch.testing.assert_close(score(policy), start, rtol=0, atol=1e-6)
    with policy.reference():
        torch.testing.assert_close(score(policy), start, rtol=0, atol=1e-6)
    served = RolloutAdapter(policy.base, policy)
    served.refresh()
    trained = {name: (each.a.clone(), each.b.clone()) for name, each in served.buffers.items()}
    served.set_enabled(False)
    served.refresh()
    for name, layer in policy.adapter_layers().items():
        fused = next(each for each, linear in policy.base.linears.items() if name in linear.parts)
        a, b = layer.initial()
        first, rows = policy.base.linears[fused].parts[name]
        product = (served.buffers[fused].b @ served.buffers[fused].a)[first : first + rows]
        torch.testing.assert_close(product, b @ a, rtol=0, atol=1e-5)
    served.set_enabled(True)
    assert all(
        each.a.equal(trained[name][0]) and each.b.equal(trained[name][1]) for name, each in served.buffers.items()
    )


@pytest.mark.parametrize("kind", [*KINDS, "loftq of 3"])
def test_a_saved_adapter_brings_its_base_again_bit_for_bit(kind: str, folder: Path, tmp_path: Path) -> None:
    lora = shape(kind.split()[0], **({"loftq_iter": 3} if " " in kind else {}))
    policy = opened(folder, lora, in_4bit=True)
    move(policy)
    policy.save_adapter(tmp_path)
    record = read_record(tmp_path)
    assert record is not None and record.keys() == policy.base.initial.keys()
    assert read_adapter_config(tmp_path).table["init_lora_weights"] == lora["init_lora_weights"]
    again = opened(folder, read_adapter_config(tmp_path).table, in_4bit=True, like=[tmp_path])
    again.load_adapter(tmp_path)
    again.save_adapter(tmp_path)  # over what it was read from
    assert score(again).equal(score(policy))
    for name, linear in policy.base.linears.items():
        assert linear.segments[0].weight.equal(again.base.linears[name].segments[0].weight)
    with again.model.disable_adapter(), policy.model.disable_adapter():
        assert score(again).equal(score(policy))
    assert Fingerprint.of(open_source(Model(name=str(folder)))).admits(policy.base.fingerprint) == (kind == "loftq")


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("kind", ["pissa", "olora", "pissa_niter_4"])
def test_an_export_is_plain_lora_of_twice_the_rank_and_merges_alike(
    kind: str, rank_stabilised: bool, folder: Path, tmp_path: Path
) -> None:
    lora = shape(kind, use_rslora=rank_stabilised, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    policy = opened(folder, lora, in_4bit=False)
    move(policy)
    policy.save_adapter(tmp_path / "adapter")
    (said := []).clear()
    plain = export(tmp_path / "adapter", "adapter", tmp_path / "plain", folder, notice=said.append)
    merged = export(tmp_path / "adapter", "merged-16bit", tmp_path / "merged", folder, notice=said.append)
    assert "plain LoRA of twice its rank" in said[0] and not (plain / RECORD).exists()
    assert read_adapter_config(plain).lora.init_lora_weights is True
    model = PeftModel.from_pretrained(tiny_model("llama"), plain).eval()
    tokens = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    expected = torch.log_softmax(logits(model, tokens)[0], -1)[3:-1][range(4), COMPLETIONS[0]]
    torch.testing.assert_close(score(policy), expected, rtol=0, atol=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert Distance.between(logits(model), logits(whole)).kl < 5e-3
    again = opened(folder, read_adapter_config(plain).table, in_4bit=False)
    again.load_adapter(plain)
    torch.testing.assert_close(score(again), score(policy), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapters_that_peft_trained_so_are_read_as_peft_reads_them(kind: str, folder: Path, tmp_path: Path) -> None:
    theirs = pefts(kind)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    tokens = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    expected = torch.log_softmax(logits(again, tokens)[0], -1)[3:-1][range(4), COMPLETIONS[0]]
    policy = opened(folder, read_adapter_config(tmp_path).table, in_4bit=False, like=[tmp_path])
    policy.load_adapter(tmp_path)
    torch.testing.assert_close(score(policy), expected, rtol=0, atol=1e-4)


def test_what_cannot_be_known_or_does_not_fit_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    lora = shape("pissa_niter_4")
    theirs = pefts("pissa_niter_4")
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="randomised decomposition .* is not recorded; have peft convert it"):
        opened(folder, lora, in_4bit=False, like=[tmp_path / "theirs"])
    with pytest.raises(UserError, match="has no 200 singular values; lower lora.r to 128"):
        opened(folder, shape("olora", r=200), in_4bit=False)
    with pytest.raises(UserError, match="takes a part of it; name the layers"):
        config = {"name": str(folder), "keep_16bit": "auto"}
        whole = parse_config({"model": config, "lora": shape("pissa"), "task": {"name": "none"}})
        starting_source(open_source(whole.model), whole, [], CPU)
    policy = opened(folder, lora, in_4bit=False)
    policy.save_adapter(tmp_path / "ours")
    plain = opened(folder, {"r": 4, "lora_alpha": 8}, in_4bit=False)
    with pytest.raises(UserError, match='set lora.init_lora_weights = "pissa_niter_4"'):
        plain.load_adapter(tmp_path / "ours")
    with pytest.raises(UserError, match="the base is not held without what such an adapter starts from"):
        Policy(plain.base, Lora.model_validate(lora))
    file = tmp_path / "ours" / RECORD
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with open(file, "r+b") as damaged:
        damaged.truncate(100)
    with pytest.raises(UserError, match="initial_adapter.safetensors: damaged .*; copy the adapter again"):
        opened(folder, lora, in_4bit=False, like=[tmp_path / "ours"])
    save_file(tensors, file)
    with pytest.raises(UserError, match="damaged"):
        opened(folder, lora, in_4bit=False, like=[tmp_path / "ours"])


def test_the_kernels_get_the_start_where_adapters_are_disabled(folder: Path) -> None:
    policy = opened(folder, shape("pissa"), in_4bit=False)
    move(policy)
    linear = next(linear for name, linear in policy.base.linears.items() if name.endswith("qkv_proj"))
    layers = [policy.adapter_layers()[part] for part in linear.parts]
    group = AdaptedLinears(linear, layers)
    listed, factors = group.adapters()
    with policy.model.disable_adapter():
        listed_off, factors_off = group.adapters()
        assert not group.drops
    assert listed == listed_off and len(factors_off) == 6
    for place, layer in enumerate(layers):
        assert factors_off[2 * place] is layer.initial_a and factors[2 * place] is layer.lora_A.default.weight


def test_layers_that_stay_in_16_bit_start_from_nothing_under_loftq(folder: Path) -> None:
    config = parse_config(
        {
            "model": {"name": str(folder), "dtype": "float32", "device": "cpu", "keep_16bit": ["o_proj"]},
            "lora": shape("loftq"),
            "task": {"name": "none"},
        }
    )
    source = starting_source(open_source(config.model), config, [], CPU)
    assert isinstance(source, ResidualSource)
    policy = Policy(BaseWeights(source, config.model, device=CPU, dtype=torch.float32), config.lora)
    for name, layer in policy.adapter_layers().items():
        assert (layer.initial() is None) == name.endswith("o_proj")
        assert bool(layer.lora_B.default.weight.any()) != name.endswith("o_proj")
    assert policy.adapter_is_zero()
    RolloutAdapter(policy.base, policy).refresh()


@pytest.mark.vllm
def test_a_session_samples_the_start_where_the_adapter_is_off(folder: Path, tmp_path: Path) -> None:
    """Real vLLM: its logprobs with the adapter off are the training graph's, before and after it moved."""
    from grpo.rollout.types import Request, SamplingSettings
    from tests.helpers.small_chat import TOKENS as BYTES
    from tests.helpers.small_chat import save_small_chat_model

    assert TOKENS.max() < len(BYTES)
    save_small_chat_model(tmp_path)
    tables = {"model": {"name": str(tmp_path), "dtype": "float32", "device": "cpu"}, "lora": shape("pissa")}
    rollout = {"max_prompt_length": 16, "max_completion_length": 8}
    with open_session(parse_config({**tables, "task": {"name": "none"}, "rollout": rollout})) as session:
        move(session.policy)
        session.engine.sync_adapter()
        sampling = SamplingSettings(temperature=1.0, max_tokens=4, stop_token_ids=())
        found = {}
        for adapter in (True, False, True):
            (done,) = session.engine.generate([Request(0, PROMPTS[0], seed=1)], sampling, adapter=adapter)
            found[adapter] = done
            expected = session.policy.score
            with torch.no_grad():
                if adapter:
                    mine = expected(PROMPTS, [done.token_ids], temperature=1.0).logprobs
                else:
                    with session.policy.model.disable_adapter():
                        mine = expected(PROMPTS, [done.token_ids], temperature=1.0).logprobs
            torch.testing.assert_close(torch.tensor(done.logprobs), mine, rtol=0, atol=1e-4)
        assert found[True].logprobs != found[False].logprobs


@pytest.mark.vllm
def test_a_run_starts_at_its_reference_resumes_to_the_same_bits_and_is_exported(tmp_path: Path) -> None:
    from grpo.train import main

    save_tiny_chat_model(tmp_path / "model")
    save_rewards(tmp_path)
    tables = run_tables(
        tmp_path,
        model={"load_in_4bit": True},
        lora={"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"},
        loss={"beta": 0.1},
        train={"learning_rate": 1e-2, "max_steps": 2},
        checkpoint={"output_dir": str(tmp_path / "whole"), "save_steps": 1},
    )
    assert main([str(write_config(tmp_path / "run.toml", tables))]) == 0
    steps = read_metrics(tmp_path / "whole")
    assert steps[0]["kl"] < 1e-6 < steps[1]["kl"] and max(step["mismatch_kl"] for step in steps) < 1e-3
    cut = [str(tmp_path / "run.toml"), "--output", str(tmp_path / "cut"), "--set", "train.max_steps=1"]
    assert main(cut) == 0
    assert main(["--resume", str(tmp_path / "cut"), "--set", "train.max_steps=2"]) == 0
    weights = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "cut")]
    assert all(weights[1][name].equal(tensor) for name, tensor in weights[0].items())
    assert main(["--resume", str(tmp_path / "cut"), "--set", 'lora.init_lora_weights="olora"']) == 2
    said: list[str] = []
    plain = export(tmp_path / "whole", "adapter", tmp_path / "plain", notice=said.append)
    assert "twice its rank" in said[0] and read_adapter_config(plain).lora.r == 8
    export(tmp_path / "whole", "merged-16bit", tmp_path / "merged", notice=said.append)
    assert any("compared with base + adapter" in sentence for sentence in said)
