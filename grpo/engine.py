"""Generation: vLLM serving from `BaseWeights`, with the adapter inside our own linear layers. The only file that
knows vLLM's insides.

vLLM builds its model with empty linear layers; our loader gives them the storage that the training graph uses. A
quantisation method (vLLM's plugin interface) multiplies with it and adds the adapter from two buffers a layer, which
`sync_adapter` refreshes after an optimiser step. vLLM's own LoRA is not used: it would need per-token adapter
look-ups for a batch that always shares one adapter. Token ids go in and come out; text is none of this file's business.
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: the storage is shared by address
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.device_allocator import cumem
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from grpo.architectures import ARCHITECTURES
from grpo.base import BaseWeights, FusedLinear, Segment
from grpo.errors import UserError
from grpo.generation import Completion, EngineSettings, Request, SamplingSettings
from grpo.kernels.lora_shrink import lora_shrink
from grpo.kernels.nf4_gemm import LowRank, nf4_linear, prepare
from grpo.kernels.sample import sample_tokens
from grpo.plan import CPU_BLOCK, GPU_BLOCK, VLLM_BUFFERS, kv_cache_bytes
from grpo.policy import Policy
from grpo.served_adapter import ServedAdapter

SHARED = "grpo_shared"
"""Name of our quantisation method and load format in vLLM."""

VLLM_TESTED = ((0, 26), (0, 33))
"""First and last minor version that this file was written for."""


class Engine:
    """vLLM in this process, on the storage of a `BaseWeights`."""

    def __init__(self, base: BaseWeights, policy: Policy | None, settings: EngineSettings, tokenizer: Any = None):
        """Start vLLM. `policy` supplies the adapter; None serves the base alone. Stop strings need `tokenizer`."""
        check_version()
        self.base, self.policy, self.settings = base, policy, settings
        self.adapter = ServedAdapter(base, policy)
        self.between_steps: Callable[[], None] = lambda: None  # may raise, which ends a generation
        self._kv_cache_is_released = False
        self._folder = tempfile.TemporaryDirectory(prefix="grpo-model-")
        write_model_folder(Path(self._folder.name), base, tokenizer if settings.stop_strings else None)
        handle = str(id(self))
        SERVED[handle] = self
        self._handle = handle
        if base.device.type == "cuda":
            prepare(base.device)
            torch.cuda.synchronize()  # vLLM changes the stream, and its new one does not wait for the weights
        if base.device.type == "cpu":
            # vLLM compiles a helper of its sampler: seconds at the first rollout, and a C++ compiler needed.
            torch.compiler.set_stance("force_eager")
        self.llm = vllm.LLM(**self._arguments(handle))
        if base.device.type == "cuda":
            self._runner.sampler = self.sampler = OnePassSampler(logprobs_mode="processed_logprobs")
        if policy is not None:
            self.sync_adapter()

    def _arguments(self, handle: str) -> dict[str, Any]:
        settings, on_cpu = self.settings, self.base.device.type == "cpu"
        arguments: dict[str, Any] = {
            "model": self._folder.name,
            "skip_tokenizer_init": not settings.stop_strings,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "quantization": SHARED,
            "load_format": SHARED,
            "model_loader_extra_config": {"engine": handle},
            "max_model_len": settings.max_seq_length,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": max(8192, settings.max_seq_length),
            "kv_cache_memory_bytes": self.kv_bytes(),
            "kv_cache_dtype": settings.kv_cache_dtype,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "seed": settings.seed,
            "disable_log_stats": True,
            "enable_prefix_caching": True,
            "scheduler_cls": patient_scheduler(Scheduler if on_cpu else AsyncScheduler),
            "enforce_eager": settings.enforce_eager or on_cpu,
        }
        if on_cpu:
            arguments["block_size"] = CPU_BLOCK
        else:
            arguments["gpu_memory_utilization"] = 0.05
            if settings.release_kv_cache:
                arguments["enable_cumem_allocator"] = True
            if not settings.enforce_eager:
                arguments["compilation_config"] = {
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": capture_sizes(settings.max_num_seqs),
                }
        return arguments

    def kv_bytes(self) -> int:
        """Size of the KV cache: as set, or what `gpu_memory_utilization` leaves, or enough for every sequence.

        Raises UserError when the GPU's share leaves no room for one sequence of full length.
        """
        settings = self.settings
        if settings.kv_cache_memory_bytes is not None:
            return settings.kv_cache_memory_bytes
        if settings.gpu_memory_utilization is None or self.base.device.type == "cpu":
            return self.kv_bytes_for(settings.max_num_seqs)
        total = torch.cuda.get_device_properties(self.base.device).total_memory
        left = int(settings.gpu_memory_utilization * total) - torch.cuda.memory_allocated() - VLLM_BUFFERS
        if left < self.kv_bytes_for(1):
            raise UserError(
                f"rollout.gpu_memory_utilization = {settings.gpu_memory_utilization}: of {total / 1e9:.1f} GB, "
                f"{torch.cuda.memory_allocated() / 1e9:.1f} GB are weights and {VLLM_BUFFERS / 1e9:.1f} GB vLLM's "
                f"buffers, which leaves too little for one sequence of {settings.max_seq_length} tokens; raise it, or "
                "lower rollout.max_completion_length"
            )
        return left

    def kv_bytes_for(self, sequences: int) -> int:
        """KV cache in which so many sequences reach their full length, in bytes."""
        block = CPU_BLOCK if self.base.device.type == "cpu" else GPU_BLOCK
        settings, itemsize = self.settings, self.base.dtype.itemsize
        return kv_cache_bytes(
            self.base.config, itemsize, settings.kv_cache_dtype, settings.max_seq_length, sequences, block
        )

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, adapter: bool = True
    ) -> Iterator[Completion]:
        """Sample all `requests`, yielding each as it finishes. `adapter` False samples from the base.

        On a CPU each request's own seed decides its tokens. On a GPU vLLM would launch a kernel a row for that, so
        there the generator is seeded once a call, from the first request.
        """
        for output in self._outputs(requests, sampling, RequestOutputKind.FINAL_ONLY, adapter):
            if output.finished:
                yield completion(output)

    def stream(self, request: Request, sampling: SamplingSettings, *, adapter: bool = True) -> Iterator[list[int]]:
        """Sample one completion, yielding its token ids as they come. Closing the iterator ends it."""
        for output in self._outputs([request], sampling, RequestOutputKind.DELTA, adapter):
            yield list(output.outputs[0].token_ids)

    def _outputs(
        self, requests: Sequence[Request], sampling: SamplingSettings, kind: RequestOutputKind, adapter: bool
    ) -> Iterator[Any]:
        """vLLM's outputs for `requests`, which are aborted if nobody takes them all."""
        self._switch_adapter(adapter)
        self._restore_kv_cache()
        core = self.llm.llm_engine
        on_gpu = self.base.device.type == "cuda"
        if on_gpu and requests:
            torch.cuda.manual_seed(requests[0].seed)
            self.sampler.begin(sampling, requests[0].seed)
        for request in requests:
            core.add_request(
                str(request.id),
                {"prompt_token_ids": list(request.prompt_ids)},
                self._params(sampling, None if on_gpu else request.seed, kind),
            )
        collects = gc.isenabled()
        gc.disable()  # vLLM makes some thousand objects a step; walking all others over and over costs a tenth of it
        try:
            while core.has_unfinished_requests():
                self.between_steps()
                yield from core.step()
        finally:
            if collects:
                gc.enable()
            if core.has_unfinished_requests():
                core.abort_request([str(request.id) for request in requests])
                while core.has_unfinished_requests():
                    core.step()

    def _params(self, sampling: SamplingSettings, seed: int | None, kind: RequestOutputKind) -> SamplingParams:
        return SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=seed if sampling.temperature > 0 else None,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the configuration's end tokens are in stop_token_ids if they are wanted
            stop=list(sampling.stop) or None,
            include_stop_str_in_output=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            output_kind=kind,
        )

    def _switch_adapter(self, enabled: bool) -> None:
        if self.adapter.switch(enabled):
            self._forget_prefixes()

    @torch.no_grad()
    def sync_adapter(self) -> float:
        """Copy the trained adapter into the buffers and forget cached prefixes; returns seconds."""
        start = time.perf_counter()
        self.adapter.copy_trained()
        self._forget_prefixes()
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _forget_prefixes(self) -> None:
        """Cached keys and values belong to the adapter that computed them."""
        if hasattr(self, "llm") and not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache because requests are in flight; completions would be stale")

    def release_kv_cache(self) -> None:
        """Give the KV cache's memory to whoever asks for it next; the next generation takes it back.

        Addresses stay reserved, so CUDA graphs stay valid. Does nothing unless `settings.release_kv_cache` on a GPU.
        torch goes on counting the cache as allocated; the driver does not.
        """
        if not self.settings.release_kv_cache or self._kv_cache_is_released or self.base.device.type != "cuda":
            return
        core = self.llm.llm_engine.engine_core.engine_core
        while core.batch_queue:  # asynchronous scheduling may have launched one step too many
            core.step_fn()
        self._forget_prefixes()
        torch.cuda.synchronize()
        for allocation in kv_cache_allocations():
            cumem.unmap_and_release(allocation.handle)
            allocation.is_asleep = True
        self._kv_cache_is_released = True

    def _restore_kv_cache(self) -> None:
        if not self._kv_cache_is_released:
            return
        torch.cuda.empty_cache()
        for allocation in kv_cache_allocations():
            cumem.create_and_map(allocation.handle)
            allocation.is_asleep = False
        self._runner.post_kv_cache_wake_up()
        self._kv_cache_is_released = False

    @property
    def _runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.model_runner

    def vllm_model(self) -> nn.Module:
        """vLLM's module tree, for tests of storage identity."""
        return self._runner.model

    def close(self) -> None:
        """Stop vLLM and give its memory back."""
        SERVED.pop(self._handle, None)
        if hasattr(self, "llm"):
            self._restore_kv_cache()
            shutdown = getattr(self.llm.llm_engine.engine_core, "shutdown", None)
            if shutdown is not None:
                shutdown()
            del self.llm
        self._folder.cleanup()
        gc.collect()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()


SERVED: dict[str, Engine] = {}
"""Engines by the handle that reaches our loader through vLLM's configuration."""


def kv_cache_allocations() -> list[Any]:
    """vLLM's records of the memory that holds the KV cache."""
    allocations = cumem.CuMemAllocator.get_instance().pointer_to_data.values()
    return [allocation for allocation in allocations if allocation.tag == "kv_cache"]


class PatientBlocks:
    """vLLM's manager of KV blocks, asked only when a sequence reaches the end of its last block.

    vLLM asks at every token of every sequence, a fifth of what the host does in a step; between a block's first token
    and its last the answer is always "none needed" and "nothing new to share".
    """

    def __init__(self, manager: Any, block_size: int):
        self._manager, self._block_size = manager, block_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def allocate_slots(self, request: Any, num_new_tokens: int, **options: Any) -> Any:
        inside = num_new_tokens == 1 and request.num_computed_tokens % self._block_size != 0
        if inside and options.keys() <= {"num_lookahead_tokens"} and not any(options.values()):
            return self._manager.empty_kv_cache_blocks
        return self._manager.allocate_slots(request, num_new_tokens, **options)

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens % self._block_size == 0:
            self._manager.cache_blocks(request, num_computed_tokens)


def patient_scheduler(kind: type) -> type:
    """vLLM's scheduler class `kind` with `PatientBlocks`."""

    class PatientScheduler(kind):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            groups = self.kv_cache_config.kv_cache_groups
            if {group.kv_cache_spec.block_size for group in groups} == {self.block_size}:
                self.kv_cache_manager: Any = PatientBlocks(self.kv_cache_manager, self.block_size)

    return PatientScheduler


class OnePassSampler(Sampler):
    """vLLM's sampler, with plain temperature sampling in one pass over the logits (kernels/sample.py).

    vLLM's own makes float32 copies, probabilities, noise and ranks of [sequences, vocabulary]: half a millisecond of a
    step of 128 sequences. Whatever else is asked for (greedy, top-p, top-k, min-p) is left to it.
    """

    _is_plain = False

    def begin(self, sampling: SamplingSettings, seed: int) -> None:
        """Prepare for one call of `generate`; `seed` decides its random numbers."""
        filtered = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
        self._is_plain, self._seed, self._step = sampling.temperature > 0 and not filtered, seed, 0

    def forward(self, logits: Tensor, sampling_metadata: Any, *arguments: Any, **options: Any) -> SamplerOutput:
        if not self._is_plain:
            return super().forward(logits, sampling_metadata, *arguments, **options)
        self._step += 1
        seed = (self._seed * 1_000_003 + self._step) % 2**63
        tokens, logprobs = sample_tokens(logits, sampling_metadata.temperature, seed)
        # The rank of a token is not asked for; its place must be filled.
        return SamplerOutput(tokens[:, None], LogprobsTensors(tokens[:, None], logprobs[:, None], tokens))


class SharedLinearMethod(LinearMethodBase):
    """y = x W^T + b, plus the adapter, from storage that the loader attaches."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        adapter = layer.adapter
        shrunk = None if adapter is None else lora_shrink(flat, adapter.a, layer.adapter_on)
        y = torch.empty(flat.shape[0], layer.shared.out_features, dtype=x.dtype, device=x.device)
        for segment in layer.shared.segments:
            rows = slice(segment.first_row, segment.first_row + segment.rows)
            low_rank = None if adapter is None else LowRank(shrunk, adapter.b[rows])
            segment_linear(flat, segment, None if bias is None else bias[rows], y[:, rows], low_rank)
        return y.reshape(*x.shape[:-1], -1)


def segment_linear(x: Tensor, segment: Segment, bias: Tensor | None, out: Tensor, low_rank: LowRank | None) -> None:
    """Write one segment's columns of a layer's result into `out`."""
    if segment.absmax is not None:
        nf4_linear(x, segment.weight, segment.absmax, bias, out, low_rank)
        return
    if bias is None:
        torch.mm(x, segment.weight.t(), out=out)
    else:
        torch.addmm(bias, x, segment.weight.t(), out=out)
    if low_rank is not None:
        out.addmm_(low_rank.shrunk, low_rank.b.t())


@register_quantization_config(SHARED)
class SharedConfig(QuantizationConfig):
    """Tells vLLM to leave every linear layer to `SharedLinearMethod`."""

    def get_name(self) -> str:
        return SHARED

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SharedConfig:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        return SharedLinearMethod() if isinstance(layer, LinearBase) else None


@register_model_loader(SHARED)
class SharedLoader(BaseModelLoader):
    """Gives vLLM's modules the storage of a `BaseWeights` instead of loading anything."""

    def download_model(self, model_config: Any) -> None:
        """Nothing to download."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        engine = SERVED[self.load_config.model_loader_extra_config["engine"]]
        base = engine.base
        attached = set()
        for module in model.modules():
            if isinstance(getattr(module, "quant_method", None), SharedLinearMethod):
                attach(module, base.linears[module.prefix], engine)
                attached.add(module.prefix)
        if attached != set(base.linears):
            missing = sorted(set(base.linears) - attached)
            raise UserError(f"{base.source_path}: vLLM {vllm.__version__} builds this model without {missing[0]}")
        in_linears = tuple(f"{name}." for name in base.linears)
        for name, parameter in model.named_parameters():
            if name.startswith(in_linears):
                continue
            tensor = base.tensors[name]
            assert parameter.dtype == tensor.dtype and parameter.shape == tensor.shape, (name, parameter.shape)
            parameter.data = tensor


def attach(module: nn.Module, linear: FusedLinear, engine: Engine) -> None:
    """Hand `linear`'s storage, and the adapter's buffers if it has any, to vLLM's layer `module`."""
    module.shared = linear
    module.weight = nn.Parameter(linear.segments[0].weight, requires_grad=False)
    if linear.bias is not None:
        module.bias = nn.Parameter(linear.bias, requires_grad=False)
    module.adapter = engine.adapter.buffers.get(linear.name)
    module.adapter_on = engine.adapter.on


def completion(output: Any) -> Completion:
    """vLLM's finished request as a Completion."""
    sample = output.outputs[0]
    if sample.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion with {sample.finish_reason!r}")
    token_ids = list(sample.token_ids)
    return Completion(
        int(output.request_id.split("-")[0]), token_ids, sampled_logprobs(sample, token_ids), sample.finish_reason
    )


def sampled_logprobs(sample: Any, token_ids: list[int]) -> list[float]:
    """The logprob of each sampled token, from vLLM's flat or nested form."""
    logprobs = sample.logprobs
    if hasattr(logprobs, "start_indices"):
        return [logprobs.logprobs[start] for start in logprobs.start_indices]
    return [entry[token].logprob for entry, token in zip(logprobs, token_ids, strict=True)]


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture as CUDA graphs: powers of two to 16, then steps of 16, and the largest itself."""
    sizes = [size for size in (1, 2, 4, 8, *range(16, max_num_seqs + 1, 16)) if size <= max_num_seqs]
    return sorted({*sizes, max_num_seqs})


def write_model_folder(folder: Path, base: BaseWeights, tokenizer: Any) -> None:
    """A folder with just what vLLM reads: the configuration, and the tokenizer if stop strings need one."""
    values = base.config.to_dict()
    values.pop("quantization_config", None)
    values["architectures"] = [ARCHITECTURES[base.config.model_type]]
    (folder / "config.json").write_text(json.dumps(values, default=str))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_version() -> None:
    """Raise UserError for a vLLM older than this file knows."""
    first, last = VLLM_TESTED
    version = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    if not first <= version <= last:
        raise UserError(
            f"vLLM {vllm.__version__} is installed; this version of grpo knows {first[0]}.{first[1]} to "
            f"{last[0]}.{last[1]}: install one of them"
        )
