"""What a rollout is asked for and what it gives: settings, requests, completions. Nothing here knows vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.images import Image


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample; the same for every request of a call. `temperature` 0 is greedy."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = False
    """Look for the strings of `stop` in a text without special tokens."""


@dataclass(frozen=True)
class Request:
    """One completion to sample. On a CPU `seed` alone decides its random numbers; on a GPU see `Engine.generate`."""

    id: int
    prompt_ids: Sequence[int]
    seed: int
    max_tokens: int | None = None
    """None: as the sampling settings say."""
    images: Sequence[Image] = ()
    """Of the prompt, in the order of their placeholders."""
    continues: int | None = None
    """The id of a finished request that `prompt_ids` begins with, prompt and completion."""


@dataclass(frozen=True)
class Completion:
    """A finished completion: its token ids (with the end token, if it stopped) and their logprobs as sampled."""

    request_id: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    """ "stop" or "length"."""
    routes: Any = None
    """Of a mixture of experts: the experts of every token of the prompt and the completion but the last, a tensor
    [tokens, layers, top_k] of small integers on the engine's device; None of other models."""


@dataclass(frozen=True)
class Segment:
    """Tokens that follow one another: a prompt, and what came after it."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    sampled: Sequence[bool] | None = None
    """Which of `token_ids` the policy drew, the last one among them; None: each. The others are an environment's."""
    routes: Any = None
    """The experts that sampling chose for each token of a forward pass, as in `Completion`; None: not known."""
    images: Sequence[Image] = ()
    """Of the prompt, then of what an environment showed, in the order of their placeholders."""

    def __len__(self) -> int:
        """Tokens that a forward pass sees."""
        return len(self.prompt_ids) + len(self.token_ids) - 1

    @property
    def mask(self) -> Sequence[bool]:
        """`sampled`, spelt out."""
        return [True] * len(self.token_ids) if self.sampled is None else self.sampled


@dataclass(frozen=True)
class EngineSettings:
    """What vLLM is started with. `kv_cache_memory_bytes` None: planned from the lengths."""

    max_seq_length: int
    max_num_seqs: int
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    """Share of the GPU that weights, KV cache and vLLM's buffers may take; decides the KV cache instead."""
    kv_cache_dtype: str = "auto"
    attention_backend: str = "auto"
    enforce_eager: bool = False
    seed: int = 0
    stop_strings: bool = False
    release_kv_cache: bool = False
    """Make `Engine.release_kv_cache` possible, on a GPU."""
    graph_tokens: int = 0
    """Steps of up to so many tokens that read prompts are CUDA graphs as well, where the model's are; 0: none."""
