"""`keep_16bit = "auto"`: the cost of rounding a layer, the choice within its memory, and that a choice is kept."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from grpo.config.schema import Lora, Model, parse_config
from grpo.data import load_data
from grpo.errors import UserError
from grpo.kernels import nf4
from grpo.memory.plan import weight_bytes
from grpo.model import fingerprint
from grpo.model.base_weights import BaseWeights
from grpo.model.sizes import AUTO_SHARE, linear_shapes, nf4_bytes
from grpo.model.source import open_source
from grpo.monitor.run_log import RunLog
from grpo.policy import keep_16bit
from grpo.policy.keep_16bit import choose, load_base, rounding_costs
from grpo.policy.policy import Policy
from grpo.run.model_reference import resolve_model
from grpo.session import open_session
from grpo.sft.config import parse_sft_config
from grpo.sft.trainer import run_sft
from grpo.training.run import launch, train_session
from tests.helpers.checkpoints import quantize_folder
from tests.helpers.tiny import VOCABULARY, save_tiny
from tests.helpers.tiny_run import run_tables, save_rewards, save_tiny_chat_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for what is tested here, and quick."""
    monkeypatch.setattr(keep_16bit, "TEXTS", keep_16bit.TEXTS[:2])


class Tokenizer:
    """Bytes, as far as a tiny model knows as many tokens."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [byte % VOCABULARY for byte in text.encode()][:40]}


def sequences(count: int, length: int = 24) -> list[list[int]]:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(5)).tolist()


def nf4_base(folder: Path, keep: list[str] | None = None) -> BaseWeights:
    model = Model(name=str(folder), keep_16bit=keep or [])
    return BaseWeights(open_source(model), model, device=CPU, dtype=torch.float32)


def auto_base(folder: Path, **arguments: Any) -> BaseWeights:
    model = Model(name=str(folder), keep_16bit="auto")
    return load_base(open_source(model), model, Tokenizer(), device=CPU, dtype=torch.float32, **arguments)


@torch.no_grad()
def logits(policy: Policy, tokens: list[int]) -> Tensor:
    with policy.reference():
        return policy.decoder(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double()


def divergence(exact: list[Tensor], other: list[Tensor]) -> float:
    """KL in nats, summed over tokens, from lists of log-probabilities [tokens, vocabulary]."""
    return sum(float((p.exp() * (p - q)).sum()) for p, q in zip(exact, other, strict=True))


# The estimate


def weight_of(base: BaseWeights, part: str) -> Tensor:
    return next(linear.part(part)[0].weight for linear in base.linears.values() if part in linear.parts)


def quadratic_form(policy: Policy, part: str, change: Tensor, texts: list[list[int]]) -> float:
    """1/2 sum over tokens of u' F u, where u is how the logits move along `change` (a central difference) and F is the
    Fisher matrix of a softmax, diag(p) - p p'."""
    weight, total, step = weight_of(policy.base, part), 0.0, 0.02
    for tokens in texts:
        probabilities = logits(policy, tokens).softmax(-1)
        weight += step * change
        ahead = logits(policy, tokens)
        weight -= 2 * step * change
        moved = (ahead - logits(policy, tokens)) / (2 * step)
        weight += step * change
        mean = (probabilities * moved).sum(-1, keepdim=True)
        total += float((probabilities * (moved - mean) ** 2).sum()) / 2
    return total


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_cost_of_a_layer_is_the_fisher_quadratic_form_along_its_rounding(family: str, tmp_path: Path) -> None:
    """With softcaps, sliding windows, and fused modules. Two texts and 100 draws leave some 10 % of chance."""
    state = save_tiny(tmp_path, family).state_dict()
    base, texts = nf4_base(tmp_path), sequences(2)
    costs = rounding_costs(open_source(Model(name=str(tmp_path))), base, texts, labels=100)
    assert set(costs) == set(linear_shapes(base.config))
    policy = Policy(base, Lora(r=1))
    for part, cost in costs.items():
        change = state[f"{part}.weight"] - weight_of(base, part)
        assert cost == pytest.approx(quadratic_form(policy, part, change, texts), rel=0.5), part


def test_costs_order_layers_as_measured_divergence_does(tmp_path: Path) -> None:
    """Each layer in turn is put back in 16 bit; the measured divergence of that from the NF4 model's distributions."""
    state = save_tiny(tmp_path, "llama").state_dict()
    texts, base = sequences(4), nf4_base(tmp_path)
    costs = rounding_costs(open_source(Model(name=str(tmp_path))), base, texts, labels=32)
    policy = Policy(base, Lora(r=1))
    before = [logits(policy, tokens).log_softmax(-1) for tokens in texts]
    measured = {}
    for part in costs:
        weight = weight_of(base, part)
        rounded = weight.clone()
        weight.copy_(state[f"{part}.weight"])
        after = [logits(policy, tokens).log_softmax(-1) for tokens in texts]
        weight.copy_(rounded)
        measured[part] = divergence(before, after)
    ranks = torch.tensor([[sorted(of.values()).index(of[part]) for part in costs] for of in (costs, measured)])
    assert torch.corrcoef(ranks.double())[0, 1] > 0.9


def test_a_layer_that_the_checkpoint_holds_in_nf4_costs_nothing(tmp_path: Path) -> None:
    state = save_tiny(tmp_path, "llama").state_dict()
    name = "model.layers.1.mlp.down_proj"
    weight = state[f"{name}.weight"]
    rounded = nf4.dequantize_bitsandbytes(*nf4.quantize(weight), tuple(weight.shape), torch.float32)
    save_file({**{key: value.contiguous() for key, value in state.items()}, f"{name}.weight": rounded},
              tmp_path / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    costs = rounding_costs(open_source(Model(name=str(tmp_path))), nf4_base(tmp_path), sequences(2))
    assert costs.pop(name) < 1e-9 < 1e-3 < min(costs.values())


# The choice


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_a_choice_stays_within_its_memory_and_within_the_plan(family: str) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 12, "num_attention_heads": 4,
             "num_key_value_heads": 2}  # fmt: skip
    shape = AutoConfig.for_model(family, **sizes, vocab_size=1024)
    shapes = linear_shapes(shape)
    extra = {part: 2 * rows * columns - nf4_bytes(rows, columns, 2) for part, (rows, columns) in shapes.items()}
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = {part: float(torch.rand((), generator=draw)) ** 3 for part in shapes}
        kept = choose(costs, shape, 2)
        taken, allowed = sum(extra[part] for part in kept), AUTO_SHARE * sum(extra.values())
        assert 0 < taken <= allowed
        assert all(taken + extra[part] > allowed for part in set(shapes) - set(kept)), "room is left for another"
        table: dict[str, Any] = {"model": {"name": "x"}, "task": {"name": "arithmetic"}}
        planned = parse_config({**table, "model": {"name": "x", "keep_16bit": "auto"}})
        named = parse_config({**table, "model": {"name": "x", "keep_16bit": kept}})
        assert weight_bytes(planned, shape, 2, on_gpu=True) >= weight_bytes(named, shape, 2, on_gpu=True)


def test_the_choice_goes_by_cost_for_its_memory_not_by_cost() -> None:
    shape = AutoConfig.for_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=8,
                                 num_attention_heads=4, num_key_value_heads=1, vocab_size=512)  # fmt: skip
    costs = {part: 1.0 if part.endswith(("k_proj", "v_proj")) else 1.2 for part in linear_shapes(shape)}
    costs["model.layers.3.self_attn.o_proj"] = 9.0
    kept = choose(costs, shape, 2)
    assert "model.layers.3.self_attn.o_proj" in kept
    assert {name.rpartition(".")[2] for name in kept} == {"o_proj", "k_proj", "v_proj"}
    assert choose(dict.fromkeys(costs, 0.0), shape, 2) == []


def plant(folder: Path) -> list[str]:
    """A model in which the attention of one layer decides much, and NF4 changes other layers' weights more; the names
    of the latter, as many as there is memory for."""
    state = save_tiny(folder, "llama", num_hidden_layers=4).state_dict()
    state["model.layers.1.self_attn.o_proj.weight"] *= 6
    for layer in (0, 2):  # one outlier in every block, beside which the other weights are lost
        weight = state[f"model.layers.{layer}.self_attn.k_proj.weight"]
        weight *= 0.05
        weight[:, ::64] *= 20
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return [f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 2)]


def weight_error(folder: Path, part: str) -> float:
    weight = load_file(folder / "model.safetensors")[f"{part}.weight"]
    rounded = nf4.dequantize_bitsandbytes(*nf4.quantize(weight), tuple(weight.shape), torch.float32)
    return float((rounded - weight).norm() / weight.norm())


def test_a_choice_by_the_output_loses_less_than_none_and_than_one_by_weight_error(tmp_path: Path) -> None:
    by_error = plant(tmp_path)
    base = auto_base(tmp_path)
    shapes = linear_shapes(base.config)
    assert set(sorted(shapes, key=lambda part: weight_error(tmp_path, part))[-len(by_error) :]) == set(by_error)
    assert "model.layers.1.self_attn.v_proj" in base.kept_16bit
    memory = [sum(shapes[part][0] * shapes[part][1] for part in kept) for kept in (base.kept_16bit, by_error)]
    assert memory[0] <= memory[1]
    model = Model(name=str(tmp_path), load_in_4bit=False)
    whole = BaseWeights(open_source(model), model, device=CPU, dtype=torch.float32)
    forms = {"exact": whole, "nf4": nf4_base(tmp_path), "error": nf4_base(tmp_path, by_error), "auto": base}
    texts, made = sequences(8, 32), {}
    for name, form in forms.items():
        policy = Policy(form, Lora(r=1))
        made[name] = [logits(policy, tokens).log_softmax(-1) for tokens in texts]
    lost = {name: divergence(made["exact"], made[name]) for name in ("nf4", "error", "auto")}
    assert lost["auto"] < 0.9 * min(lost["nf4"], lost["error"]), lost


def test_chosen_layers_are_exact_and_the_others_rounded(tmp_path: Path) -> None:
    state = save_tiny(tmp_path, "llama", num_hidden_layers=4).state_dict()
    base, rounded = auto_base(tmp_path), nf4_base(tmp_path)
    assert base.kept_16bit and base.kept_16bit == base.fingerprint.kept_16bit
    assert nf4_base(tmp_path, base.kept_16bit).nbytes() == base.nbytes()
    for name, linear in base.linears.items():
        for part in linear.parts:
            expected = (
                state[f"{part}.weight"] if part in base.kept_16bit else rounded.linears[name].part(part)[0].weight
            )
            assert linear.part(part)[0].weight.equal(expected), part


class Packed(BaseWeights):
    """Held on a CPU as a GPU holds it: codes and scales."""

    packed = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]


def test_a_base_of_codes_costs_the_same_and_takes_chosen_layers_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = save_tiny(tmp_path, "llama", num_hidden_layers=4).state_dict()
    source, texts = open_source(Model(name=str(tmp_path))), sequences(2)
    expected, chosen = rounding_costs(source, nf4_base(tmp_path), texts), auto_base(tmp_path).kept_16bit
    monkeypatch.setattr(keep_16bit, "BaseWeights", Packed)
    base = Packed(source, Model(name=str(tmp_path)), device=CPU, dtype=torch.float32)
    assert base.linears["model.layers.0.mlp.down_proj"].segments[0].absmax is not None
    assert rounding_costs(source, base, texts) == pytest.approx(expected, rel=1e-3)
    base = auto_base(tmp_path)
    assert base.kept_16bit == chosen
    for linear in base.linears.values():
        for part in linear.parts:
            rows, _ = linear.part(part)
            assert (rows.absmax is None) == (part in chosen)
            assert rows.absmax is not None or rows.weight.equal(state[f"{part}.weight"])


@pytest.mark.gpu
def test_on_a_gpu_costs_are_those_on_a_cpu(tmp_path: Path) -> None:
    """Other draws, and bfloat16."""
    save_tiny(tmp_path, "llama")
    model, texts = Model(name=str(tmp_path)), sequences(2)
    source, device = open_source(model), torch.device("cuda")
    expected = rounding_costs(source, nf4_base(tmp_path), texts, labels=100)
    base = BaseWeights(source, model, device=device, dtype=torch.bfloat16)
    assert rounding_costs(source, base, texts, labels=100) == pytest.approx(expected, rel=0.5)
    auto = Model(name=str(tmp_path), keep_16bit="auto")
    base = load_base(source, auto, Tokenizer(), device=device, dtype=torch.bfloat16)
    dense = {part for linear in base.linears.values() for part in linear.parts if linear.part(part)[0].absmax is None}
    assert base.kept_16bit and dense == set(base.kept_16bit)


def test_a_four_bit_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    quantize_folder(tmp_path, nested=False)
    with pytest.raises(UserError, match='keep_16bit = "auto" needs an unquantised checkpoint'):
        auto_base(tmp_path)


# That it is kept


def refuse(reason: str) -> None:
    raise UserError(reason)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*arguments: Any) -> list[str]:
        raise AssertionError("chosen anew")

    monkeypatch.setattr(keep_16bit, "choose", chosen)


def test_the_first_process_decides_for_all(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    theirs = ["model.layers.1.self_attn.k_proj"]
    asked: list[Any] = []

    def broadcast(value: Any) -> Any:
        asked.append(value)
        return None if len(asked) == 1 else theirs

    base = auto_base(tmp_path, agree=broadcast)
    assert asked[0] is None and asked[1] and base.kept_16bit == theirs == base.fingerprint.kept_16bit
    assert auto_base(tmp_path, agree=lambda value: theirs).kept_16bit == theirs, "a record that only the first has"


def test_an_adapter_a_further_training_and_a_resumed_run_find_the_choice_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_chat_model(tmp_path / "model")
    save_rewards(tmp_path)
    auto = {"load_in_4bit": True, "keep_16bit": "auto"}
    config = parse_config(run_tables(tmp_path, model=auto))
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("grpo.training.run.check_start", lambda session: refuse("far enough"))
    with open_session(config, start_engine=False) as session:
        chosen = session.base.kept_16bit
        session.policy.save_adapter(tmp_path / "adapter")
        data = load_data(config, session.tokenizer)
        with RunLog(tmp_path / "run", config, max_steps=1) as log, pytest.raises(UserError, match="far enough"):
            train_session(session, data, tmp_path / "run", log)
    assert chosen
    alone = resolve_model(tmp_path / "adapter", tmp_path / "model")
    assert alone.tables["model"]["keep_16bit"] == chosen
    forbid(monkeypatch)
    init = parse_config(run_tables(tmp_path, model=auto, lora={"init": str(tmp_path / "adapter")}))
    ways: list[tuple[Any, dict[str, Any]]] = [
        (config, {"adapter": tmp_path / "adapter"}), (init, {}), (config, {"resumed": tmp_path / "run"}),
    ]  # fmt: skip
    for settings, arguments in ways:
        with open_session(settings, start_engine=False, **arguments) as session:
            assert session.base.kept_16bit == chosen == session.base.fingerprint.kept_16bit
    with pytest.raises(AssertionError, match="chosen anew"):
        open_session(config, start_engine=False)
    sample = tmp_path / "adapter" / "base_sample.json"
    sample.write_text(json.dumps({**json.loads(sample.read_text()), "kept_16bit": 5}))
    with pytest.raises(UserError, match="base_sample.json: damaged"):
        open_session(config, adapter=tmp_path / "adapter", start_engine=False)


def test_a_resumed_run_has_its_base_held_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_chat_model(tmp_path / "model")
    save_rewards(tmp_path)
    asked = []

    def opened(*arguments: Any, **keys: Any) -> Any:
        asked.append((keys["resumed"], keys["agree"](3)))
        raise UserError("far enough")

    monkeypatch.setattr("grpo.training.run.open_session", opened)
    for name in ("open_run", "start_rewards"):
        monkeypatch.setattr(f"grpo.training.run.{name}", lambda *arguments, **keys: contextlib.nullcontext())
    config = parse_config(run_tables(tmp_path, model={"load_in_4bit": True, "keep_16bit": "auto"}))
    (tmp_path / "run").mkdir()
    for resume in (False, True):
        with pytest.raises(UserError, match="far enough"):
            launch(config, resume=resume)
    assert asked == [(None, 3), (tmp_path / "run", 3)]


def test_a_supervised_run_resumes_with_the_choice_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_chat_model(tmp_path / "model")
    rows = [{"prompt": f"Say {number}", "completion": f"{number}!"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ("model", "lora", "checkpoint")
    given = run_tables(tmp_path, model={"load_in_4bit": True, "keep_16bit": "auto"}, checkpoint={"save_steps": 1})
    tables = {name: given[name] for name in shared}
    tables["sft"] = {"path": str(tmp_path / "rows.jsonl"), "max_length": 64, "per_device_train_batch_size": 1}
    run_sft(parse_sft_config({**tables, "train": {"max_steps": 1}}))
    recorded = fingerprint.read(tmp_path / "run")
    assert recorded is not None and recorded.kept_16bit
    assert fingerprint.read(tmp_path / "run" / "adapter") == recorded
    forbid(monkeypatch)
    run_sft(parse_sft_config({**tables, "train": {"max_steps": 2}}), resume=True)
    assert fingerprint.read(tmp_path / "run" / "adapter") == recorded
