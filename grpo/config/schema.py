"""The TOML configuration: one pydantic model per section, one docstring per field, unknown keys refused.

Names follow TRL's `GRPOConfig` where the concept is TRL's and peft's `LoraConfig` where it is peft's. This file
knows types, ranges and rules between fields; whether a file exists or a model fits is found where it is used.
`docs/config.md` is generated from the docstrings here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from grpo.config.messages import admits_none_as_text, explain
from grpo.config.toml import NONE, apply_override, read_toml, write_toml

STARTS: tuple[bool | str, ...] = (True, "gaussian", "pissa", "olora", "loftq")
"""What an adapter can start from."""
SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[Path, Field(strict=False)]


class Section(BaseModel):
    """Common rules: unknown keys are errors, values keep their type, field docstrings become descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, strict=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def none_is_written_in_quotes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        absent = {key for key, field in cls.model_fields.items() if admits_none_as_text(field)}
        return {key: None if key in absent and value == NONE else value for key, value in values.items()}


class Model(Section):
    """`[model]`: which base model, and how it is held in memory."""

    name: str
    """A folder in Hugging Face format, a hub id, a `.gguf` file, or `package:NAME/FILE` in an installed package."""
    load_in_4bit: bool = True
    """Hold the base as NF4. Off: 16-bit LoRA (or 32-bit with `dtype = "float32"`), or 8 bit with `load_in_8bit`."""
    load_in_8bit: bool = False
    """Hold the base in 8 bit, instead of in 4: as int8, or with the codes of a checkpoint in int8 or FP8."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. "auto": bfloat16 where the device computes in it, else float16 on a GPU, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run. "auto": the GPU, unless torch is built without CUDA. "cpu" asks nothing of CUDA."""
    max_seq_length: PositiveInt | None = None
    """Longest prompt plus completion. Default: `max_prompt_length + max_completion_length` of `[rollout]`."""
    keep_16bit: list[str] | Literal["auto"] = []
    """Modules left unquantised, by name or ending ("mlp.down_proj"); "auto": the 5 % that the output needs most."""
    offload_embedding: bool = False
    """Keep a token embedding that is not the output head too in host memory, where the GPU reads the rows it needs."""
    offload_head: bool = False
    """Keep the output head in host memory, for a model that does not fit otherwise: each decoding step reads it all."""
    images: bool = False
    """Read the model's vision tower too, so that prompts may have images. Off: its decoder of text alone."""
    offload_tower: bool = False
    """Keep the vision tower in host memory between steps' images; it comes to the GPU for each step's."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    chat_template: PathText | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off unless you trust it."""
    full_finetuning: bool = False
    """Not supported; present so that a copied configuration gets an explanation."""

    @property
    def quantized(self) -> bool:
        """Whether the base is held in codes."""
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="before")
    @classmethod
    def eight_bit_is_instead_of_four(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("load_in_8bit") is True and "load_in_4bit" not in values:
            return values | {"load_in_4bit": False}
        return values

    @model_validator(mode="after")
    def only_what_one_shared_copy_allows(self) -> Model:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true; set one of the two to false")
        if self.offload_tower and not self.images:
            raise ValueError("offload_tower moves the vision tower, which is read with images = true alone; set that")
        if self.load_in_8bit and self.keep_16bit == "auto":
            raise ValueError(
                'keep_16bit = "auto" chooses for NF4, and int8 costs the output a hundredth of that; name layers, or '
                "leave it out"
            )
        if self.full_finetuning:
            raise ValueError("full_finetuning is not supported, the base is shared and frozen; train a LoRA adapter")
        return self


class Lora(Section):
    """`[lora]`: the adapter, in peft's words."""

    r: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank."""
    lora_alpha: PositiveFloat = 32
    """Scale: the update is multiplied by `lora_alpha / r` (by `lora_alpha / sqrt(r)` with `use_rslora`)."""
    target_modules: Annotated[list[str], Field(min_length=1)] | str = SEVEN_PROJECTIONS
    """Linear layers that get an adapter: names or their ends; a regular expression for whole names; or "all-linear".
    The default stands for all of them, whatever a family has."""
    target_parameters: list[str] = []
    """Of a mixture of experts, parameters that get an adapter for every expert, in peft's words: names or their ends,
    "experts.gate_up_proj" and "experts.down_proj". `rank_pattern` and `alpha_pattern` give them a rank of their own."""
    exclude_modules: list[str] | str = []
    """Of these, layers that get none: names or their ends, or a regular expression for whole names."""
    layers_to_transform: list[Annotated[int, Field(ge=0)]] = []
    """Numbers of the decoder layers with an adapter, from 0, where `target_modules` is a list. Empty: all."""
    layers_pattern: list[str] = []
    """Where a model has several lists of layers: the name of the one that `layers_to_transform` counts."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=512)]] = {}
    """Ranks other than `r`: regular expressions for ends of layers' names, each with a rank."""
    alpha_pattern: dict[str, PositiveFloat] = {}
    """Scales other than `lora_alpha`, as `rank_pattern` has ranks."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training; always off in rollouts."""
    use_rslora: bool = False
    """Rank-stabilised scaling."""
    bias: Literal["none"] = "none"
    """Biases belong to the shared base and are never trained."""
    init: PathText | None = None
    """An adapter folder to start from."""
    init_lora_weights: bool | str = True
    """What the adapter starts from, in peft's words: nothing (true, or "gaussian" for A), or a part of the base, which
    is then held without it: its largest singular values ("pissa", or faster "pissa_niter_4"), columns of its QR
    decomposition ("olora"), or most of the error of 4 bits ("loftq"). "The adapter off" and the KL reference then mean
    the adapter as it started."""
    loftq_iter: Annotated[int, Field(ge=1, le=20)] = 1
    """Iterations of "loftq"."""
    use_dora: bool = False
    """Not supported; present so that a copied configuration gets an explanation."""

    @model_validator(mode="after")
    def only_adapters_that_leave_the_base_alone(self) -> Lora:
        if not (self.init_lora_weights in STARTS or re.fullmatch(r"pissa_niter_[1-9]\d?", str(self.init_lora_weights))):
            raise ValueError(
                f"init_lora_weights = {self.init_lora_weights!r} is not supported; use true, "
                f"{', '.join(map(repr, STARTS[1:]))} or 'pissa_niter_4'"
            )
        if self.loftq_iter != 1 and self.init_lora_weights != "loftq":
            raise ValueError('loftq_iter has no use without init_lora_weights = "loftq"; leave it out')
        if self.use_dora:
            raise ValueError(
                "use_dora is not supported: its magnitude vector does not fit vLLM's LoRA layers; "
                "use plain LoRA or use_rslora"
            )
        return self

    @model_validator(mode="after")
    def patterns_are_regular_expressions(self) -> Lora:
        wholes = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        patterns = [(key, value) for key, value in wholes.items() if isinstance(value, str)]
        for key in ("layers_pattern", "rank_pattern", "alpha_pattern"):
            patterns += [(key, pattern) for pattern in getattr(self, key)]
        for key, pattern in patterns:
            try:
                re.compile(f"({pattern})")
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{key}: {pattern!r} is no regular expression ({error}); correct it") from None
        return self

    @model_validator(mode="after")
    def layers_are_counted_for_names(self) -> Lora:
        if isinstance(self.target_modules, str) and self.layers_to_transform:
            raise ValueError(
                "layers_to_transform counts layers for a list of target_modules; write the numbers into the pattern, "
                "or the names as a list"
            )
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError("layers_pattern has no use without layers_to_transform; leave it out, or set both")
        return self


class Task(Section):
    """`[task]`: where prompts come from. `[[task]]` several times mixes tasks by `weight`."""

    name: str
    """A built-in task ("gsm8k", "arithmetic", ...), "package.module:function" or "path/file.py:function"."""
    options: dict[str, Any] = {}
    """Keyword arguments of the task's loading function, such as `path` for gsm8k."""
    weight: PositiveFloat = 1.0
    """Share of the prompts when several tasks are mixed."""
    system_prompt: str | None = None
    """Replaces the task's own system prompt."""
    shuffle: bool = True
    """Shuffle the rows anew every epoch, from the run's seed."""
    limit: PositiveInt | None = None
    """Use only the first so many training rows."""
    overlong: Literal["drop", "error"] = "drop"
    """What to do with prompts longer than `max_prompt_length`: drop and count them, or stop."""
    pass_rate: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None = None
    """Keep only questions that the starting model answers correctly this often, for example [0.1, 0.9]."""
    pass_rate_samples: PositiveInt = 8
    """Completions per question for `pass_rate`."""


class Reward(Section):
    """`[[rewards]]`: one reward function. With none given, the task's own are used."""

    function: str
    """A built-in name ("correctness", ...), "package.module:function" or "path/file.py:function"."""
    weight: float = 1.0
    """Factor in the sum. 0: computed and logged only."""
    name: str | None = None
    """Column name in metrics; default: the function's name."""
    options: dict[str, Any] = {}
    """Keyword arguments passed to the function at every call."""
    timeout: PositiveFloat = 60.0
    """Seconds that one call may take."""
    on_error: Literal["stop", "skip"] = "stop"
    """A call that raises, hangs, dies or returns nonsense: stop the run, or score its completions as missing."""
    memory_limit_gb: PositiveFloat | None = None
    """Memory that the function's process may allocate, in GB (10^9 bytes). Default: half of the machine's."""


class Rollout(Section):
    """`[rollout]`: sampling groups of completions with vLLM."""

    prompts_per_step: PositiveInt = 16
    """Different prompts in one step."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt: the group whose rewards are compared."""
    max_prompt_length: PositiveInt = 512
    """Longest prompt in tokens, chat template included."""
    max_completion_length: PositiveInt = 512
    """Longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Sampling temperature, at most 2 as in vLLM; the trainer scores with the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Refused below 1: sampled tokens would be scored over a different set than they came from."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among the k likeliest tokens; 0 means all. Refused above 0, as `top_p`."""
    min_p: Fraction = 0.0
    """Drop tokens below this share of the likeliest one. Refused above 0, as `top_p`."""
    stop: list[str] = []
    """Strings that end a completion (kept in it), besides the model's end-of-turn tokens."""
    skip_special_tokens: bool = False
    """Take every special token out of completions before rewards see them, as TRL does. Off: only those that end a
    completion, fill up a batch or begin a sequence."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template, for example `{ enable_thinking = false }`."""
    max_num_seqs: PositiveInt | None = None
    """Sequences that vLLM decodes at once. Default: all of a step, at most 256."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the GPU's memory for weights, KV cache and vLLM's buffers together."""
    kv_cache_memory_bytes: PositiveInt | None = None
    """KV cache in bytes, instead. With neither, planned from the lengths and what training needs."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """"fp8" halves the KV cache on a GPU from compute capability 8.9 on, at a larger mismatch between rollout and
    training."""
    attention_backend: Literal["auto", "flash_attn", "triton_attn", "flashinfer", "flex_attention"] = "auto"
    """vLLM's attention on a GPU. "auto": FlashAttention; Triton's before Ampere and for an fp8 cache off Hopper."""
    release_kv_cache: bool = False
    """Give the KV cache's memory on a GPU to training while it runs; costs some tens of milliseconds a step."""
    enforce_eager: bool = False
    """Do without CUDA graphs."""

    @model_validator(mode="after")
    def one_memory_budget(self) -> Rollout:
        if self.gpu_memory_utilization is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("gpu_memory_utilization and kv_cache_memory_bytes are both set; keep one of them")
        return self

    @model_validator(mode="after")
    def sample_from_what_is_scored(self) -> Rollout:
        if self.top_p < 1 or self.top_k > 0 or self.min_p > 0:
            raise ValueError(
                "top_p < 1, top_k > 0 and min_p > 0 are refused: vLLM would renormalise over the kept tokens while the "
                "loss scores over all of them, which biases every importance ratio; use temperature instead"
            )
        return self


class Loss(Section):
    """`[loss]`: from rewards to advantages to the loss. Equations and papers: `docs/algorithms.md`."""

    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo", "gspo", "cispo", "sapo"] = "dapo"
    """Objective and its normalisation."""
    function: str | None = None
    """Your own loss instead: "package.module:function" or "path/file.py:function"."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL penalty against the reference model. 0: no reference forward."""
    reference: Literal["start", "base"] = "start"
    """The reference: the adapter as the run finds it, as in TRL (a fresh one is the base), or the base without it."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL penalty (Schulman's names)."""
    kl_importance_weight: bool = True
    """Multiply the KL estimate by the importance ratio, which makes its gradient unbiased off policy
    (TRL's `use_bias_correction_kl`)."""
    epsilon: PositiveFloat = 0.2
    """Clip: the ratio may fall to `1 - epsilon`."""
    epsilon_high: PositiveFloat | None = None
    """Clip: the ratio may rise to `1 + epsilon_high`. Default: `epsilon`; for cispo the absolute cap, default 5."""
    delta: PositiveFloat | None = None
    """Two-sided clip: cap on the ratio where the advantage is negative."""
    sapo_temperature_pos: PositiveFloat = 1.0
    """SAPO's gate temperature for positive advantages."""
    sapo_temperature_neg: PositiveFloat = 1.05
    """SAPO's gate temperature for negative advantages."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio per token or, as in GSPO, per sequence."""
    advantage_level: Literal["episode", "turn"] = "episode"
    """One advantage for all turns of an episode, or one for each turn from what the episode earns from it on."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not."""
    leave_one_out: bool = False
    """Baseline from the group's other completions (RLOO) instead of the whole group."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Normalise the weighted sum of rewards, or each reward before summing (GDPO)."""
    mask_truncated_completions: bool = False
    """Leave completions that ran into the length limit out of the loss."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Train only on this share of tokens, those of highest entropy."""
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
    ] = "token_truncate"
    """Correction of the rollout-trainer mismatch: weight by the ratio of trainer to rollout probability, truncated or
    masked at the bounds below, per token or per sequence; "geometric_mask" drops sequences by the mean per token."""
    importance_sampling_clip_max: PositiveFloat = 2.0
    """Upper bound of that ratio."""
    importance_sampling_clip_min: Annotated[float, Field(ge=0)] = 0.0
    """Lower bound of that ratio."""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Drop sequences with negative advantage whose mean log-ratio to the rollout exceeds this (DeepSeek-V3.2)."""
    dynamic_sampling: bool = False
    """Replace groups with equal rewards by new prompts until the batch is full (DAPO)."""
    dynamic_sampling_max_rounds: PositiveInt = 4
    """How many times to sample before training on what there is."""

    @model_validator(mode="after")
    def cispo_cap_is_absolute(self) -> Loss:
        if self.loss_type == "cispo" and self.epsilon_high is not None and self.epsilon_high < 1:
            raise ValueError(
                f"epsilon_high = {self.epsilon_high} is below 1: for cispo it is the absolute cap on the "
                "ratio, such as 5"
            )
        return self

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> Loss:
        if self.delta is not None and self.loss_type in ("cispo", "sapo"):
            raise ValueError(f"delta caps a ratio beside a clip, which {self.loss_type} has not; leave it out")
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            raise ValueError(
                f'multi_objective_aggregation = "normalize_then_sum" scales each reward by its group; leave '
                f'scale_rewards = "{self.scale_rewards}" out'
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.advantage_level == "turn":
            raise ValueError(
                'advantage_level = "turn" compares what turns earn in all; leave multi_objective_aggregation out'
            )
        return self

    @model_validator(mode="after")
    def bounds_in_order(self) -> Loss:
        if self.importance_sampling_clip_min >= self.importance_sampling_clip_max:
            raise ValueError("importance_sampling_clip_min must be below importance_sampling_clip_max")
        return self


class Train(Section):
    """`[train]`: optimiser and length of the run."""

    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate. LoRA wants about ten times that of full fine-tuning."""
    max_steps: PositiveInt | None = None
    """Steps (rollout batches) to run. Default: `num_train_epochs` over the data."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the prompts when `max_steps` is not set."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Fraction = 0.0
    """Share of the steps over which the learning rate rises from 0."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """Optimiser; the 8-bit forms come from bitsandbytes and need a GPU (on a CPU, adamw with a notice)."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """First-moment decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Second-moment decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay on the adapter."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A step with NaN or infinity in rewards, logprobs, loss or gradient, or beyond one of the two limits below: leave
    its update out, or stop the run. Either way the batch is dumped for `python -m grpo.replay`."""
    max_nonfinite_steps: PositiveInt = 5
    """Stop when so many steps in a row were left out."""
    max_mismatch_kl: PositiveFloat | None = 1.0
    """Treat a step as non-finite whose `mismatch_kl` is above this: vLLM and the trainer no longer agree."""
    grad_norm_spike: Annotated[float, Field(gt=1)] | None = 100.0
    """Treat a step as non-finite whose gradient norm is so many times the median of the last 50."""
    num_iterations: PositiveInt = 1
    """Passes over each rollout batch."""
    optimizer_steps_per_rollout: PositiveInt = 1
    """Optimiser steps in one such pass; the batch is split by whole prompts."""
    tokens_per_micro_batch: PositiveInt = 8192
    """Tokens in one forward and backward, packed without padding. Changes memory and speed, never the result."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at once."""
    router_replay: bool = True
    """Of a mixture of experts: train each token with the experts that sampling chose for it, also for old and reference
    logprobs. Rounding alone chooses other ones for some tokens, which no importance ratio corrects well."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """What computes the layers in training: fused Triton kernels, or plain torch modules to compare them with. "auto":
    Triton on a GPU, torch on a CPU."""
    gradient_checkpointing: bool | Literal["auto", "none", "mlp", "layer", "offload"] = "auto"
    """What the backward pass finds: everything ("none"), all but the MLP's intermediate tensors ("mlp", with Triton
    kernels), each layer's input ("layer"), or that in host memory ("offload"); the rest is computed again. "auto":
    the first of these that fits. true and false, as in TRL, are "layer" and "none"."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of data order, sampling and adapter initialisation."""

    @field_validator("gradient_checkpointing")
    @classmethod
    def booleans_as_in_trl(cls, value: bool | str) -> str:
        return value if isinstance(value, str) else "layer" if value else "none"


class Eval(Section):
    """`[eval]`: held-out questions during training. Off unless `every` is set."""

    every: PositiveInt | None = None
    """Evaluate before the first step, every so many steps, and after the last. "none" switches it off, as in
    `--set eval.every=none`."""
    limit: PositiveInt | None = 200
    """Use the first so many held-out rows."""
    num_generations: PositiveInt = 1
    """Completions per question."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling (evaluation only)."""
    max_completion_length: PositiveInt | None = None
    """Default: that of `[rollout]`."""
    pass_at: list[PositiveInt] = [1]
    """Values of k for pass@k; none above `num_generations`."""
    keep_best: bool = True
    """Keep the adapter with the best held-out accuracy in `best_adapter/`."""

    @model_validator(mode="after")
    def enough_samples_for_pass_at_k(self) -> Eval:
        if max(self.pass_at, default=1) > self.num_generations:
            raise ValueError(f"pass_at = {self.pass_at} needs num_generations of at least {max(self.pass_at)}")
        return self


class Log(Section):
    """`[log]`: what is shown and where it also goes."""

    to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers besides `metrics.jsonl`; each an optional install."""
    samples_every: PositiveInt = 10
    """Show and keep sample completions every so many steps."""
    samples: PositiveInt = 2
    """Prompts whose completions are kept then."""
    adapter_survival_every: PositiveInt | None = 25
    """Measure `adapter_survival`, the share of the adapter's effect that the 16-bit policy shows, after the first step
    and every so many: a forward pass in float32 over a few completions. "none" switches it off."""
    report: bool = True
    """Write `report.html` in the run folder, anew while the run goes on; it takes at most a hundredth of the time."""


class Alarms(Section):
    """`[alarms]`: what a run warns of while it goes on, by how far each figure may go; "none" switches one off. What
    each means: `docs/alarms.md`."""

    window: Annotated[int, Field(ge=3)] = 10
    """Steps that a figure is a median over. The first so many are what later ones are compared with."""
    reward_without_accuracy: PositiveFloat | None = 0.5
    """Mean reward that has risen by more than so many standard deviations of a completion's, while held-out accuracy
    has not risen."""
    length_collapse: Annotated[float, Field(gt=0, lt=1)] | None = 0.25
    """Completions shorter than this share of their first length."""
    length_explosion: Annotated[float, Field(gt=1)] | None = 3.0
    """Completions longer than so many times their first length."""
    cut_completions: Fraction | None = 0.5
    """Share of completions that are cut at the length limit."""
    entropy_collapse: Annotated[float, Field(gt=0, lt=1)] | None = 0.05
    """Entropy below this share of the first."""
    equal_groups: Fraction | None = 0.9
    """Share of groups whose rewards are all equal."""
    adapter_survival: PositiveFloat | None = 0.5
    """Share of the adapter's effect that the 16-bit policy shows, from step 20 on; with one rounding it is nearly 1."""
    mismatch_kl: PositiveFloat | None = 0.01
    """Mismatch of sampler and trainer, in nats a token."""
    mismatch_rise: Annotated[float, Field(gt=1)] | None = 5.0
    """Mismatch of so many times the first, where it is above 0.001."""


class Checkpoint(Section):
    """`[checkpoint]`: the run folder and what is kept in it."""

    output_dir: PathText = Path("runs/grpo")
    """The run folder. It must not exist, unless `--resume` continues it."""
    save_steps: PositiveInt = 50
    """Write a checkpoint every so many steps, and after the last."""
    save_total_limit: PositiveInt | None = 2
    """Keep only the newest so many checkpoints."""


OWN_QUESTIONS = "environment"
"""The task whose rows are the environment's own."""
WAYS_IN = ("program", "tools", "factory", "verifiers", "skyrl_gym", "gem", "command")
"""The keys of `[environment]` of which one is set."""


class Environment(Section):
    """`[environment]`: what the model talks to, in turns, where a completion is more than one answer. Set exactly one
    of the first seven."""

    program: str | None = None
    """A function `async def play(row, sample)` that returns the reward: "package.module:function" or
    "path/file.py:function"."""
    tools: list[str] = []
    """Functions that the model may call, as TRL's `tools`; each is written as `program` is."""
    factory: str | dict[str, str] | None = None
    """A class as TRL's `environment_factory`: its public methods are tools, `get_reward` gives the reward. Or several
    by name, of which each row's column "environment" names one."""
    verifiers: str | None = None
    """An environment of verifiers 0.1 to 0.3: a file or a module with `load_environment`."""
    skyrl_gym: str | None = None
    """The id of an environment that SkyRL-gym has registered, as "gsm8k_multi_turn"."""
    gem: str | None = None
    """The id of an environment that GEM has registered, as "game:GuessTheNumber-v0-easy"."""
    command: str | None = None
    """A command line whose process talks to an OpenAI-compatible endpoint and writes its reward as its last line."""
    rollout_func: str | None = None
    """Not supported; present so that a copied configuration gets an explanation."""
    options: dict[str, Any] = {}
    """Keyword arguments of the program, the class, `load_environment` or `gem.make`; SkyRL-gym's `env_config`."""
    max_turns: PositiveInt = 8
    """The policy's turns in an episode, at most."""
    max_turn_tokens: PositiveInt = 256
    """Tokens of one turn, at most; `rollout.max_completion_length` is for the whole episode."""
    max_observation_tokens: PositiveInt = 1024
    """Tokens of what the environment says between two turns; longer text is cut, and says so."""
    processes: PositiveInt = 64
    """Episodes that work at once. Each has a process of its own, and waits there for the policy."""
    timeout: PositiveFloat = 60.0
    """Seconds that an episode's program may take from a turn to the next."""
    memory_limit_gb: PositiveFloat | None = None
    """Memory that an episode's process may allocate, in GB (10^9 bytes). Default: half of the machine's."""
    on_error: Literal["mask", "stop"] = "mask"
    """An episode whose program raises, hangs, dies or returns nonsense: leave it out of training, or stop the run. A
    step in which all do so ends the run in either case."""
    schedule: Literal["deterministic", "eager"] = "deterministic"
    """When an environment's answer is taken up: exactly `latency_steps` after it was asked for, so that the tokens do
    not depend on how long tools take; or at once."""
    latency_steps: PositiveInt = 16
    """Decoding steps from the end of a turn until its answer is taken up. A slower answer is waited for."""
    tool_parser: Literal[
        "auto", "hermes", "qwen3_coder", "glm45", "lfm2", "llama3_json", "gemma4", "openai", "deepseek_v3"
    ] = "auto"
    """The form in which the model writes calls, by vLLM's names; "auto": the one of its chat template."""
    python: str | None = None
    """Another Python interpreter to run the environment with, which has packages of its own."""

    @field_validator("rollout_func")
    @classmethod
    def no_rollout_func(cls, value: str | None) -> None:
        if value is not None:
            raise ValueError(
                "it would return token ids of its own making, and is not supported; write the same loop as `program`, "
                "an async function that asks `sample` for each turn"
            )

    @model_validator(mode="after")
    def exactly_one_way_in(self) -> Environment:
        chosen = [name for name in WAYS_IN if getattr(self, name)]
        if len(chosen) != 1:
            have = " and ".join(chosen) + " are" if chosen else "none of them is"
            raise ValueError(f"an environment must be exactly one of {', '.join(WAYS_IN)}; {have} set")
        return self

    @property
    def kind(self) -> str:
        """Which of the ways in is set."""
        return next(name for name in WAYS_IN if getattr(self, name))

    @property
    def column(self) -> str:
        """Its name in metrics: the function's, class's or environment's, or "tools"."""
        if self.kind in ("tools", "command") or isinstance(self.factory, dict):
            return self.kind
        reference = str(getattr(self, self.kind)).removesuffix(".py")
        return re.split(r"[:./]", reference)[-1]


class Config(Section):
    """A whole experiment."""

    model: Model
    lora: Lora = Lora()
    task: list[Task] = Field(min_length=1)
    rewards: list[Reward] = []
    environment: Environment | None = None
    rollout: Rollout = Rollout()
    loss: Loss = Loss()
    train: Train = Train()
    eval: Eval = Eval()
    log: Log = Log()
    alarms: Alarms = Alarms()
    checkpoint: Checkpoint = Checkpoint()

    @field_validator("task", mode="before")
    @classmethod
    def one_task_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @property
    def max_seq_length(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return self.model.max_seq_length or self.rollout.max_prompt_length + self.rollout.max_completion_length

    @property
    def completions_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.num_generations

    @model_validator(mode="after")
    def prompt_and_completion_fit_the_sequence(self) -> Config:
        longest = self.rollout.max_prompt_length + self.rollout.max_completion_length
        if self.model.max_seq_length is not None and self.model.max_seq_length < longest:
            raise ValueError(
                f"model.max_seq_length = {self.model.max_seq_length} is below rollout.max_prompt_length + "
                f"max_completion_length = {longest}; raise the one or lower the others"
            )
        return self

    @model_validator(mode="after")
    def optimizer_steps_split_whole_prompts(self) -> Config:
        if self.train.optimizer_steps_per_rollout > self.rollout.prompts_per_step:
            raise ValueError(
                f"train.optimizer_steps_per_rollout = {self.train.optimizer_steps_per_rollout} exceeds "
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step}; a group is never split"
            )
        return self

    @model_validator(mode="after")
    def turns_are_an_environments(self) -> Config:
        if self.loss.advantage_level == "turn" and self.environment is None:
            raise ValueError('loss.advantage_level = "turn" needs turns; add [environment], or leave it out')
        return self

    @model_validator(mode="after")
    def pass_rates_are_of_single_answers(self) -> Config:
        if self.environment is not None and any(task.pass_rate for task in self.task):
            raise ValueError("task.pass_rate is measured on single answers; leave it out with [environment]")
        return self

    @model_validator(mode="after")
    def reward_names_differ(self) -> Config:
        names = [reward.name or reward.function.split(":")[-1].split(".")[-1] for reward in self.rewards]
        if self.environment is not None:
            names.append(self.environment.column)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two rewards are called {twice[0]!r}; give one of them a different `name`")
        return self


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file `path`, with `section.key=value` overrides applied.

    Raises UserError naming the file and line, or the override, and the remedy.
    """
    values, text = read_toml(Path(path))
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, str(path), text, overrides)


def parse_config(
    values: dict[str, Any], source: str = "configuration", text: str = "", overrides: Sequence[str] = ()
) -> Config:
    """`values`, as TOML parses it, validated. What it came from, `source` with its `text` and the `overrides`, is
    named in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise explain(error, Config, values, source, text, overrides) from None


def config_toml(config: Config) -> str:
    """`config`, defaults included, as TOML: reading the text again gives an equal Config."""
    tables: dict[str, Any] = {}
    for name in Config.model_fields:
        value = getattr(config, name)
        if value is None:
            continue
        tables[name] = [_written(entry) for entry in value] if isinstance(value, list) else _written(value)
    if len(config.task) == 1:
        tables["task"] = tables["task"][0]
    return write_toml(tables)


def _written(section: Section) -> dict[str, Any]:
    fields = type(section).model_fields
    values = {name: getattr(section, name) for name in fields}
    # None is written where leaving the key out would mean another default.
    return {k: NONE if v is None and fields[k].default is not None else v for k, v in values.items()}
