"""grpo/run/compile_ahead.py and ahead_worker.py: a run's launches are known before anything is loaded, each kernel is
compiled by one process, and what is done is not done again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo.config.schema import Config, parse_config
from grpo.kernels import cards
from grpo.run import ahead_worker, compile_ahead
from grpo.run.compile_ahead import capture_sizes, launches_of
from tests.helpers.card_launches import BY_NAME
from tests.helpers.paths import ROOT

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "tie_word_embeddings": True,
}  # fmt: skip


def never(architecture: int) -> bool:
    return False


def config_of(folder: Path, values: dict[str, Any], **sections: dict[str, Any]) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    model = {"name": str(folder), "load_in_4bit": True, **sections.pop("model", {})}
    base = {"task": {"name": "arithmetic"}, "checkpoint": {"output_dir": str(folder / "run")}}
    return parse_config({"model": model, **base, **sections})


@pytest.mark.parametrize(
    ("model_type", "card", "packed", "own"),
    [
        *(("llama", card, packed, False) for card in ("sm_75", "sm_80", "sm_90") for packed in (True, False)),
        *((model_type, "sm_90", True, True) for model_type in ("llama", "qwen2", "qwen3", "gemma3_text", "mistral")),
    ],
)
def test_every_launch_of_a_usual_decoder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, card: str, packed: bool, own: bool
) -> None:
    """As far as Triton asks whether to compile: nothing fails, and forward, backward and sampling are among them."""
    activation = (
        {"hidden_activation": "gelu_pytorch_tanh"} if model_type.startswith("gemma") else {"hidden_act": "silu"}
    )
    sizes = SIZES | activation | {"model_type": model_type}
    config = config_of(tmp_path, sizes, model={"load_in_4bit": packed}, rollout={"max_num_seqs": 128})
    work = launches_of(config)
    assert work is not None
    asked: list[str] = []

    def leave(claims: ahead_worker.Claims, *, fn: Any, **others: Any) -> bool:
        asked.append(fn.name.rpartition(".")[2])
        return True

    monkeypatch.setattr(ahead_worker.Claims, "__call__", leave)
    monkeypatch.setattr("triton.knobs.runtime.jit_cache_hook", None)
    names = {name: getattr(BY_NAME[card], name) for name in cards.Card.__dataclass_fields__}
    taken, failed = ahead_worker.run({**work, "card": names | {"name": "H100"}, "own_decoding": own}, tmp_path)
    assert failed == [] and taken == []
    wanted = {"_rotate_kernel", "_backward_kernel", "_pack_lora_kernel", "_softmax_stats_kernel", "_piece_kernel"}
    assert wanted <= set(asked)
    assert ("_decode_kernel" in asked) == own
    assert ("_norm_kernel" in asked) == (own and model_type != "gemma3_text")
    assert ("_dequantize_kernel" in asked) == packed == ("_quantize_kernel" in asked)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    r=st.integers(1, 128), targets=st.sets(st.sampled_from(["q_proj", "k_proj", "v_proj", "up_proj"]), min_size=1)
)  # fmt: skip
def test_ranks_are_those_of_the_served_buffers(tmp_path: Path, r: int, targets: set[str]) -> None:
    config = config_of(tmp_path, SIZES | {"model_type": "llama"}, lora={"r": r, "target_modules": sorted(targets)})
    work = launches_of(config)
    assert work is not None
    for name, parts in (("qkv_proj", {"q_proj", "k_proj", "v_proj"}), ("gate_up_proj", {"up_proj"}), ("o_proj", set())):
        count = r * len(parts & targets)
        assert 0 <= work["linears"][name]["ranks"] - count < 16 and work["linears"][name]["ranks"] % 16 == 0


@pytest.mark.parametrize(
    ("values", "sections"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, {}),
        ({"model_type": "llama"}, {"model": {"load_in_4bit": False, "load_in_8bit": True}}),
        ({"model_type": "llama"}, {"train": {"kernels": "torch"}}),
        ({"model_type": "unheard_of"}, {}),
    ],
)
def test_what_is_not_known_is_left_to_the_run(tmp_path: Path, values: dict[str, Any], sections: dict[str, Any]) -> None:
    assert launches_of(config_of(tmp_path, SIZES | values, **sections)) is None


def test_a_cpu_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("a process was started"))
    assert not compile_ahead.begin(config_of(tmp_path, SIZES | {"model_type": "llama"}, model={"device": "cpu"}), never)
    monkeypatch.setattr(compile_ahead.metadata, "version", lambda package: "2.13.0+cpu")
    assert compile_ahead.driver_card() is None, "torch would not use the GPU"


@given(st.integers(1, 256), st.integers(0, 1 << 40))
def test_processes_leave_cores_and_half_the_memory(cores: int, memory: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compile_ahead, "cores", lambda: cores)
        patched.setattr(compile_ahead, "free_memory", lambda: memory)
        count = compile_ahead.processes()
    assert 0 <= count <= compile_ahead.PROCESSES and count * compile_ahead.PROCESS_BYTES <= memory / 2
    assert count == 0 if cores < 4 else count <= cores - 2


def room_for(count: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU and a machine for `count` processes; the record of what they compile."""
    card = {name: getattr(BY_NAME["sm_90"], name) for name in cards.Card.__dataclass_fields__}
    monkeypatch.setattr(compile_ahead, "driver_card", lambda: card)
    monkeypatch.setattr(compile_ahead, "processes", lambda: count)
    monkeypatch.setattr(compile_ahead, "_begun", [])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(config.checkpoint.output_dir.parent / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return compile_ahead.record({**(launches_of(config) or {}), "card": card, "own_decoding": False})


@pytest.mark.parametrize(
    ("codes", "noted"), [((0, 0), True), ((0, 3), True), ((0, 1), False), ((-9, 0), False), ((-14, 3), False)]
)
def test_only_processes_that_ended_by_themselves_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...], noted: bool
) -> None:
    """What a process cannot compile, it cannot at the next start; one that was ended may."""
    config = config_of(tmp_path, SIZES | {"model_type": "llama"})
    done, left, started = room_for(2, config, monkeypatch), list(codes), subprocess.Popen

    def ending(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        code = left.pop()
        end = f"import os; os.kill(os.getpid(), {-code})" if code < 0 else f"raise SystemExit({code})"
        return started([sys.executable, "-c", end])

    monkeypatch.setattr(compile_ahead.tied, "start", ending)
    waited: list[Any] = []
    monkeypatch.setattr(compile_ahead.threading, "Thread", lambda **options: waited.append(options) or Unstarted())
    assert compile_ahead.begin(config, never)
    waited[0]["target"](*waited[0]["args"])
    assert done.exists() == noted and not Path(waited[0]["args"][1]).exists()


class Unstarted:
    def start(self) -> None:
        """Nothing."""


def test_a_machine_that_has_no_further_process_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, SIZES | {"model_type": "llama"})
    room_for(3, config, monkeypatch)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert not compile_ahead.begin(config, never) and not compile_ahead.begun()


def test_kernels_that_are_interpreted_are_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, SIZES | {"model_type": "llama"})
    room_for(2, config, monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("a process was started"))
    assert not compile_ahead.begin(config, never)


@pytest.mark.wide
def test_two_processes_share_the_kernels_and_a_second_start_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes compile for a card that is not there, into a cache of their own."""
    config = config_of(tmp_path, SIZES | {"model_type": "llama"}, rollout={"max_num_seqs": 1, "num_generations": 2})
    card = {name: getattr(BY_NAME["sm_90"], name) for name in cards.Card.__dataclass_fields__}
    monkeypatch.setattr(compile_ahead, "driver_card", lambda: card)
    monkeypatch.setattr(compile_ahead, "PROCESSES", 2)
    monkeypatch.setattr(compile_ahead, "_begun", [])
    monkeypatch.setattr(compile_ahead, "cores", lambda: 8)
    monkeypatch.setattr(compile_ahead, "free_memory", lambda: 64 << 30)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert compile_ahead.begin(config, never) and compile_ahead.begun() and len(compile_ahead._begun) == 2
    work = launches_of(config)
    assert work is not None
    done = compile_ahead.record({**work, "card": card, "own_decoding": False})
    ends = time.monotonic() + 120
    while not done.exists() and time.monotonic() < ends:
        time.sleep(0.1)
    assert done.exists(), [process.poll() for process in compile_ahead._begun]
    binaries = [file.name for file in (tmp_path / "triton").rglob("*.cubin")]
    assert {"_rotate_kernel.cubin", "_gemm_kernel.cubin", "_softmax_stats_kernel.cubin"} <= set(binaries)
    assert not compile_ahead.begin(config, never), "all is in the cache"
    changed = config.model_copy(update={"lora": config.lora.model_copy(update={"r": 64})})
    assert compile_ahead.record({**(launches_of(changed) or {}), "card": card, "own_decoding": False}) != done


def test_claims_give_a_kernel_to_one_process(tmp_path: Path) -> None:
    class Kernel:
        module, name = "here", "kernel"

    one, other = ahead_worker.Claims(tmp_path), ahead_worker.Claims(tmp_path)
    left = [claims(key=key, fn=Kernel) for key in ("a", "b") for claims in (one, other)]
    assert left == [False, True, False, True] and one.taken == ["kernel", "kernel"] and other.taken == []


def test_nothing_of_it_loads_torch() -> None:
    code = "import grpo.run.compile_ahead, grpo.rollout.import_ahead, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "False"


@given(st.integers(1, 2000))
def test_the_largest_batch_is_captured(sequences: int) -> None:
    sizes = capture_sizes(sequences)
    assert sizes == sorted(set(sizes)) and sizes[-1] == sequences and sizes[0] == 1
    assert all(after - before <= max(16, before) for before, after in zip(sizes, sizes[1:], strict=False))


def test_a_machine_without_a_driver_has_no_card() -> None:
    card = compile_ahead.driver_card()
    assert (card is None) == (not torch.cuda.is_available())
