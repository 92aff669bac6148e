"""The memory plan against what is really stored, and its refusals."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config.schema import Config, Lora, parse_config
from grpo.errors import UserError
from grpo.memory import fit, plan, summary
from grpo.memory.activations import CHECKPOINTING_MODES, TrainingMemory
from grpo.memory.layer_sizes import has_wide_stream
from grpo.model.base_weights import BaseWeights
from grpo.model.expert_sizes import expert_sizes
from grpo.model.families.table import listed
from grpo.model.gguf_header import read_header
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from grpo.rollout.lora_buffers import RolloutAdapter
from tests.helpers.paths import ROOT
from tests.helpers.tiny import FAMILIES, save_tiny

LLAMA_8B = plan.Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False)
LLAMA_3B = plan.Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True)
H100 = 80_000_000_000


def config(name: str | Path = "m", **sections: Any) -> Config:
    model = {"name": str(name), **sections.pop("model", {})}
    return parse_config({"model": model, "task": {"name": "arithmetic"}, **sections})


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_adapter_are_planned_as_they_are_stored(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    shape = summary.model_shape(config(tmp_path).model)
    assert shape is not None
    for lora in (Lora(), Lora(r=4, target_modules=["q_proj", "o_proj", "down_proj"])):
        section = {"r": lora.r, "target_modules": lora.target_modules}
        settings = config(tmp_path, lora=section, model={"load_in_4bit": False})
        source = open_source(settings.model)
        base = BaseWeights(source, settings.model, device=torch.device("cpu"), dtype=torch.float32)
        planned = plan.weight_bytes(settings, shape, 4, on_gpu=False)
        assert planned == pytest.approx(base.nbytes(), rel=0.01)
        trained = sum(parameter.numel() for parameter in Policy(base, lora).parameters())
        served = RolloutAdapter(base, Policy(base, lora)).buffers.values()
        copies = sum(buffers.a.nbytes + buffers.b.nbytes for buffers in served)
        assert plan.adapter_bytes(settings, shape, 4, on_gpu=False) == 16 * trained + copies


def test_packed_weights_are_planned_as_nf4_allocates_them() -> None:
    from grpo.kernels import nf4

    stored = 0
    for rows, columns in plan.linear_shapes(LLAMA_3B).values():
        packed, absmax = nf4.allocate(rows, columns, torch.bfloat16, "meta")
        stored += packed.untyped_storage().nbytes() + absmax.untyped_storage().nbytes()
    stored += 2 * (128256 * 3072 + 57 * 3072)
    assert plan.weight_bytes(config(), LLAMA_3B, 2, on_gpu=True) == stored


def test_kept_modules_count_in_sixteen_bit() -> None:
    plain = plan.weight_bytes(config(), LLAMA_3B, 2, on_gpu=True)
    kept = plan.weight_bytes(config(model={"keep_16bit": ["layers.0.mlp.down_proj"]}), LLAMA_3B, 2, on_gpu=True)
    assert kept - plain == 3072 * 8192 * (2 - 0.53125)
    everything = plan.weight_bytes(config(model={"keep_16bit": ["down_proj"]}), LLAMA_3B, 2, on_gpu=True)
    assert everything - plain == 28 * (kept - plain)


def test_the_kv_cache_holds_every_sequence_in_whole_blocks() -> None:
    # 2 (keys, values) x 32 layers x 8 heads x 128 x 2 bytes a token
    assert 32 * plan.layer_token_bytes(LLAMA_8B, 2, "auto") == 131_072
    assert 32 * plan.layer_token_bytes(LLAMA_8B, 2, "fp8") == 65_536
    assert plan.kv_cache_bytes(LLAMA_8B, 2, "auto", 17, 10, 16) == (2 * 10 + 2) * 16 * 131_072


@pytest.mark.parametrize("experts", [(0, 0, 0), (64, 8, 1024)])
@pytest.mark.parametrize("wide", [name for name in listed() if has_wide_stream(replace(LLAMA_8B, model_type=name))])
def test_a_float32_residual_is_in_the_plan_of_sampling(wide: str, experts: tuple[int, int, int]) -> None:
    count, chosen, inner = experts
    sizes = {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": inner}
    shape, narrow = (replace(LLAMA_8B, model_type=name, vocab_size=64, **sizes) for name in (wide, "granitemoe"))
    more = plan.sampling_bytes(shape, 2, 512, 1) - plan.sampling_bytes(narrow, 2, 512, 1)
    assert expert_sizes(shape) == expert_sizes(narrow) and more == plan.BATCHED_TOKENS * LLAMA_8B.hidden_size * 2
    assert plan.sampling_bytes(shape, 4, 512, 1) == plan.sampling_bytes(narrow, 4, 512, 1)


def test_a_dry_run_shows_every_part_and_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes(LLAMA_8B)}))
    monkeypatch.setattr(summary, "has_gpu", lambda: True)
    text = "\n".join(summary.memory_plan(config(tmp_path, rollout={"max_num_seqs": 64})))
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert f"{(linears * 0.53125 + 2 * 2 * 128256 * 4096 + 65 * 4096 * 2) / 1e9:.2f}  weights, NF4" in text
    assert (
        f"{(64 * 64 + 2) * 16 * 131_072 / 1e9:.2f}  KV cache: 64 sequences of 1,024 tokens; less where the GPU" in text
    )
    assert "vLLM's buffers" in text and "at most, while sampling" in text
    training = TrainingMemory.of(config(), LLAMA_8B, 2, on_gpu=True)
    assert f"{training.peak('offload') / 1e9:.2f}  at most, while training on 8,192 tokens" in text
    assert all(f"{mode} {training.peak(mode) / 1e9:.2f}" in text for mode in CHECKPOINTING_MODES)
    assert "adapter of rank 16" in text


def sizes(shape: plan.Shape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__ if name != "model_type"}


@pytest.mark.parametrize("name", ["nobody/has-this-model", "m"])
def test_a_model_that_is_not_here_is_said_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert summary.memory_plan(config(name)) == [
        f"Memory: the sizes of {name} are not known here, so nothing is planned."
    ]


def test_an_unknown_architecture_is_not_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 8}')
    assert "nothing is planned" in summary.memory_plan(config(tmp_path))[0]
    (tmp_path / "config.json").write_text("[]")
    assert "nothing is planned" in summary.memory_plan(config(tmp_path))[0]


# GGUF


def gguf_bytes(metadata: dict[str, Any], tensors: list[str]) -> bytes:
    """A GGUF file without weights."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(entry: Any) -> bytes:
        if isinstance(entry, str):
            return struct.pack("<I", 8) + string(entry)
        if isinstance(entry, list) and isinstance(entry[0], str):
            return struct.pack("<IIQ", 9, 8, len(entry)) + b"".join(map(string, entry))
        if isinstance(entry, list):
            return struct.pack("<IIQ", 9, 6, len(entry)) + struct.pack(f"<{len(entry)}f", *entry)
        return struct.pack("<II", 4, entry)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    entries = b"".join(string(key) + value(entry) for key, entry in metadata.items())
    infos = b"".join(string(name) + struct.pack("<IQQIQ", 2, 64, 64, 0, 0) for name in tensors)
    return head + entries + infos


METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "tokenizer.ggml.scores": [0.0, 1.0, 2.0],
    "tokenizer.ggml.tokens": ["a", "é", "c"],
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
}


def test_a_gguf_file_states_its_sizes(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(METADATA, ["token_embd.weight", "blk.0.attn_q.weight"]))
    assert summary.model_shape(config(file).model) == plan.Shape("llama", 576, 1536, 30, 9, 3, 64, 3, True)
    file.write_bytes(gguf_bytes(METADATA, ["token_embd.weight", "output.weight"]))
    assert summary.model_shape(config(file).model) == plan.Shape("llama", 576, 1536, 30, 9, 3, 64, 3, False)
    assert read_header(file)[1] == {"token_embd.weight", "output.weight"}


@pytest.mark.parametrize("cut", [2, 20, 60, 200])
def test_a_damaged_gguf_file_is_one_sentence(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(METADATA, ["token_embd.weight"])[:cut])
    with pytest.raises(UserError, match="m.gguf: not a (readable )?GGUF file"):
        summary.memory_plan(config(file))


# Refusing


def test_a_planned_kv_cache_takes_what_it_needs_or_what_is_left() -> None:
    short = config(rollout={"max_num_seqs": 16})
    needed = plan.kv_cache_bytes(LLAMA_8B, 2, "auto", 1024, 16, 16)
    assert fit.check_memory(short, LLAMA_8B, 2, H100, H100) == needed
    long = config(rollout={"max_completion_length": 20_000, "max_num_seqs": 256})
    fitted = fit.check_memory(long, LLAMA_8B, 2, H100, H100)
    planned = plan.plan_memory(long, LLAMA_8B, 2, on_gpu=True)
    assert planned.kv_one_sequence < fitted < planned.kv_cache
    assert planned.peak(fitted) <= fit.usable_bytes(H100, H100)


def test_what_the_configuration_sets_is_obeyed() -> None:
    fixed = config(rollout={"kv_cache_memory_bytes": 5_000_000_000})
    assert fit.check_memory(fixed, LLAMA_8B, 2, H100, H100) == 5_000_000_000
    share = config(rollout={"gpu_memory_utilization": 0.5})
    assert fit.check_memory(share, LLAMA_8B, 2, H100, H100) is None


@pytest.mark.parametrize(
    ("sections", "free", "remedy"),
    [
        ({}, 8, "use a smaller model"),
        ({"model": {"load_in_4bit": False}}, 16, "set model.load_in_4bit = true"),
        ({"rollout": {"kv_cache_memory_bytes": 70_000_000_000}}, 80, "lower rollout.kv_cache_memory_bytes"),
        ({"rollout": {"gpu_memory_utilization": 0.98}}, 80, "lower rollout.gpu_memory_utilization"),
        ({"train": {"tokens_per_micro_batch": 400_000}}, 40, "lower train.tokens_per_micro_batch"),
        ({"train": {"gradient_checkpointing": False}}, 30, 'set train.gradient_checkpointing = "auto"'),
        (
            {"train": {"logprob_chunk_tokens": 100_000, "tokens_per_micro_batch": 100_000}},
            30,
            "lower train.logprob_chunk_tokens",
        ),
        ({"rollout": {"max_completion_length": 120_000}, "train": {"tokens_per_micro_batch": 1}}, 30, "lower"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_with_the_plan_and_a_remedy(
    sections: dict[str, Any], free: int, remedy: str
) -> None:
    with pytest.raises(UserError) as caught:
        fit.check_memory(config(**sections), LLAMA_8B, 2, free * 10**9, 80 * 10**9)
    sentence = str(caught.value)
    assert sentence.startswith(f"the GPU has {free:.1f} GB free, and the run needs ")
    assert all(part in sentence for part in ("weights", "KV cache", "adapter"))
    assert "sampling" in sentence or ("activations" in sentence and "logits" in sentence)
    assert remedy in sentence.rpartition("; ")[2]


def test_taking_the_advice_makes_the_run_fit() -> None:
    with pytest.raises(UserError, match="set model.load_in_4bit = true"):
        fit.check_memory(config(model={"load_in_4bit": False}), LLAMA_8B, 2, 16 * 10**9, 16 * 10**9)
    assert fit.check_memory(config(), LLAMA_8B, 2, 16 * 10**9, 16 * 10**9)


def test_sampling_and_training_take_turns() -> None:
    planned = plan.plan_memory(config(), LLAMA_8B, 2, on_gpu=True)
    always = planned.weights + planned.adapter + planned.vllm
    assert planned.peak(10**9) == always + 10**9 + max(planned.sampling, planned.training)


def test_a_released_kv_cache_leaves_its_memory_to_training() -> None:
    """With the cache released, training may take what the cache had, and the cache what training had."""
    sections: dict[str, Any] = {"train": {"tokens_per_micro_batch": 200_000}, "rollout": {"max_num_seqs": 256}}
    kept = plan.plan_memory(config(**sections), LLAMA_8B, 2, on_gpu=True)
    sections["rollout"] |= {"release_kv_cache": True}
    released = plan.plan_memory(config(**sections), LLAMA_8B, 2, on_gpu=True)
    assert kept.training > kept.sampling
    assert kept.peak(20 * 10**9) == kept.always + 20 * 10**9 + kept.training
    assert released.peak(20 * 10**9) == released.always + max(20 * 10**9 + released.sampling, released.training)
    gained = released.room_for_kv(60 * 10**9, kept.mode) - kept.room_for_kv(60 * 10**9, kept.mode)
    assert gained == kept.training - kept.sampling


RESULTS = ROOT / "benchmarks" / "results"


def measured_peaks() -> list[Any]:
    """What steps of Llama-3.1-8B's shape took on a GPU: mode, tokens, rank, bytes of a moment, chunk, peak."""
    longest = json.loads((RESULTS / "longest_context.json").read_text())
    rows = [("offload", row["tokens"], 32, 2, 256, row["max_allocated"]) for row in longest["rows"] if row.get("fits")]
    steps = json.loads((RESULTS / "train_step_8b.json").read_text())["step"]
    return rows + [(mode, 16384, 16, 8, 2048, steps[f"triton/{mode}"]["peak_bytes"]) for mode in ("none", "mlp")]


@pytest.mark.parametrize("row", measured_peaks(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_peak_of_a_step_is_what_a_gpu_measured(row: Any) -> None:
    """Weights, adapter, gradients, moments and the phases of the step, within 1 %."""
    mode, tokens, rank, moments, chunk, peak = row
    settings = config(lora={"r": rank}, train={"tokens_per_micro_batch": tokens, "logprob_chunk_tokens": chunk})
    training = replace(TrainingMemory.of(settings, LLAMA_8B, 2, on_gpu=True, tokens=tokens), keys=tokens)
    adapter = training.sizes.adapter * training.sizes.layers * (4 + 4 + moments)
    planned = plan.weight_bytes(settings, LLAMA_8B, 2, on_gpu=True) + adapter + training.peak(mode)
    assert planned == pytest.approx(peak, rel=0.01)
