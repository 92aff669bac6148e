"""llama.cpp itself runs exported GGUF files, and predicts what transformers does with base and adapter.

xllamacpp is llama.cpp with a Python interface, cyllama has its quantiser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.test_gguf import FAMILIES as READ_BY_TRANSFORMERS
from tests.export.test_gguf import exported, made_with_tokenizer, read_by_transformers
from tests.helpers.adapters import TOKENS

xllamacpp = pytest.importorskip("xllamacpp")
pytestmark = [pytest.mark.wide, pytest.mark.slow]

FAMILIES: dict[str, dict[str, Any]] = {**READ_BY_TRANSFORMERS, "qwen3_5_text": {}, "gemma4_text": {}}
STEPS, LISTED = 10, 5
"""Tokens that are predicted one after another, and likeliest ones that are compared at each."""


def server(file: Path) -> Any:
    """llama.cpp with the model in `file`, its cache in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 64, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def likeliest(llama: Any, tokens: list[int]) -> dict[int, float]:
    """The likeliest tokens after `tokens` with their logprobs; none where the first is no whole character."""
    request = {"prompt": tokens, "n_predict": 1, "temperature": 0.0, "n_probs": LISTED, "ignore_eos": True}
    answer = llama.handle_completions(request)
    result = json.loads(answer) if isinstance(answer, str | bytes) else answer
    listed = (result["choices"][0].get("logprobs") or {}).get("content") or []
    return {entry["id"]: entry["logprob"] for step in listed[:1] for entry in step["top_logprobs"]}


@pytest.mark.parametrize(
    ("family", "kind", "most"),
    [*((family, "f16", 0.1) for family in FAMILIES), ("qwen3", "bf16", 0.3), ("llama", "q8_0", 1.5)],
)
def test_llama_cpp_predicts_what_transformers_does(family: str, kind: str, most: float, tmp_path: Path) -> None:
    made = made_with_tokenizer(tmp_path, family, **FAMILIES[family])
    llama = server(exported(made, kind))
    assert largest_gap(llama, as_written(made.peft.merge_and_unload().eval(), kind)) < most


def test_llama_cpp_runs_its_4_bits_as_transformers_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("cyllama")
    file = exported(made_with_tokenizer(tmp_path, hidden_size=256, intermediate_size=512), "q4_k_m")
    assert largest_gap(server(file), read_by_transformers(file)) < 1.5, "llama.cpp rounds activations to 8 bits"


def as_written(model: Any, kind: str) -> Any:
    """`model` with matrices as a file of a 16-bit `kind` has them; states add up what rounding them changes."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind)
    for weight in model.parameters():
        if dtype is not None and weight.dim() == 2:
            weight.data = weight.data.to(dtype).to(weight.dtype)
    return model


def largest_gap(llama: Any, model: Any) -> float:
    """Between logprobs of the likeliest tokens by llama.cpp and `model`, along the latter's greedy continuation."""
    tokens, gaps = TOKENS[0].tolist(), []
    for _ in range(STEPS):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, -1].float(), -1)
        gaps += [abs(value - float(logprobs[token])) for token, value in likeliest(llama, tokens).items()]
        tokens.append(int(logprobs.argmax()))
    assert len(gaps) >= 2 * LISTED, "some predictions are whole characters"
    return max(gaps)
