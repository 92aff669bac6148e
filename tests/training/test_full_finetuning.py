"""Runs that train all weights: what vLLM samples from is what was just trained, it is one copy, and it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from grpo.config.schema import parse_config
from grpo.errors import UserError
from grpo.rollout.types import Request, SamplingSettings
from grpo.run.tensor_state import packed
from grpo.session import Session, open_session
from grpo.train import main
from grpo.training.advantages import Advantages
from grpo.training.learner import Learner
from grpo.training.self_check import check_start
from tests.helpers.learner_batches import advantages_of, random_groups
from tests.helpers.same_run import differences
from tests.helpers.small_chat import TOKENS, save_byte_tokenizer
from tests.helpers.tiny import save_tiny
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, write_config

pytestmark = pytest.mark.vllm

REWARDS = [[1.0, 0.0, 0.5], [0.0, 2.0, 1.0]]
PROMPT = [5, 9, 33, 7, 21, 64, 90, 11, 2, 3] * 4  # longer than a KV block, so that a stale prefix would be used again


def tables(folder: Path, **sections: Any) -> dict[str, Any]:
    """A run on the tiny model in `folder`/model."""
    model = {"full_finetuning": True, "dtype": "float32"} | sections.pop("model", {})
    values = run_tables(folder, model=model, **sections)
    for key in ("load_in_4bit", "load_in_8bit"):
        values["model"].pop(key, None)
    values.pop("lora", None)
    return values


def save_model(folder: Path, family: str = "qwen2") -> None:
    save_tiny(folder / "model", family, vocab_size=len(TOKENS), max_position_embeddings=2048)
    save_byte_tokenizer(folder / "model")
    save_rewards(folder)


def session_of(folder: Path, **sections: Any) -> Session:
    return open_session(parse_config(tables(folder, **sections)))


def differing_logprobs(session: Session, temperature: float = 1.0) -> float:
    """The largest difference between vLLM's logprobs of what it samples after PROMPT and the training graph's."""
    requests = [Request(number, PROMPT, seed=number) for number in range(4)]
    done = sorted(
        session.engine.generate(requests, SamplingSettings(temperature, max_tokens=24)), key=lambda one: one.request_id
    )
    sampled = torch.tensor([logprob for one in done for logprob in one.logprobs])
    with torch.no_grad():
        scored = session.policy.score([PROMPT] * 4, [one.token_ids for one in done], temperature=temperature)
    return float((sampled - scored.logprobs).abs().max())


def batch(session: Session) -> tuple[list[Any], Advantages]:
    groups = random_groups([6, 15], len(REWARDS[0]), (4, 16), len(TOKENS), -3)
    return groups, advantages_of(REWARDS, session.config)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3_text"])
def test_vllm_and_trainer_agree_after_every_step_over_one_copy(family: str, tmp_path: Path) -> None:
    save_model(tmp_path, family)
    train = {"learning_rate": 1e-3, "max_mismatch_kl": "none", "max_steps": 3}
    with session_of(tmp_path, train=train, rollout={"num_generations": 3}) as session:
        learner = Learner(session.policy, session.config, max_steps=3, notice=print)
        served = {name: p.data_ptr() for name, p in session.engine.vllm_model().named_parameters()}
        trained = {name: p.data_ptr() for name, p in session.policy.named_parameters().items()}
        storages = {tensor.untyped_storage().data_ptr() for tensor in session.base.storages()}
        assert differing_logprobs(session) < 1e-4
        start = [parameter.detach().clone() for parameter in session.policy.parameters()]
        for step in range(1, 4):
            learner.update(*batch(session), step)
            session.engine.sync_adapter()
            assert differing_logprobs(session) < 1e-4
        assert all(not torch.equal(p, old) for p, old in zip(session.policy.parameters(), start, strict=True))
        assert served == {name: p.data_ptr() for name, p in session.engine.vllm_model().named_parameters()}
        assert trained == {name: p.data_ptr() for name, p in session.policy.named_parameters().items()}
        assert {p.untyped_storage().data_ptr() for p in session.policy.parameters()} <= storages
        assert {p.untyped_storage().data_ptr() for p in session.engine.vllm_model().parameters()} <= storages


def test_a_cached_prefix_of_other_weights_would_be_seen(tmp_path: Path) -> None:
    save_model(tmp_path)
    train = {"learning_rate": 1e-2, "max_mismatch_kl": "none"}
    with session_of(tmp_path, train=train, rollout={"num_generations": 3}) as session:
        learner = Learner(session.policy, session.config, max_steps=1, notice=print)
        assert differing_logprobs(session) < 1e-4
        learner.update(*batch(session), 1)
        assert differing_logprobs(session) > 1e-2, "without the reset, keys and values of before are used"
        session.engine.reset_prefix_cache()
        assert differing_logprobs(session) < 1e-4


def test_the_gate_moves_weights_and_leaves_them_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    with session_of(tmp_path) as session:
        before = [parameter.detach().clone() for parameter in session.policy.parameters()]
        check_start(session)
        assert all(torch.equal(p, old) for p, old in zip(session.policy.parameters(), before, strict=True))
        head = session.engine.vllm_model().model.embed_tokens
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)  # a copy, as vLLM's own would be
        with pytest.raises(UserError, match="generation shows .* other weights|logprobs differ"):
            check_start(session)


def test_how_a_batch_is_cut_changes_no_gradient(tmp_path: Path) -> None:
    save_model(tmp_path)
    found = []
    for tokens in (4096, 40):
        train = {"learning_rate": 1e-3, "max_mismatch_kl": "none", "tokens_per_micro_batch": tokens}
        with session_of(tmp_path, train=train, rollout={"num_generations": 3}) as session:
            learner = Learner(session.policy, session.config, max_steps=1, notice=print)
            learner.update(*batch(session), 1)
            found.append([parameter.detach().clone() for parameter in session.policy.parameters()])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-4


@pytest.fixture(scope="module", params=["float32", "stochastic"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that was resumed after two, beside one in a piece."""
    folder = tmp_path_factory.mktemp("full")
    save_model(folder)
    dtype = {"float32": "float32", "stochastic": "bfloat16"}[request.param]
    values = tables(
        folder,
        model={"dtype": dtype},
        train={"max_steps": 3, "learning_rate": 1e-3, "weight_update": request.param},
        checkpoint={"save_steps": 2},
    )
    file = str(write_config(folder / "run.toml", values))
    assert main([file, "--set", "train.max_steps=2"]) == 0
    shutil.copytree(folder / "run", folder / "begun")
    assert main([file, "--resume", str(folder / "run")]) == 0
    assert main([file, "--set", f"checkpoint.output_dir={folder / 'straight'}"]) == 0
    return folder


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(home: Path) -> None:
    assert set(differences(home / "run", home / "straight")) <= {"step-2.jsonl differs"}
    for name in ("model/model.safetensors", "checkpoints/step-3/trainer.safetensors"):
        with safe_open(home / "run" / name, "pt") as one, safe_open(home / "straight" / name, "pt") as other:
            assert sorted(one.keys()) == sorted(other.keys())
            assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in one.keys())  # noqa: SIM118


@pytest.mark.slow
def test_the_run_is_recorded_and_leaves_an_ordinary_model(home: Path) -> None:
    from transformers import AutoModelForCausalLM

    steps = read_metrics(home / "run")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert "weight_survival" in steps[0] and "adapter_survival" not in steps[0]
    summary = json.loads((home / "run" / "summary.json").read_text())
    assert summary["trained_model"] == str(home / "run" / "model")
    model = AutoModelForCausalLM.from_pretrained(home / "run" / "model")
    start = AutoModelForCausalLM.from_pretrained(home / "model", dtype=model.dtype)
    names = dict(start.named_parameters())
    assert all(not torch.equal(p, names[name]) for name, p in model.named_parameters())
    assert (home / "run" / "model" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_it_is_not_resumed_as_something_else(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(home / "run.toml")
    assert main([file, "--resume", str(home / "begun"), "--set", "train.weight_update=compensated"]) == 2
    assert "weight_update" in capsys.readouterr().err


@pytest.mark.slow
def test_the_run_is_asked_and_exported_as_an_ordinary_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from grpo.evaluate import main as evaluate
    from grpo.export.build import export
    from grpo.generate import main as generate

    settings = ["--set", "model.device=cpu", "--set", "rollout.kv_cache_memory_bytes=16000000"]
    assert generate([str(home / "run"), "What is 1 + 1?", "--max-tokens", "4", *settings]) == 0
    assert evaluate([str(home / "run"), "--set", "eval.limit=2", "--set", "eval.max_completion_length=4"]) == 0
    assert evaluate([str(home / "run"), "--base"]) == 2
    assert "trained all weights" in capsys.readouterr().err
    said: list[str] = []
    folder = export(home / "run", to="merged-16bit", notice=said.append)
    assert any("all of which were trained" in text for text in said)
    with (
        safe_open(home / "run" / "model" / "model.safetensors", "pt") as trained,
        safe_open(folder / "model.safetensors", "pt") as written,
    ):
        names = sorted(trained.keys())
        assert names == sorted(written.keys())
        assert all(torch.equal(trained.get_tensor(n).bfloat16(), written.get_tensor(n).bfloat16()) for n in names)
    checkpoint = export(home / "run", to="gguf", checkpoint="step-3", notice=said.append)
    assert list(checkpoint.glob("*.gguf"))
    with pytest.raises(UserError, match="has no adapter"):
        export(home / "run", to="adapter")


def test_loaded_in_python_it_is_trained_asked_and_saved(tmp_path: Path) -> None:
    import grpo

    save_model(tmp_path)
    rollout = {"kv_cache_memory_bytes": 16_000_000, "prompts_per_step": 2, "num_generations": 2}
    lengths = {"max_prompt_length": 256, "max_completion_length": 8}
    with grpo.load(
        tmp_path / "model", full_finetuning=True, dtype="float32", device="cpu", rollout=rollout | lengths
    ) as policy:
        assert "all weights trained" in repr(policy)
        before = policy.generate("1 + 1 =", max_tokens=8)
        policy.train(
            "arithmetic",
            [f"{tmp_path / 'scores.py'}:score"],
            max_steps=2,
            learning_rate=1e-2,
            beta=0.01,
            checkpoint={"output_dir": str(tmp_path / "run")},
        )
        assert read_metrics(tmp_path / "run")[-1]["kl"] is not None
        assert policy.generate("1 + 1 =", max_tokens=8) != before
        folder = policy.save_merged(tmp_path / "saved", notice=lambda text: None)
        for call, match in (
            (lambda: policy.generate("1", adapter=False), "no base beside it"),
            (lambda: policy.save_lora(tmp_path / "lora"), "has no adapter"),
        ):
            with pytest.raises(UserError, match=match):
                call()
    assert (folder / "model.safetensors").is_file()


LETTERS = """
def score(completions, **kwargs):
    return [sum(c.isalpha() for c in completion[-1]["content"]) / 10 for completion in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "form"), [("float32", "auto"), ("bfloat16", "compensated"), ("bfloat16", "stochastic")]
)
def test_a_model_learns_what_is_rewarded(dtype: str, form: str, tmp_path: Path) -> None:
    """To write letters, which it does by chance at first."""
    save_model(tmp_path)
    (tmp_path / "scores.py").write_text(LETTERS)
    values = tables(
        tmp_path,
        model={"dtype": dtype},
        rewards=[{"function": f"{tmp_path / 'scores.py'}:score"}],
        rollout={"prompts_per_step": 4, "num_generations": 8},
        train={"max_steps": 25, "learning_rate": 3e-3, "weight_update": form, "max_mismatch_kl": "none"},
        checkpoint={"save_steps": 100},
    )
    assert main([str(write_config(tmp_path / "run.toml", values))]) == 0
    rewards = [step["reward"] for step in read_metrics(tmp_path / "run")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards


def test_an_update_that_fails_half_way_leaves_weights_and_optimiser_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    train = {"learning_rate": 1e-3, "max_mismatch_kl": "none", "num_iterations": 2, "weight_update": "stochastic"}
    with session_of(tmp_path, model={"dtype": "bfloat16"}, train=train, rollout={"num_generations": 3}) as session:
        learner = Learner(session.policy, session.config, max_steps=3, notice=print)
        learner.update(*batch(session), 1)
        before = [parameter.detach().clone() for parameter in session.policy.parameters()]
        state = packed(learner.state_dict())
        backpropagate, calls = learner.backpropagate, []

        def fail_the_second_time(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no such luck")
            return backpropagate(*arguments)

        monkeypatch.setattr(learner, "backpropagate", fail_the_second_time)
        with pytest.raises(RuntimeError, match="no such luck"):
            learner.update(*batch(session), 2)
        assert all(torch.equal(p, old) for p, old in zip(session.policy.parameters(), before, strict=True))
        assert packed(learner.state_dict()) == state


def test_several_processes_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main([str(write_config(tmp_path / "run.toml", tables(tmp_path)))]) == 2
    assert "2 processes would exchange the gradient of every weight" in capsys.readouterr().err
