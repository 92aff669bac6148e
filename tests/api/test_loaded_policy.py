"""The Python API: a peft model without vLLM, generation in batches and streams, training on Python objects, memory.

The model is tiny and random (`tiny_run.py`); whether training learns anything is not tested here. Two policies are
opened in turn and shared: vLLM takes seconds to start.
"""

from __future__ import annotations

import gc
import json
import pkgutil
import shutil
import subprocess
import sys
import tomllib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import grpo
from grpo.api.loaded_policy import LoadedPolicy
from grpo.api.result import TrainResult
from grpo.errors import UserError
from grpo.run.model_reference import resolve_model
from tests.helpers.garbage import as_in_a_run
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import save_tiny_chat_model

TINY: dict[str, Any] = {"load_in_4bit": False, "dtype": "float32", "device": "cpu", "max_seq_length": 192}
LORA = {"r": 4, "lora_alpha": 8}
SMALL_STEPS: dict[str, Any] = {
    "max_steps": 2,
    "prompts_per_step": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-2,
    "report": False,
}
CHAT = [{"role": "user", "content": "What is 1 + 1?"}]

vllm = pytest.mark.vllm


def made_letters() -> Any:
    """A reward that is sent by value, so that its process need not import this module and torch with it."""

    def letters(completions: list, **kwargs: Any) -> list[float]:
        return [sum(c.isalpha() for c in completion[0]["content"]) / 100 for completion in completions]

    return letters


letters = made_letters()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    save_tiny_chat_model(folder / "model")
    return folder


def opened(home: Path, **settings: Any) -> LoadedPolicy:
    return grpo.load(home / "model", lora=LORA, **{**TINY, **settings})


@pytest.fixture(scope="module")
def policy(home: Path) -> Iterator[LoadedPolicy]:
    with opened(home) as policy:
        policy.save_lora(home / "fresh")
        yield policy


@pytest.fixture(scope="module")
def moved(policy: LoadedPolicy, home: Path) -> Path:
    """An adapter far from the fresh one, made by changing the peft model's parameters."""
    policy.load_lora(home / "fresh")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return policy.save_lora(home / "moved")


@pytest.fixture(scope="module")
def run(policy: LoadedPolicy, home: Path) -> TrainResult:
    """Two steps from the fresh adapter, which afterwards has moved."""
    policy.load_lora(home / "fresh")
    return policy.train("arithmetic", [letters], output_dir=home / "run", **SMALL_STEPS)


def sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Importing


def test_importing_grpo_is_cheap_and_its_names_are_no_modules() -> None:
    ask = "import sys, grpo; print(sorted({'torch', 'vllm', 'transformers', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    modules = {module.name for module in pkgutil.iter_modules(grpo.__path__)} | {"tasks", "rewards", "kernels"}
    assert not modules & set(grpo.__all__)
    assert all(getattr(grpo, name) is not None for name in grpo.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = grpo.nothing  # type: ignore[attr-defined]


def test_loading_gives_a_peft_model_without_vllm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    for module in [name for name in sys.modules if name.partition(".")[0] == "vllm"] + ["vllm", "grpo.rollout.engine"]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with opened(home) as policy:
        assert isinstance(policy.model, peft.PeftModel) and policy.tokenizer.eos_token_id == 2
        trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
        assert trained and all("lora_" in name for name in trained)
        assert not policy.session.engine_started
        assert repr(policy) == f"<{home / 'model'} in float32 on cpu, LoRA of rank 4>"


def test_a_completion_keeps_its_special_tokens_unless_they_are_to_be_skipped(home: Path) -> None:
    with opened(home) as policy:
        policy.tokenizer.add_special_tokens({"extra_special_tokens": ["<answer>"]})
        written = policy.tokenizer("<answer>2", add_special_tokens=False)["input_ids"]
        ids = [*written, *policy.session.stop_token_ids]
        assert policy.session.decode(ids) == "<answer>2"
        policy.session.config.rollout.skip_special_tokens = True
        assert policy.session.decode(ids) == "2"
        assert policy.session.sampling(1.0, 5).skip_special_tokens


# What is declined


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("t5", "has an encoder beside its decoder; use"),
        ("whisper", "has an encoder beside its decoder; use"),
        ("distilbert", "is an encoder, as embedding models are.*; use"),
        ("deepseek_v3", r"latent form \(MLA\); use"),
        ("mamba", "has no num_attention_heads.*; use"),
        ("glm4_moe", "chooses experts in another way.*; use"),
    ],
)
def test_what_is_no_decoder_that_both_graphs_have_is_declined(tmp_path: Path, kind: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=f"'{kind}' is not supported: .*{reason}") as error:
        grpo.load(tmp_path)
    sentence(error)


def test_a_path_that_does_not_exist_is_told_before_anything_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpo.session", None)
    with pytest.raises(UserError, match="no such file or folder"):
        grpo.load("./no/model")


@vllm
def test_a_value_out_of_range_is_told_by_its_key(policy: LoadedPolicy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^policy.train: train.learning_rate = -1: must be") as error:
        policy.train("arithmetic", [letters], learning_rate=-1, output_dir=tmp_path / "run")
    sentence(error)
    with pytest.raises(UserError, match="model.max_seq_length = 192 is below"):
        policy.train("arithmetic", [letters], max_completion_length=500, output_dir=tmp_path / "run")
    with pytest.raises(UserError, match="kernels = 'torch' is decided when the model is loaded"):
        policy.train("arithmetic", [letters], kernels="torch", output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Generation


@vllm
def test_a_batch_holds_what_its_prompts_give_alone(policy: LoadedPolicy) -> None:
    prompts = ["Once upon", CHAT, "abc"]
    alone = [policy.generate(prompt, max_tokens=6) for prompt in prompts]
    assert policy.generate(prompts, max_tokens=6) == alone
    assert all(isinstance(text, str) and text for text in alone) and len(set(alone)) == 3


@vllm
def test_several_samples_of_a_prompt_differ_and_a_seed_repeats_them(policy: LoadedPolicy) -> None:
    first = policy.generate("abc", max_tokens=6, temperature=1.0, n=3, seed=5)
    assert len(first) == len(set(first)) == 3
    assert policy.generate("abc", max_tokens=6, temperature=1.0, n=3, seed=5) == first
    assert policy.generate("abc", max_tokens=6, temperature=1.0) != policy.generate(
        "abc", max_tokens=6, temperature=1.0
    )
    pairs = policy.generate(["abc", CHAT], max_tokens=6, temperature=1.0, n=2, seed=5)
    assert [len(pair) for pair in pairs] == [2, 2] and pairs[0] == first[:2]


@vllm
def test_a_stream_gives_the_same_text_and_may_be_left(policy: LoadedPolicy) -> None:
    whole = policy.generate(CHAT, max_tokens=12)
    found = list(policy.generate(CHAT, max_tokens=12, stream=True))
    assert "".join(found) == whole and len(found) > 3
    left = policy.generate(CHAT, max_tokens=100, stream=True)
    next(left)
    assert policy.generate(CHAT, max_tokens=12) == whole
    assert list(left) == []
    assert not policy.session.engine.llm.llm_engine.has_unfinished_requests()


@vllm
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_tokens": 1000}, "max_tokens = 1000 exceeds max_seq_length = 192; lower max_tokens"),
        ({"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
        ({"temperature": 3.0}, "temperature = 3.0: must be from 0 to 2"),
        ({"n": 2}, "n = 2 completions are all the same at temperature 0"),
        ({"n": 2, "temperature": 1.0, "stream": True}, "stream=True takes one prompt and n=1"),
    ],
)
def test_what_generation_cannot_do_is_a_sentence(policy: LoadedPolicy, arguments: dict, expected: str) -> None:
    with pytest.raises(UserError) as error:
        policy.generate("abc", **arguments)
    assert expected in sentence(error)


@vllm
def test_generation_follows_the_adapter_however_it_was_changed(policy: LoadedPolicy, home: Path, moved: Path) -> None:
    policy.load_lora(home / "fresh")
    base = policy.generate(CHAT, max_tokens=8, adapter=False)
    assert policy.generate(CHAT, max_tokens=8) == base, "a fresh adapter changes nothing"
    policy.load_lora(moved)
    other = policy.generate(CHAT, max_tokens=8)
    assert other != base
    assert policy.generate(CHAT, max_tokens=8, adapter=False) == base
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()  # as another trainer would, without telling anybody
    assert policy.generate(CHAT, max_tokens=8) == base


@vllm
def test_the_merged_model_is_base_plus_adapter(policy: LoadedPolicy, home: Path, moved: Path) -> None:
    policy.load_lora(moved)
    folder = policy.save_merged(home / "merged", check=False)
    base, adapter = load_file(home / "model/model.safetensors"), load_file(moved / "adapter_model.safetensors")
    merged = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    expected = base[f"{name}.weight"] + LORA["lora_alpha"] / LORA["r"] * b @ a
    assert torch.allclose(merged[f"{name}.weight"].float(), expected, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(expected, base[f"{name}.weight"], rtol=1e-2, atol=1e-2)


# Training


@vllm
def test_training_moves_the_adapter_and_leaves_a_run(run: TrainResult, home: Path) -> None:
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (home / "fresh", run.folder / "adapter")
    )
    assert any(not tensor.equal(after[name]) for name, tensor in before.items())
    assert [entry["step"] for entry in run.metrics] == [1, 2]
    assert (run.folder / "config.toml").is_file() and run.summary["steps"] == 2
    assert run.rewards.keys() == {"reward", "letters"}
    assert run.rewards["reward"] == run.rewards["letters"] == [entry["reward"] for entry in run.metrics]


@vllm
def test_closures_and_lambdas_score_rows_with_their_columns(policy: LoadedPolicy, home: Path) -> None:
    target = 7

    def near(completion_ids: list, wanted: list, **kwargs: Any) -> list[float]:
        return [wish - len(ids) + target for ids, wish in zip(completion_ids, wanted, strict=True)]

    rows = [{"prompt": CHAT, "wanted": 1}, {"prompt": CHAT, "wanted": 1}]
    rewards = [near, lambda completions, **kwargs: [0.5] * len(completions), {"function": letters, "weight": 0.0}]
    result = policy.train(rows, rewards, output_dir=home / "closures", **{**SMALL_STEPS, "max_steps": 1})
    (step,) = result.metrics
    assert step["rewards/near"] == pytest.approx(1 + 7 - step["completion_length"])
    assert step["rewards/lambda"] == 0.5
    assert step["reward"] == pytest.approx(step["rewards/near"] + 0.5), "a weight of 0 does not count"
    assert f'function = "{__name__}:test_closures' in (home / "closures/config.toml").read_text()


@vllm
def test_functions_and_classes_are_environments(policy: LoadedPolicy, home: Path) -> None:
    """One of a notebook has no file: it is sent to the environment's process."""
    turns = 2

    async def chat(row: Any, sample: Any) -> float:
        messages, letters = list(row["prompt"]), 0
        for _ in range(turns):
            turn = await sample(messages)
            letters += sum(character.isalpha() for character in turn.text)
            messages += [turn.message, {"role": "user", "content": row["word"]}]
        return letters / 20

    rows = [{"prompt": [{"role": "user", "content": f"Say {word}."}], "word": word} for word in ("a", "b")]
    table = {"program": chat, "max_turn_tokens": 8, "latency_steps": 2}
    policy.train(
        rows, environment=table, max_steps=1, prompts_per_step=2, num_generations=2, max_completion_length=60,
        output_dir=home / "chat",
    )  # fmt: skip
    entry = json.loads((home / "chat" / "metrics.jsonl").read_text())
    assert entry["environment/turns"] == 2.0 and entry["rewards/chat"] == entry["reward"]
    kept = tomllib.loads((home / "chat" / "config.toml").read_text())
    assert kept["environment"]["program"].endswith("chat")


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("chat", "environment = 'chat' must be a dict of [environment] keys"),
        ({"tools": [len, "a.py:f"]}, "environment.tools: pass functions or their names, not both"),
        ({"tools": [len]}, "chat template cannot continue a conversation after a tool's message"),
        ({"rollout_func": "a.py:f"}, "write the same loop as `program`"),
    ],
)
def test_an_environment_that_cannot_be_is_told(policy: LoadedPolicy, table: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        policy.train("arithmetic", environment=table)
    assert sentence in str(caught.value)


def test_training_continues_from_the_adapter_and_vllm_goes_on(policy: LoadedPolicy, home: Path, moved: Path) -> None:
    import datasets

    engine = policy.session.engine
    rows = datasets.Dataset.from_list([{"prompt": CHAT, "answer": "2"}] * 2)
    policy.load_lora(moved)
    policy.train(rows, letters, output_dir=home / "dataset", **{**SMALL_STEPS, "max_steps": 1, "learning_rate": 1e-6})
    assert policy.session.engine is engine, "smaller steps do not need another vLLM"
    before, after = (load_file(f / "adapter_model.safetensors") for f in (moved, home / "dataset/adapter"))
    assert all(torch.allclose(tensor, after[name], atol=1e-4) for name, tensor in before.items())


@vllm
def test_a_bad_reward_ends_in_a_sentence_and_the_policy_goes_on(policy: LoadedPolicy, home: Path) -> None:
    def wrong(completions: list, **kwargs: Any) -> list[float]:
        return [1.0]

    with pytest.raises(UserError, match="reward 'wrong' .* returned 1 values for 4 completions") as error:
        policy.train("arithmetic", wrong, output_dir=home / "wrong", **SMALL_STEPS)
    sentence(error)
    assert policy.generate("abc", max_tokens=4)


@vllm
def test_rows_without_rewards_are_told_what_is_missing(policy: LoadedPolicy) -> None:
    with pytest.raises(UserError, match=r"task 'rows' suggests no rewards; pass rewards=\[...\]"):
        policy.train([{"prompt": "a"}])


@vllm
@pytest.mark.parametrize(
    ("wanted", "serves"),
    [
        ({"max_seq_length": 64, "max_num_seqs": 8, "seed": 3}, True),
        ({"max_seq_length": 129}, False),
        ({"max_num_seqs": 17}, False),
        ({"stop_strings": True}, False),
        ({"kv_cache_dtype": "fp8"}, False),
    ],
)
def test_a_running_vllm_serves_whatever_asks_for_no_more(wanted: dict[str, Any], serves: bool) -> None:
    from grpo.rollout.engine import EngineSettings
    from grpo.session import covers

    running = {"max_seq_length": 128, "max_num_seqs": 16}
    assert covers((EngineSettings(**running), None), (EngineSettings(**{**running, **wanted}), None)) == serves


# Results


@vllm
def test_a_result_is_a_table_and_a_picture(run: TrainResult, tmp_path: Path) -> None:
    assert run._repr_html_().count("<tr>") == 3 and "data:image/png;base64," in run._repr_html_()
    assert repr(run).startswith("<2 steps in ")
    plot = run.plot()
    assert plot._repr_png_().startswith(b"\x89PNG")
    assert plot.titles == ["letters", "completion length, tokens"]
    plot.save(tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
    with pytest.raises(UserError, match="no metric 'rewards/none' was logged; there are reward"):
        run.plot(metrics=["rewards/none"])


# Runs and adapters as models


@vllm
def test_a_run_and_its_adapter_lead_to_base_and_values(run: TrainResult, home: Path, tmp_path: Path) -> None:
    for name in (run.folder, run.folder / "adapter", run.folder / "checkpoints/step-2/adapter"):
        target = resolve_model(name)
        assert target.tables["model"]["name"] == str(home / "model") and target.lora["r"] == 4
    lone = tmp_path / "lone"
    shutil.copytree(run.folder / "adapter", lone)
    assert resolve_model(lone).tables["lora"]["lora_alpha"] == 8
    with grpo.load(lone, **TINY) as policy:
        found = policy.model.state_dict()
        for key, tensor in load_file(lone / "adapter_model.safetensors").items():
            assert found[key.replace(".weight", ".default.weight")].equal(tensor)
        assert not policy.session.engine_started
    with pytest.raises(UserError, match="brings its own shape; leave lora out"):
        grpo.load(lone, lora=LORA)


# Closing. These open policies of their own, and come last.


@vllm
def test_closing_gives_everything_back_so_that_a_cell_can_be_run_again(
    policy: LoadedPolicy, home: Path, tmp_path: Path
) -> None:
    policy.close()
    policy.close()
    with pytest.raises(UserError, match="closed; load it again"):
        policy.generate("abc")
    assert repr(policy) == "<closed policy>"
    with as_in_a_run():
        before = held()
        watched = [weakref.ref(tensor) for tensor in cell(home, tmp_path / "run")]
        after = held()
    assert not [tensor for tensor in watched if tensor() is not None], "storage of the base outlives close"
    assert after["memory"] - before["memory"] < 64 * 2**20, f"resident memory grows: {before} to {after}"
    assert after["files"] == before["files"] and after["threads"] == before["threads"]


def held() -> dict[str, int]:
    """What this process holds of the machine."""
    gc.collect()
    process = psutil.Process()
    return {"memory": process.memory_info().rss, "files": process.num_fds(), "threads": process.num_threads()}


def cell(home: Path, folder: Path) -> Iterator[torch.Tensor]:
    """Load, generate, train a step, close. Gives the base's tensors, one at a time so that none is kept."""
    policy = opened(home)
    storages = list(policy.session.base.storages())
    assert policy.generate("abc", max_tokens=4)
    policy.train("arithmetic", [letters], output_dir=folder, **{**SMALL_STEPS, "max_steps": 1})
    policy.close()
    while storages:
        yield storages.pop()
