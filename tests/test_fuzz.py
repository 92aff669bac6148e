"""Readers of foreign bytes: for any bytes they succeed or refuse in one line, and what headers claim allocates nothing.

Bytes at random seldom get past a magic number, so good files with a few bytes changed, cut or doubled come too. A
fuzzer that is guided by coverage runs on the same readers in `make test-long`.
"""

from __future__ import annotations

import functools
import io
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from grpo.errors import UserError
from grpo.model.gguf_header import read_header
from tests.helpers.fuzz_targets import TARGETS, feed
from tests.helpers.small_chat import save_small_chat_model

MINIMAL = Path(__file__).parent / "data" / "minimal.toml"
EXAMPLES = {
    "configuration": MINIMAL.read_bytes() + b"[train]\nlearning_rate = 1e-5\n",
    "override": b'rewards.0.options.x={ a = [1, "b"] }',
    "shard_index": b'{"weight_map": {"a.weight": "model-1.safetensors"}}',
    "model_configuration": b'{"model_type": "llama", "hidden_size": 64, "text_config": {"vocab_size": 9}}',
    "generation_configuration": b'{"eos_token_id": [1, 2]}',
    "adapter_configuration": b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}',
    "state_structure": b'{"dict": [["step", 3], ["list", {"list": [1, {"tuple": [null, "x"]}]}]]}',
    "manifest": b'{"step": 1, "files": {"state": "00ff"}}',
    "json_lines": b'{"question": "1 + 1?", "answer": "2"}\n{"question": "?"}\n',
    "csv_rows": b'question,answer\n"1 + 1?",2\n',
    "recorded_metrics": b'{"step": 1, "loss": null}\n{"step": 2, "loss": 0.5}\n',
    "completion": b"<think>1 + 1</think><answer>\\boxed{2}</answer> #### 2\x1b[2J",
    "dump_report": b'{"step": 1, "problem": "x", "figures": {"loss": "nan"}}',
    "weights_header": b'{"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}',
}  # fmt: skip


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def entry(name: str, kind: int, value: bytes) -> bytes:
    """A key of GGUF's metadata."""
    return string(name) + struct.pack("<I", kind) + value


@functools.cache
def good_examples() -> dict[str, bytes]:
    """A good input for every reader."""
    import torch

    gguf = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + entry("a", 8, string("llama")) + entry("b", 4, struct.pack("<I", 2))
    gguf += entry("c", 9, struct.pack("<IQ", 8, 2) + string("x") + string("y"))
    gguf += string("w") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)
    state = save({"0": torch.ones(3)}, metadata={"structure": '{"list": [{"tensor": "0"}, 1.5]}'})
    whole = {
        "gguf_header": gguf,
        "gguf_after_the_magic": gguf[8:],
        "weights": save({"a": torch.ones(3)}),
        "saved_state": state,
    }
    return {**EXAMPLES, **whole}


@st.composite
def changed(draw: Callable, good: bytes) -> bytes:
    """`good` with a few changes."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["byte", "cut", "insert", "number", "double"])):
            case "byte" if data:
                data[place] = draw(st.integers(0, 255))
            case "cut":
                del data[place : place + draw(st.integers(1, 64))]
            case "insert":
                data[place:place] = draw(st.binary(max_size=16))
            case "number":
                big = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]))
                data[place : place + 8] = struct.pack("<Q", big)
            case "double":
                data += data[place:]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    example = good_examples()[name]

    @settings(max_examples=60)
    @given(st.one_of(st.binary(max_size=200), changed(example)))
    def check(data: bytes) -> None:
        feed(name, data)

    TARGETS[name](example, tmp_path)  # is not refused
    feed(name, b"[" * 100_000)
    check()


CLAIMS = {
    "a string of 2^62 bytes": struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**62),
    "2^60 tensors": struct.pack("<QQ", 2**60, 0),
    "2^60 entries": struct.pack("<QQ", 0, 2**60),
    "an array of 2^60 numbers": struct.pack("<QQ", 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**60),
    "an array of 2^60 strings": struct.pack("<QQ", 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60),
    "a tensor of 2^32 dimensions": struct.pack("<QQ", 1, 0) + struct.pack("<Q1sI", 1, b"a", 2**32 - 1),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_gguf_header_claims_is_not_allocated(claim: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + CLAIMS[claim])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="not a readable GGUF file"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 2**18), ("intermediate_size", 2**20), ("vocab_size", 2**23)]
)
def test_what_a_model_configuration_claims_is_not_allocated(key: str, value: int, tmp_path: Path) -> None:
    """The largest sizes that are believed: a tensor of them would take gigabytes."""
    from grpo.config.schema import parse_config
    from grpo.session import open_session
    from tests.helpers.tiny_run import run_tables

    save_small_chat_model(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match="files belong together"):
        open_session(parse_config(run_tables(tmp_path)), start_engine=False)


def test_a_defect_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "raises", lambda data, folder: io.BytesIO(data).fileno())
    with pytest.raises(io.UnsupportedOperation):
        feed("raises", b"")
    assert str(UserError("one\ntwo")) == "one two"
