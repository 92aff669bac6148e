"""Generation: vLLM serving from `BaseWeights`, with the adapter inside our own linear layers.

This file starts vLLM, asks it for completions, refreshes the adapter and lends its KV cache's memory. What vLLM gets
from us is in two more: `vllm_model.py` (its layers' storage and products) and `vllm_scheduler.py` (its scheduler and
sampler). Only these three know vLLM's insides. Token ids go in and come out, never text.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from vllm.device_allocator import cumem
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from grpo.errors import UserError
from grpo.kernels import nf4_experts, routing
from grpo.kernels.nf4_gemm import prepare
from grpo.memory.plan import CPU_BLOCK, GPU_BLOCK, VLLM_BUFFERS, kv_cache_bytes
from grpo.memory.states import has_states
from grpo.model.architectures import vllm_class
from grpo.model.base_weights import BaseWeights
from grpo.policy.policy import Policy
from grpo.rollout import prompt_graphs
from grpo.rollout.attention_backend import OURS, choose_backend, served_by
from grpo.rollout.decoding_kernels import nf4_shapes
from grpo.rollout.lora_buffers import RolloutAdapter
from grpo.rollout.route_recorder import RouteRecorder
from grpo.rollout.types import Completion, EngineSettings, Request, SamplingSettings
from grpo.rollout.vllm_backend import attributes, prepare_class
from grpo.rollout.vllm_environment import set_environment
from grpo.rollout.vllm_images import ARGUMENTS as IMAGE_ARGUMENTS
from grpo.rollout.vllm_images import ImageStore, known_positions
from grpo.rollout.vllm_model import ADAPTER_KEY, SHARED, AdapterHandle, write_model_folder
from grpo.rollout.vllm_scheduler import ContinuedHasher, LogprobCollector, OnePassSampler, rollout_scheduler
from grpo.rollout.vllm_start import quick_start, without_searches
from grpo.run.device_memory import architecture_of
from grpo.run.machine import version_problem
from grpo.run.tiles import prepare_tiles

MOST_COMPARED = 256
STATES = {
    "enable_prefix_caching": False,
    "mamba_ssm_cache_dtype": "float32",
    "additional_config": {"gdn_prefill_backend": "triton"},
}
"""vLLM's arguments for models with states. Of other kernels for prompts, one would be compiled at start."""


class Engine:
    """vLLM in this process, on the storage of a `BaseWeights`."""

    def __init__(self, base: BaseWeights, policy: Policy | None, settings: EngineSettings, tokenizer: Any = None):
        """Start vLLM. `policy` supplies the adapter; None serves the base alone. Stop strings need `tokenizer`."""
        set_environment()
        if problem := version_problem(vllm.__version__):
            raise UserError(problem)
        self.llm: Any = None
        """vLLM while it runs, else None."""
        self.base, self.policy, self.settings = base, policy, settings
        self.tower = policy.tower if policy is not None else None
        self.images = None if base.vision is None else ImageStore(base.vision)
        self.adapter = RolloutAdapter(base, policy)
        if policy is not None:
            policy.set_longest(settings.max_seq_length)
        self.collector = LogprobCollector()
        self.between_steps: Callable[[], None] = lambda: None  # may raise, which ends a generation
        self._kv_cache_is_released = False
        self._folder = tempfile.TemporaryDirectory(prefix="grpo-model-")
        prepare_class(vllm_class(base.config.model_type))
        write_model_folder(Path(self._folder.name), base, tokenizer if settings.stop_strings else None)
        if base.device.type == "cuda":
            prepare(base.device)
            self._prepare_experts()
            prepare_tiles(base.device, nf4_shapes(base), base.dtype, announce)
            torch.cuda.synchronize()  # vLLM changes the stream, and its new one does not wait for the weights
        if base.device.type == "cpu":
            # vLLM compiles a helper of its sampler: seconds at the first rollout, and a C++ compiler needed.
            torch.compiler.set_stance("force_eager")
        self._start()

    def _start(self) -> None:
        self._ran_out, self._kv_bytes = False, self._wanted_kv_bytes()
        self.recorder = None
        if self.base.experts and self.policy is not None:
            self.recorder = RouteRecorder(self.base, self.kv_bytes(), self.settings.kv_cache_dtype)
        self.collector.recorder = self.recorder
        arguments, on_gpu = self._arguments(), self.base.device.type == "cuda"
        with nullcontext() if self.images is None else known_positions(), quick_start():
            self.llm = vllm.LLM(**arguments)
        if on_gpu:
            self._runner.sampler = self.sampler = OnePassSampler(logprobs_mode="processed_logprobs")
            builders = [group.get_metadata_builder() for group in self._runner._attn_group_iterator()]
            prompt_graphs.split_as_ever(builders, self.settings.max_num_seqs)
        core = self.llm.llm_engine.engine_core.engine_core
        self._hasher = ContinuedHasher(core.request_block_hasher) if core.request_block_hasher is not None else None
        core.request_block_hasher = self._hasher
        if self.policy is not None:
            self.sync_adapter()

    def _prepare_experts(self) -> None:
        """What kernels for experts allocate, and how they are cut up, before a CUDA graph is captured."""
        for stack in self.base.experts.values():
            routing.counters(self.base.device, stack.experts.gate_up.experts)
        first = next(iter(self.base.experts.values()), None)  # those of the other layers have the same sizes
        if first is None or first.experts.gate_up.absmax is None:
            return
        adapters = self.adapter.experts.get(first.name)
        factors = [] if adapters is None else [adapters.gate_up, adapters.down]
        ranks = max((each.a.shape[1] for each in factors if each is not None), default=0)
        if nf4_experts.find_tiles(first.experts, first.routing.top_k, ranks) is None:
            announce("experts are dequantised at every step: their kernel does not compute a plain product on this GPU")

    def restart(self, kv_cache_memory_bytes: int) -> None:
        """Stop vLLM, with whatever runs, and start it with a KV cache of so many bytes."""
        self._stop()
        self.settings = replace(self.settings, kv_cache_memory_bytes=kv_cache_memory_bytes, gpu_memory_utilization=None)
        self.collector = LogprobCollector()
        self._start()

    def _arguments(self) -> dict[str, Any]:
        settings, on_cpu = self.settings, self.base.device.type == "cpu"
        step_tokens = max(8192, settings.max_seq_length)
        backend = None if on_cpu else self._backend()
        handle = AdapterHandle(self.adapter, self.recorder, self.images, step_tokens, backend == OURS)
        arguments: dict[str, Any] = {
            "model": self._folder.name,
            "skip_tokenizer_init": not settings.stop_strings,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "hf_overrides": attributes(self.base.config),
            "quantization": SHARED,
            "load_format": SHARED,
            "model_loader_extra_config": {ADAPTER_KEY: handle},
            "max_model_len": settings.max_seq_length,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": step_tokens,
            "kv_cache_memory_bytes": self.kv_bytes(),
            "kv_cache_dtype": settings.kv_cache_dtype,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "seed": settings.seed,
            "disable_log_stats": True,
            "enable_prefix_caching": True,
            "scheduler_cls": rollout_scheduler(Scheduler if on_cpu else AsyncScheduler, self.collector),
            "enforce_eager": settings.enforce_eager or on_cpu,
        }
        if has_states(self.base.config):
            arguments |= STATES
        if self.images is not None:
            arguments |= IMAGE_ARGUMENTS
        if on_cpu:
            arguments["block_size"] = CPU_BLOCK
            # A prompt computed in pieces draws a token too many from its request's generator; vLLM turns it back, which
            # generators on a CPU do not allow.
            arguments["enable_chunked_prefill"] = False
        else:
            arguments["gpu_memory_utilization"] = 0.05
            arguments["attention_config"] = {"backend": ("flash_attn" if backend == OURS else backend or "").upper()}
            announce(f"attention while sampling: {backend}")
            if settings.release_kv_cache:
                arguments["enable_cumem_allocator"] = True
            if not settings.enforce_eager:
                arguments["compilation_config"] = prompt_graphs.compilation(settings.max_num_seqs, self.graph_tokens)
        return arguments

    def _backend(self) -> str:
        """The attention backend on this GPU."""
        architecture = architecture_of(self.base.device)
        served = served_by(self.base.config, architecture, self.settings.kv_cache_dtype, self.base.dtype)
        return choose_backend(self.settings.attention_backend, served)

    def kv_bytes(self) -> int:
        """Size of the KV cache."""
        return self._kv_bytes

    def _wanted_kv_bytes(self) -> int:
        """Its size as set, or what `gpu_memory_utilization` leaves, or enough for every sequence.

        To be asked before vLLM starts, whose cache is a part of what is allocated from then on. Raises UserError when
        the GPU's share leaves no room for one sequence of full length.
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
        self.begin(sampling, requests[0].seed if requests else 0, adapter=adapter)
        if self.tower is not None:  # all at once: it may have to come from host memory
            self.tower.embed([image for request in requests for image in request.images])
        with self.ending():
            for request in requests:
                self.add(request)
            while self.running:
                yield from self.step()

    def stream(self, request: Request, sampling: SamplingSettings, *, adapter: bool = True) -> Iterator[list[int]]:
        """Sample one completion, yielding its token ids as they come. Closing the iterator ends it."""
        self.begin(sampling, request.seed, adapter=adapter, kind=RequestOutputKind.DELTA)
        with self.ending():
            self.add(request)
            while self.running:
                for output in self._outputs():
                    yield list(output.outputs[0].token_ids)

    def begin(
        self,
        sampling: SamplingSettings,
        seed: int,
        *,
        adapter: bool = True,
        kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
        continued: bool = False,
    ) -> None:
        """Prepare for requests that are `add`ed one by one, also while others run. Leave `ending` when all is done.
        `continued`: some will continue others.

        On a GPU `seed` decides all random numbers, by the number of the engine's step and the row in its batch: the
        same requests added before the same steps give the same tokens.
        """
        self._switch_adapter(adapter)
        self._restore_kv_cache()
        if self.base.device.type == "cuda":
            torch.cuda.manual_seed(seed)
            self.sampler.begin(sampling, seed)
        self._sampling, self._kind = sampling, kind
        self._alike: dict[int | None, SamplingParams] = {}
        """Of requests without a seed of their own, by `max_tokens`."""
        self._open: set[str] = set()
        if self.images is not None:
            self.images.clear()
        at_end = kind == RequestOutputKind.FINAL_ONLY and not sampling.stop
        # With stop strings a request may have a token more than was given.
        self.collector.begin(deliver_on_finish=at_end, continued=continued and not sampling.stop)

    def add(self, request: Request) -> None:
        """Begin `request`, whose id no other since `begin` has; it is computed from the next step on."""
        params = self._params_of(request)
        prompt = self._prompt(request)
        if self._hasher is not None:
            known = self.collector.hashes.pop(str(request.continues), [])
            self._hasher.known = [] if request.images else known
        name = self.llm.llm_engine.add_request(str(request.id), prompt, params)
        self.collector.enter(str(request.id), name)
        self._open.add(str(request.id))

    def _prompt(self, request: Request) -> dict[str, Any]:
        """A request's prompt as vLLM takes it."""
        if not request.images:
            return {"type": "token", "prompt_token_ids": list(request.prompt_ids)}
        if self.images is None or self.tower is None:
            raise UserError("a prompt has images, and the model was loaded without its tower; set model.images = true")
        return self.images.request(request.prompt_ids, self.tower.embed(request.images))

    @property
    def has_graphs(self) -> bool:
        """Whether decoding steps are CUDA graphs."""
        return self.base.device.type == "cuda" and not self.settings.enforce_eager

    @property
    def graph_tokens(self) -> int:
        """Tokens of the largest step with prompts that is a CUDA graph; 0: none is."""
        config = self.base.config
        if not self.has_graphs or has_states(config) or self.base.experts or self.images is not None:
            return 0
        if not vllm.envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
            return 0
        return prompt_graphs.most_tokens(config, self.base.dtype.itemsize, self.settings.graph_tokens)

    def without_graphs(self) -> AbstractContextManager[None]:
        """Within it hooks on vLLM's modules see every step."""
        return prompt_graphs.left_out(self._runner.cudagraph_dispatcher) if self.has_graphs else nullcontext()

    @property
    def compared_batch(self) -> int:
        """Sequences with which a decoding step launches what the run's largest do: on a GPU kernels and their tiles
        follow the number of rows. Up to MOST_COMPARED; 1 where they would not share the computation of a prompt."""
        if self.base.device.type == "cpu" or has_states(self.base.config):
            return 1
        return min(self.settings.max_num_seqs, MOST_COMPARED)

    @property
    def running(self) -> int:
        """Requests that have not finished."""
        return len(self._open)

    def step(self) -> list[Completion]:
        """One token for each running request, or for as many as there is room; returns those that finished."""
        return [self._completion(output) for output in self._outputs() if output.finished]

    def abort(self) -> None:
        """End every request that runs."""
        core = self.llm.llm_engine
        if core.has_unfinished_requests():
            core.abort_request(sorted(self._open))
            while core.has_unfinished_requests():
                core.step()
        self._open = set()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Around the steps after `begin`: whatever still runs when it is left is aborted."""
        collects = gc.isenabled()
        gc.disable()  # vLLM makes some thousand objects a step; walking all others over and over costs a tenth of it
        try:
            yield
        except torch.OutOfMemoryError:
            self._ran_out, self._open = True, set()  # in the midst of a step: vLLM can only be started again
            raise
        finally:
            if collects:
                gc.enable()
            if not self._ran_out:
                self.abort()

    def _outputs(self) -> list[Any]:
        """vLLM's outputs of one step."""
        self.between_steps()
        outputs = self.llm.llm_engine.step()
        self._open.difference_update(output.request_id for output in outputs if output.finished)
        return outputs

    def _completion(self, output: Any) -> Completion:
        """vLLM's finished request as a Completion."""
        sample = output.outputs[0]
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with {sample.finish_reason!r}")
        token_ids, (logprobs, routes) = list(sample.token_ids), self.collector.take(output.request_id)
        if len(logprobs) < len(token_ids):
            raise RuntimeError(f"vLLM gave {len(token_ids)} tokens and {len(logprobs)} logprobs")
        # A stop string is found when the token after it may have been sampled.
        if routes is not None:
            routes = routes[: len(output.prompt_token_ids) + len(token_ids) - 1]
        return Completion(int(output.request_id), token_ids, logprobs[: len(token_ids)], sample.finish_reason, routes)

    def _params_of(self, request: Request) -> SamplingParams:
        """How to sample `request`. vLLM copies what it is given before it changes any of it."""
        seed = None if self.base.device.type == "cuda" else request.seed
        params = self._alike.get(request.max_tokens) if seed is None else None
        if params is None:
            params = self._params(self._sampling, seed, self._kind)
            if request.max_tokens is not None:
                params.max_tokens = request.max_tokens
            self._alike[request.max_tokens] = params
        return params

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
            logprobs=0,  # the sampled token's; our scheduler takes them before vLLM makes lists of them
            detokenize=bool(sampling.stop),
            skip_special_tokens=sampling.skip_special_tokens,
            output_kind=kind,
            skip_clone=True,  # a shallow copy will do
        )

    def _switch_adapter(self, enabled: bool) -> None:
        if self.adapter.set_enabled(enabled):
            self.reset_prefix_cache()

    @torch.no_grad()
    def sync_adapter(self) -> float:
        """Copy the trained adapter into the buffers and forget cached prefixes; returns seconds."""
        start = time.perf_counter()
        self.adapter.refresh()
        self.reset_prefix_cache()
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def reset_prefix_cache(self) -> None:
        """Cached keys and values belong to the adapter that computed them."""
        if self.llm is not None and not self.llm.reset_prefix_cache():
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
        self.reset_prefix_cache()
        torch.cuda.synchronize()
        for allocation in kv_cache_allocations():
            cumem.unmap_and_release(allocation.handle)
            allocation.is_asleep = True
        self._kv_cache_is_released = True

    def released_bytes(self) -> int:
        """Bytes of the KV cache that are released now, and that torch counts all the same."""
        return sum(allocation.handle[1] for allocation in kv_cache_allocations()) if self._kv_cache_is_released else 0

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
        """Stop vLLM and give its memory back. May be called twice."""
        self._stop()
        self._folder.cleanup()

    def _stop(self) -> None:
        if self.llm is not None:
            self._restore_kv_cache()
            shutdown = getattr(self.llm.llm_engine.engine_core, "shutdown", None)
            if shutdown is not None:
                with without_searches():
                    shutdown()
            self.llm = None
        gc.collect()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()


def kv_cache_allocations() -> list[Any]:
    """vLLM's records of the memory that holds the KV cache."""
    allocations = cumem.CuMemAllocator.get_instance().pointer_to_data.values()
    return [allocation for allocation in allocations if allocation.tag == "kv_cache"]


def announce(text: str) -> None:
    """Say what takes a while."""
    print(f"grpo: {text}", file=sys.stderr, flush=True)
