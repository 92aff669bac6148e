"""grpo/memory/fit.py, gpus.py, roofline.py and shapes.py: what a plan says about a GPU that is not here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config.schema import Config, parse_config
from grpo.errors import UserError
from grpo.memory import fit, gpus, roofline, shapes, summary
from grpo.memory.gpus import GPUS, gpu_named, known_gpu
from grpo.memory.plan import Shape, plan_memory
from grpo.memory.roofline import Work, decode_seconds, pass_seconds
from grpo.sft.config import SftConfig
from grpo.sft.plan import memory_lines
from tests.helpers.paths import ROOT

LLAMA_8B = Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False)
LLAMA_3B = Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True)
QWEN_HALF_B = Shape("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True)
QWEN_1_5B = Shape("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True)
RESULTS = ROOT / "benchmarks" / "results"


def config(name: str = "unsloth/Meta-Llama-3.1-8B-Instruct", **sections: Any) -> Config:
    model = {"name": name, **sections.pop("model", {})}
    return parse_config({"model": model, "task": {"name": "arithmetic"}, **sections})


def fitted(settings: Config, shape: Shape, gpu: gpus.Gpu) -> fit.Fit | None:
    plan = plan_memory(settings, shape, 2, on_gpu=True, flash=gpu.flash)
    return fit.best_fit(settings, shape, 2, plan, fit.usable_bytes(gpu.memory - fit.CONTEXT, gpu.memory), gpu)


# GPUs by name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("3090", "RTX 3090"), ("rtx 3090", "RTX 3090"), ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("t4", "T4"),
        ("Tesla T4", "T4"), ("A100", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA L4", "L4"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"),
        ("4070 Ti SUPER", "RTX 4070 Ti Super"), ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 16GB"),
        ("NVIDIA RTX A6000", "RTX A6000"), ("5090", "RTX 5090"), ("NVIDIA A10G", "A10G"),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_what_drivers_and_people_call_it(name, found):
    assert gpu_named(name).name == found


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_is_found_by_its_own_name_and_by_no_other(gpu):
    assert gpu_named(gpu.name) is gpu and gpu_named(gpu.name.lower()) is gpu


@pytest.mark.parametrize("name", ["", "309", "GTX 1080", "MI300X", "V100", "card"])
def test_an_unknown_gpu_is_refused_with_a_hint(name):
    with pytest.raises(UserError, match=r"--card .*: not a known GPU; (did you mean '|known are )"):
        gpu_named(name)


@given(st.text(max_size=20))
def test_any_name_is_a_gpu_or_none(name):
    assert known_gpu(name) is None or known_gpu(name) in GPUS


def test_a_gpu_that_no_table_names_has_usual_speeds_and_its_own_memory():
    found = gpus.as_found("NVIDIA RTX 9999", 130, 10**11)
    assert (found.name, found.architecture, found.memory) == ("NVIDIA RTX 9999", 130, 10**11)
    assert found.bandwidth == gpus.USUAL.bandwidth


# Memory that is left to others


def test_a_plan_leaves_room_for_what_it_does_not_count():
    small, large = 16 * 10**9, 80 * 10**9
    assert fit.usable_bytes(small - fit.CONTEXT, small) < (small - fit.CONTEXT - fit.DESKTOP - fit.MODULES)
    assert fit.usable_bytes(large - fit.CONTEXT, large) > 0.97 * (large - fit.CONTEXT - fit.DESKTOP)
    busy = fit.usable_bytes(10 * 10**9, small)
    assert busy == int((10 * 10**9 - fit.MODULES) * 0.97), "a desktop that runs already is in what is not free"


# Sharing out


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(GPUS), st.sampled_from([LLAMA_3B, LLAMA_8B]), st.integers(64, 2048), st.sampled_from([8, 32, 128]),
    st.booleans(),
)  # fmt: skip
def test_what_is_shared_out_fits_and_no_other_mode_is_predicted_faster(gpu, shape, length, sequences, released):
    wanted = config(rollout={
        "max_completion_length": length, "max_num_seqs": sequences, "prompts_per_step": 16, "num_generations": 8,
        "release_kv_cache": released,
    })  # fmt: skip
    found = fitted(wanted, shape, gpu)
    plan = plan_memory(wanted, shape, 2, on_gpu=True, flash=gpu.flash)
    usable = fit.usable_bytes(gpu.memory - fit.CONTEXT, gpu.memory)
    if found is None:
        assert plan.peak(plan.kv_one_sequence) > usable
        return
    assert plan.peak(found.kv_cache, found.mode) <= usable
    assert 1 <= found.sequences <= sequences and found.kv_cache <= plan.kv_cache
    for mode in plan.peaks:
        alone = config(rollout=wanted.rollout.model_dump(exclude_unset=True), train={"gradient_checkpointing": mode})
        other = fitted(alone, shape, gpu)
        tight = other is not None and plan.room_for_kv(usable, mode, 0.95) < other.kv_cache
        assert other is None or tight or other.seconds >= found.seconds - 1e-9


def test_the_kv_cache_does_not_push_training_to_its_slowest_mode():
    """16 GB and a 3B: what the slowest mode would leave to more sequences costs more than they would gain."""
    wanted = config(rollout={"prompts_per_step": 16, "num_generations": 8, "max_completion_length": 512})
    found = fitted(wanted, LLAMA_3B, gpu_named("RTX 4080"))
    assert found is not None and found.mode == "layer" and found.sequences >= 64


def test_a_mode_and_a_cache_that_are_set_are_obeyed():
    gpu = gpu_named("3090")
    layer = fitted(config(train={"gradient_checkpointing": "layer"}), LLAMA_8B, gpu)
    assert layer is not None and layer.mode == "layer"
    fixed = fitted(config(rollout={"kv_cache_memory_bytes": 10**9}), LLAMA_8B, gpu)
    assert fixed is not None and fixed.kv_cache == 10**9


def test_a_gpu_before_ampere_is_planned_with_its_attention():
    ampere = replace(gpu_named("T4"), architecture=86)
    turing, other = (fitted(config(), LLAMA_8B, gpu) for gpu in (gpu_named("T4"), ampere))
    assert turing is not None and other is not None
    plans = [plan_memory(config(), LLAMA_8B, 2, on_gpu=True, flash=flash).peaks for flash in (False, True)]
    assert all(plans[0][mode] > plans[1][mode] for mode in plans[0])


# Speeds


@pytest.mark.parametrize(("result", "shape"), [("rollout_3b_h200", LLAMA_3B), ("rollout_8b_h200", LLAMA_8B)])
def test_rollouts_that_were_measured_are_predicted_within_a_third(result, shape):
    gpu, work = gpu_named("H200"), Work.of(config(), shape, 2)
    for row in json.loads((RESULTS / f"{result}.json").read_text())["systems"]["ours"]["rollouts"]:
        predicted = row["sequences"] / decode_seconds(work, gpu, row["sequences"], 128 + 128)
        assert predicted == pytest.approx(row["tokens_per_second"], rel=0.34), row["sequences"]


def test_a_training_step_that_was_measured_is_predicted_within_a_third():
    result = json.loads((RESULTS / "whole_step.json").read_text())
    steps = result["systems"]["ours nf4"]["steps"]
    measured = sorted(step["train_seconds"] for step in steps)[len(steps) // 2]
    work = Work.of(config(), LLAMA_3B, 2)
    length, count = result["prompt"] + result["completion"], 128
    tokens = count * result["completion"] + count // 8 * result["prompt"]
    completed = count * result["completion"]
    seconds = pass_seconds(work, gpu_named("H200"), "none", tokens, length, 32768, predicted=completed)
    assert seconds == pytest.approx(measured, rel=0.34)


@pytest.mark.parametrize(("result", "shape"), [("train_step_3b", LLAMA_3B), ("train_step_8b", LLAMA_8B)])
def test_what_checkpointing_costs_is_predicted_as_it_was_measured(result, shape):
    steps = json.loads((RESULTS / f"{result}.json").read_text())["step"]
    work, gpu = Work.of(config(), shape, 2), gpu_named("H100 80GB HBM3")
    modes = ("none", "mlp", "layer")
    seconds = {mode: pass_seconds(work, gpu, mode, 16384, 2048, 16384, predicted=16384) for mode in modes}
    for mode in modes[1:]:
        measured = steps[f"triton/{mode}"]["ms"] / steps["triton/none"]["ms"]
        assert seconds[mode] / seconds["none"] == pytest.approx(measured, rel=0.08), mode


def test_the_shares_are_those_of_the_results():
    sm80 = json.loads((RESULTS / "nf4_as_sm80.json").read_text())["table"]
    shares = {row["rows"]: row["share_of_floor"] for row in sm80}
    assert shares[1] == pytest.approx(roofline.PACKED_SHARE, abs=0.03) == shares[16]
    rows, weights = (
        128,
        sum(rows * columns for rows, columns in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))),
    )
    rule = next(row for row in sm80 if row["rows"] == rows)["rule"]
    # mma.sync reaches some 62 % of what wgmma does on the GPU that this ran on.
    assert 2 * rows * weights / (rule * 1e-6) / (0.62 * 989e12) == pytest.approx(roofline.PRODUCT_SHARE, rel=0.15)


@given(st.sampled_from(GPUS), st.integers(1, 256), st.integers(1, 256))
def test_more_sequences_take_longer_and_are_worth_it(gpu, one, more):
    work = Work.of(config(), LLAMA_8B, 2)
    first, second = (decode_seconds(work, gpu, count, 400) for count in (one, one + more))
    assert first <= second and first / one >= second / (one + more) * 0.999


# Models that are not here


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", 36), ("unsloth/Qwen2.5-3B-Instruct-unsloth-bnb-4bit", 36), ("Qwen/Qwen3-4B", 36),
        ("meta-llama/Llama-3.1-8B-Instruct", 32), ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", 32),
        ("microsoft/phi-4", 40), ("unsloth/phi-4", 40), ("google/gemma-3-1b-it", 26), ("Qwen/Qwen3-4B-Base", 36),
        ("mistralai/Mistral-7B-Instruct-v0.3", 32), ("Qwen/Qwen3-4B-Instruct-2507", 36),
        ("unsloth/Qwen3-30B-A3B-Instruct-2507", 48), ("allenai/OLMoE-1B-7B-0924-Instruct", 16),
        ("nobody/has-this-model", None), ("Qwen/Qwen2-VL-2B-Instruct", None), ("Qwen/Qwen2.5-VL-3B-Instruct", 36),
    ],
)  # fmt: skip
def test_a_well_known_model_is_planned_without_being_here(name, layers):
    known = shapes.known_sizes(name)
    assert (None if known is None else known.get("text_config", known)["num_hidden_layers"]) == layers


PUBLISHED = {
    "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.61, "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76, "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19,
    "qwen3-14b": 14.77, "qwen3-32b": 32.76, "deepseek-r1-distill-qwen-1.5b": 1.78,
    "deepseek-r1-distill-qwen-7b": 7.61, "deepseek-r1-distill-llama-8b": 8.03, "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "llama-3.3-70b": 70.55,
    "tinyllama-1.1b": 1.10, "smollm2-135m": 0.1345, "smollm2-360m": 0.362, "smollm2-1.7b": 1.71, "mistral-7b": 7.25,
    "mistral-nemo": 12.25, "gemma-2-2b": 2.61, "gemma-2-9b": 9.24, "gemma-3-270m": 0.268, "gemma-3-1b": 1.0,
    "qwen3-30b-a3b": 30.53, "olmoe-1b-7b": 6.92, "phi-3.5-mini": 3.82, "phi-4": 14.66, "phi-4-mini": 3.84,
    "qwen2.5-vl-3b": 3.09, "qwen2.5-vl-7b": 7.62,
}  # fmt: skip
"""Billions of parameters, as their publishers state them; of models that see, those of their decoders."""
EXTENDED = {
    "orpheus-3b-0.1": ("llama-3.2-3b", 28_684), "llasa-1b": ("llama-3.2-1b", 65_544),
    "llasa-3b": ("llama-3.2-3b", 65_544), "llasa-8b": ("llama-3.1-8b", 65_544),
    "spark-tts-0.5b": ("qwen2.5-0.5b", 14_064),
}  # fmt: skip
"""Speech models: what they extend, and by how many rows of the vocabulary."""
for _name, (_base, _rows) in EXTENDED.items():
    _sizes = json.loads(shapes.TABLE.read_text())[_base]
    _tables = 1 if _sizes["tie_word_embeddings"] else 2
    PUBLISHED[_name] = PUBLISHED[_base] + _tables * _rows * _sizes["hidden_size"] / 1e9


@pytest.mark.parametrize("name", json.loads(shapes.TABLE.read_text()))
def test_the_table_adds_up_to_the_published_numbers_of_parameters(name):
    plain = config(model={"load_in_4bit": False})
    weights = plan_memory(plain, Shape.of(shapes.known_sizes(name)), 2, on_gpu=True).weights
    assert weights / 2e9 == pytest.approx(PUBLISHED[name], rel=0.012)


def test_the_hub_is_asked_for_what_no_table_names_unless_offline(monkeypatch, tmp_path):
    asked = []

    def download(name: str, file: str, **options: Any) -> str:
        asked.append((name, file))
        (tmp_path / file).write_text(json.dumps({"model_type": "llama", **sizes(LLAMA_3B)}))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert shapes.model_shape(config("some/model").model, network=True) == LLAMA_3B
    assert shapes.model_shape(config("some/model").model) is None
    assert shapes.model_shape(config("Qwen/Qwen3-4B").model, network=True) is not None
    assert asked == [("some/model", "config.json")]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert shapes.model_shape(config("some/model").model, network=True) is None


def sizes(shape: Shape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__ if name != "model_type"}


# Words


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_dry_run_adds_up_and_gives_a_verdict(gpu):
    lines = summary.memory_plan(config(), gpu)
    if lines[-1].startswith("Does not fit: the GPU has "):
        assert "; " in lines[-1] and "GB (weights" in lines[-1]
        return
    parts = [float(line.split()[0]) for line in lines if line.startswith("  ")]
    weights, kv, vllm, adapter, sampling, training, others, at_once = parts
    assert at_once == pytest.approx(weights + kv + vllm + adapter + max(sampling, training) + others, abs=0.05)
    fits, spare = lines[-2].split(" with ")
    assert fits == f"Fits the {gpu.name}" and spare.endswith(" GB to spare.")
    assert float(spare.split()[0]) == pytest.approx(gpu.memory / 1e9 - at_once, abs=0.06)
    assert lines[-1].startswith("Predicted, not measured") and "a second" in lines[-1]


def test_without_a_gpu_the_least_that_would_do_is_named(monkeypatch):
    monkeypatch.setattr(summary, "gpu_here", lambda: None)
    monkeypatch.setattr(summary, "has_gpu", lambda: False)
    last = summary.memory_plan(config())[-1]
    assert last.startswith("A GPU of ") and "--card" in last
    name = last.split('--card "')[1].split('"')[0]
    assert any(line.startswith("Fits the ") for line in summary.memory_plan(config(), gpu_named(name)))


def test_a_supervised_run_has_a_plan_too(tmp_path: Path):
    tables = {"model": {"name": "Qwen/Qwen2.5-3B-Instruct"}, "sft": {"path": "examples.jsonl"}}
    wanted = SftConfig.model_validate(tables)
    lines = memory_lines(wanted, gpu_named("3060"))
    assert any(line.startswith("Fits the RTX 3060 with ") for line in lines) and "tokens a second" in lines[-1]
    wide = SftConfig.model_validate({**tables, "sft": {"path": "x", "max_length": 200_000}})
    assert memory_lines(wide, gpu_named("3060"))[-1].startswith("Does not fit the RTX 3060: ")
    assert "are not known here" in memory_lines(SftConfig.model_validate({**tables, "model": {"name": "m"}}))[0]


# All weights


def full(optim: str = "paged_adamw_8bit", **sections: Any) -> Config:
    return config(model={"full_finetuning": True}, train={"optim": optim, **sections.pop("train", {})}, **sections)


@pytest.mark.parametrize(
    ("shape", "gigabytes"), [(QWEN_HALF_B, 8), (QWEN_1_5B, 24), (LLAMA_3B, 48), (LLAMA_8B, 80)], ids=str
)
def test_models_whose_weights_are_all_trained_fit_the_cards_that_they_should(shape, gigabytes):
    free, total = gigabytes * 10**9 - fit.CONTEXT, gigabytes * 10**9
    settings = fit.with_weight_update(full(), shape, 2, (free, total))
    plan = plan_memory(settings, shape, 2, on_gpu=True)
    found = fit.best_fit(settings, shape, 2, plan, fit.usable_bytes(free, total), None)
    assert found is not None and settings.train.weight_update == "float32"
    assert plan.peak(found.kv_cache, found.mode) <= fit.usable_bytes(free, total)


def test_the_form_of_the_update_is_the_first_that_fits_and_one_that_is_set_is_kept():
    taken = {
        gigabytes: fit.with_weight_update(full("adamw_8bit"), LLAMA_8B, 2, (gigabytes * 10**9,) * 2).train.weight_update
        for gigabytes in (96, 80, 64)
    }
    assert taken == {96: "float32", 80: "compensated", 64: "stochastic"}
    settings = full(train={"weight_update": "stochastic"})
    assert fit.with_weight_update(settings, LLAMA_8B, 2, (200 * 10**9,) * 2) == settings
    assert fit.with_weight_update(full(), LLAMA_8B, 2, None).train.weight_update == "float32"


def test_bytes_of_training_all_weights_are_those_of_its_parts():
    numbers = plan_memory(full(), LLAMA_3B, 2, on_gpu=True).weights // 2
    for optim, moments in (("adamw", 8), ("adamw_8bit", 2 + 8 / 256), ("paged_adamw_8bit", 8 / 256)):
        for form, beside in (("float32", 2 + 4), ("compensated", 2 + 2), ("stochastic", 2)):
            planned = plan_memory(full(optim, train={"weight_update": form}), LLAMA_3B, 2, on_gpu=True).adapter
            assert planned == pytest.approx(numbers * (beside + moments), rel=1e-6)
    frozen = {s: plan_memory(full(loss={"beta": 0.1, "reference_storage": s}), LLAMA_3B, 2, on_gpu=True).adapter
              for s in ("16bit", "8bit", "4bit")}  # fmt: skip
    without = plan_memory(full(), LLAMA_3B, 2, on_gpu=True).adapter
    assert frozen["16bit"] - without == 2 * numbers
    assert frozen["4bit"] < frozen["8bit"] < frozen["16bit"]


@pytest.mark.parametrize(
    ("gigabytes", "optim", "remedy"),
    [(10, "adamw", 'set train.optim = "paged_adamw_8bit"'), (24, "paged_adamw_8bit", "use a smaller model, or train")],
)
def test_what_does_not_fit_is_refused_with_what_takes_less(gigabytes, optim, remedy):
    settings = fit.with_weight_update(full(optim), LLAMA_8B, 2, (gigabytes * 10**9,) * 2)
    with pytest.raises(UserError, match=remedy) as error:
        fit.check_memory(settings, LLAMA_8B, 2, gigabytes * 10**9, gigabytes * 10**9)
    assert "gradients and moments" in str(error.value)


def test_a_dry_run_says_what_training_all_weights_takes_and_refuses_what_it_cannot():
    lines = summary.memory_plan(full(), gpu_named("H100 80GB HBM3"))
    assert any('train.weight_update = "float32"' in line for line in lines) and not any("adapter" in s for s in lines)
    with pytest.raises(UserError, match="has no bfloat16"):
        summary.memory_plan(full(), gpu_named("T4"))
