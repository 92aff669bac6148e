"""grpo/training/self_check.py: a run begins only when vLLM serves the adapter that is trained, whatever modules that is
on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo.config.schema import parse_config
from grpo.errors import UserError
from grpo.session import open_session
from grpo.training.self_check import check_start
from tests.helpers.real_weights import save_first_layers
from tests.helpers.tiny_run import SMOLLM2

pytestmark = pytest.mark.vllm

TARGETS = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"], ["o_proj"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Real weights, whose logprobs an adapter moves as little as those of a model that somebody trains."""
    return str(save_first_layers(tmp_path_factory.mktemp("layers"), 6))


def session_of(model, targets, dtype, *, rank=8, device="cpu", four_bit=True, sequences=4):
    values = {
        "model": {"name": model, "max_seq_length": 64, "dtype": dtype, "device": device, "load_in_4bit": four_bit},
        "lora": {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets},
        "task": {"name": "arithmetic"},
        "rollout": {"max_num_seqs": sequences, "max_prompt_length": 32, "max_completion_length": 16},
    }
    return open_session(parse_config(values))


def adapter(session):
    return [parameter.detach().clone() for parameter in session.policy.parameters()]


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_an_adapter_on_any_subset_of_modules_passes_and_is_left_as_it_was(targets, model):
    with session_of(model, targets, "bfloat16") as session:
        before = adapter(session)
        check_start(session)
        assert all(torch.equal(one, other) for one, other in zip(adapter(session), before, strict=True))


def test_an_adapter_that_generation_does_not_get_is_a_sentence(model, monkeypatch):
    with session_of(model, ["q_proj", "v_proj"], "float32") as session:
        monkeypatch.setattr(session.engine, "sync_adapter", lambda: None)
        with pytest.raises(UserError, match="generation shows .* another adapter"):
            check_start(session)


def test_a_rollout_with_other_weights_is_a_sentence(model):
    with session_of(model, ["q_proj"], "float32", four_bit=False) as session:
        norm = session.base.tensors["model.norm.weight"]
        graph = session.policy.decoder.model.norm
        graph.weight = torch.nn.Parameter(norm * 1.1, requires_grad=False)
        with pytest.raises(UserError, match="vLLM's logprobs differ from the training graph's by"):
            check_start(session)


@pytest.mark.parametrize("compared", [1, 40])
def test_a_product_that_is_wrong_with_many_rows_alone_is_found_where_the_batch_is_compared(
    compared, model, monkeypatch
):
    """As a tile that the compiler makes a wrong product of; steps with a prompt have more rows than it is used for."""
    from grpo.rollout import vllm_model

    right = vllm_model.segment_linear

    def wrong(x, segment, bias, out, low_rank):
        right(x, segment, bias, out, low_rank)
        if 32 < len(x) <= 40:
            out.mul_(-1)

    monkeypatch.setattr(vllm_model, "segment_linear", wrong)
    with session_of(model, ["q_proj", "v_proj"], "bfloat16", sequences=40) as session:
        assert session.engine.compared_batch == 1, "on a CPU kernels do not follow the rows"
        monkeypatch.setattr(type(session.engine), "compared_batch", compared)
        if compared == 1:
            check_start(session)
            return
        with pytest.raises(UserError, match="vLLM's logprobs differ from the training graph's by"):
            check_start(session)


def test_nothing_is_scored_while_the_cache_has_memory_that_a_step_would_not_leave_it(model, monkeypatch):
    with session_of(model, ["q_proj", "v_proj"], "bfloat16") as session:
        engine, policy, events = session.engine, session.policy, []
        begin, release, score = engine.begin, engine.release_kv_cache, policy.score

        def noted(event, function):
            return lambda *arguments, **options: (events.append(event), function(*arguments, **options))[1]

        monkeypatch.setattr(engine, "begin", noted("cache", begin))
        monkeypatch.setattr(engine, "release_kv_cache", noted("released", release))
        monkeypatch.setattr(policy, "score", noted("score", score))
        check_start(session)
        before = [events[:place][::-1] for place, event in enumerate(events) if event == "score"]
        assert before and all(next(one for one in past if one != "score") == "released" for past in before)


def test_an_adapter_without_any_effect_is_a_sentence(model):
    with session_of(model, ["q_proj"], "float32") as session:
        with torch.no_grad():
            for layer in session.policy.adapter_layers().values():
                layer.lora_A["default"].weight.zero_()
        with pytest.raises(UserError, match="moving the adapter on q_proj changes no logprob"):
            check_start(session)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], ids="-".join)
def test_on_a_gpu_every_dtype_and_base_passes(targets, four_bit, dtype, smollm2):
    with session_of(smollm2, targets, dtype, device="cuda", four_bit=four_bit) as session:
        check_start(session)


@pytest.fixture
def smollm2():
    on_host = Path("/tmp/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return str(on_host) if on_host.is_file() else SMOLLM2
