"""Arguments as TRL's, transformers' and Unsloth's users know them: taken where the meaning is equal, else explained.

`ours` turns the keywords of one call into those of this project. An argument that says what is always so here, such
as `use_vllm=True`, is dropped; one with another name for the same is renamed; one whose meaning differs ends the call
with a sentence that says what to write instead. Names that nobody knows are left to the configuration.

Of TRL 1.16's GRPOConfig and GRPOTrainer, transformers' TrainingArguments, Unsloth's from_pretrained and get_peft_model
and the generate of both, every argument is known here; tests/config/test_familiar_names.py goes over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from grpo.errors import UserError

Settings = dict[str, Any]


class NotHere(UserError, AttributeError):
    """A name of another library that this one has not, with what to write instead; `hasattr` finds it missing."""


RENAMED = {
    "model_name": "model",
    "model_name_or_path": "model",
    "reward_funcs": "rewards",
    "train_dataset": "task",
    "random_state": "seed",
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_max_model_length": "max_seq_length",
    "vllm_enable_sleep_mode": "release_kv_cache",
    "unsloth_vllm_standby": "release_kv_cache",
    "vllm_importance_sampling_clip_max": "importance_sampling_clip_max",
    "vllm_importance_sampling_cap": "importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min": "importance_sampling_clip_min",
    "vllm_importance_sampling_mode": "importance_sampling_correction",
    "use_bias_correction_kl": "kl_importance_weight",
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "n",
}
"""Another name for the same, with the same values."""

ALWAYS_SO: dict[str, tuple[Any, ...]] = {
    "use_vllm": (True,),
    "fast_inference": (True,),
    "vllm_mode": ("colocate",),
    "vllm_model_impl": ("vllm", "auto"),
    "vllm_tensor_parallel_size": (1,),
    "vllm_importance_sampling_correction": (True,),
    "use_liger_kernel": (True, False),
    "remove_unused_columns": (True, False),
    "do_train": (True,),
    "do_predict": (False,),
    "fix_tokenizer": (True,),
    "use_exact_model_name": (True, False),
    "load_in_fp8": (False,),
    "local_files_only": (False,),
    "return_args": (False,),
    "training": (True,),
    "use_async": (False,),
    "use_engine": (False,),
    "enable_prefix_caching": (True,),
    "disable_log_stats": (True, False),
    "max_lora_rank": (None,),
    "max_loras": (1,),
    "device_map": ("auto", "sequential", "cuda", "cuda:0", None),
    "logging_steps": (1,),
    "logging_strategy": ("steps",),
    "logging_first_step": (True, False),
    "log_completions": (True,),
    "disable_tqdm": (True, False),
    "save_strategy": ("steps",),
    "eval_strategy": ("no",),
    "do_eval": (False,),
    "push_to_hub": (False,),
    "top_k": (-1, None),
    "repetition_penalty": (1.0,),
    "disable_dropout": (True, False),
    "use_cache": (True, False),
    "do_sample": (True,),
    "loftq_config": (None,),
    "layers_to_transform": (None,),
    "layers_pattern": (None,),
    "modules_to_save": (None,),
    "temporary_location": (None,),
    "gradient_accumulation_steps": (1,),
    "cast_lm_head_to_fp32": (True, False),
    "average_tokens_across_devices": (True, False),
    "auto_find_batch_size": (True, False),
    "skip_memory_metrics": (True, False),
    "include_num_input_tokens_seen": ("no", "all", True, False),
    "full_determinism": (True, False),
    "dataloader_num_workers": (0,),
    "max_steps": (-1,),
    "warmup_steps": (0,),
    "report_to": ("none", None),
    "token": (None,),
}
"""Values that say what is so anyhow, or that make no difference here; any other value is explained below, if at all."""

BATCH = (
    "a step here is prompts_per_step groups of num_generations completions, cut by tokens_per_micro_batch to fit "
    "memory; write prompts_per_step=N with N = per_device_train_batch_size * gradient_accumulation_steps / "
    "num_generations"
)
HELD_OUT = (
    "held-out rows are the task's (`grpo.Task(..., eval=rows)`), measured every so many steps; write "
    'eval={"every": 50, "limit": 200}'
)
HUB = "publish a run or an adapter's folder afterwards: python -m grpo.export FOLDER --push OWNER/NAME"
ONE_PROCESS = "several GPUs are several processes of torchrun with nothing to set; leave it out (docs/scaling.md)"
LOADER = "rows are tokenised once, before training, and there is no loader; leave it out"
ONE_GRAPH = "the training graph is this project's own and is not configured so; leave it out"
RUN_FOLDER = "every step is in the run folder's metrics.jsonl, and trackers are named by log; leave it out"
ADAPTER_SHAPE = 'the adapter\'s shape is decided at loading; write grpo.load(..., lora={"r": 16, "lora_alpha": 32})'
SERVER = "vLLM runs in this process, on the same weights; leave it out"
UNSUPPORTED = "there is no such thing here; leave it out"
REFERENCE = (
    'the reference policy of beta > 0 is the adapter as it started, or the base; write reference="base" or leave it out'
)


def _each(names: str, sentence: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), sentence)


INSTEAD: dict[str, str] = {
    **_each(
        "per_device_train_batch_size gradient_accumulation_steps generation_batch_size steps_per_generation", BATCH
    ),
    **_each("unsloth_num_chunks unsloth_logit_chunk_multiplier unsloth_grpo_mini_batch", BATCH),
    **_each(
        "eval_dataset eval_strategy eval_steps do_eval eval_on_start eval_delay per_device_eval_batch_size "
        "num_generations_eval eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics "
        "bf16_full_eval fp16_full_eval prediction_loss_only include_for_metrics compute_metrics do_predict",
        HELD_OUT,
    ),
    **_each(
        "load_best_model_at_end metric_for_best_model greater_is_better", 'write eval={"every": 50, "keep_best": True}'
    ),
    **_each(
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision "
        "log_completions_hub_repo trackio_space_id trackio_bucket_id trackio_static_space_id",
        HUB,
    ),
    **_each(
        "fsdp fsdp_config deepspeed parallelism_config accelerator_config local_rank ddp_backend ddp_timeout "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph ds3_gather_for_generation "
        "save_on_each_node log_on_each_node average_tokens_across_devices vllm_tensor_parallel_size device_map",
        ONE_PROCESS,
    ),
    **_each(
        "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers "
        "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor train_sampling_strategy "
        "ignore_data_skip pad_to_multiple_of length_column_name label_names remove_unused_columns",
        LOADER,
    ),
    **_each(
        "torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps tf32 use_cpu "
        "liger_kernel_config use_liger_kernel cast_lm_head_to_fp32 use_transformers_paged "
        "use_transformers_continuous_batching transformers_continuous_batching_config cache_implementation "
        "gradient_checkpointing_kwargs float32_mixed_precision offload_layers checkpoint_skip_layers qat_scheme "
        "compilation_config attn_implementation model_init_kwargs",
        ONE_GRAPH,
    ),
    **_each(
        "log_level log_level_replica logging_steps logging_strategy logging_first_step logging_nan_inf_filter "
        "disable_tqdm include_num_input_tokens_seen skip_memory_metrics run_name project debug log_multimodal "
        "log_unique_prompts num_completions_to_print log_completions max_logprobs disable_log_stats",
        RUN_FOLDER,
    ),
    **_each("peft_config r lora_alpha target_modules lora_dropout use_rslora use_dora", ADAPTER_SHAPE),
    **_each("bias init_lora_weights layers_to_transform layers_pattern target_parameters", ADAPTER_SHAPE),
    **_each(
        "vllm_mode vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout "
        "vllm_group_port use_vllm fast_inference use_async use_engine max_loras enable_prefix_caching",
        SERVER,
    ),
    **_each(
        "router_aux_loss_coef vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg use_adaptive_entropy "
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target vllm_structured_outputs_regex "
        "label_smoothing_factor neftune_noise_alpha repetition_penalty generation_kwargs finetune_last_n_layers "
        "modules_to_save loftq_config ensure_weight_tying "
        "resize_model_vocab optim_args optim_target_modules enable_jit_checkpoint disable_dropout lr_scheduler_kwargs "
        "load_in_fp8 conservativeness quantization_config reward_processing_classes optimizers callbacks "
        "restore_callback_states_from_checkpoint use_cache full_determinism auto_find_batch_size "
        "fix_tokenizer use_exact_model_name local_files_only return_args training num_beams stopping_criteria "
        "adapter_name max_num_batched_tokens logits_to_keep unsloth_tiled_mlp save_only_model auto_model "
        "device_map_planner_kwargs fullgraph return_logits unsloth_force_compile on_model_resolved num_labels "
        "model_patcher task_type",
        UNSUPPORTED,
    ),
    **_each(
        "text_only finetune_vision_layers finetune_language_layers finetune_audio_layers finetune_attention_modules "
        "finetune_mlp_modules whisper_language whisper_task",
        "the decoder of text is trained, and lora={'target_modules': [...]} says which of its layers; leave it out",
    ),
    **_each("tokenizer_name tokenizer_revision", "the tokenizer is the model's; leave it out"),
    # Of versions before TRL 1 and transformers 5, in notebooks that are still about.
    **_each("per_gpu_train_batch_size", BATCH),
    **_each("per_gpu_eval_batch_size include_inputs_for_metrics generate_during_eval evaluation_strategy", HELD_OUT),
    **_each("push_to_hub_token push_to_hub_model_id push_to_hub_organization", HUB),
    **_each("group_by_length dataset_num_proc", LOADER),
    **_each("logging_dir tpu_metrics_debug include_tokens_per_second wandb_log_unique_prompts", RUN_FOLDER),
    **_each(
        "use_liger_loss no_cuda use_mps_device fp16_backend fp16_opt_level half_precision_backend jit_mode_eval "
        "torchdynamo use_legacy_prediction_loop past_index tpu_num_cores ray_scope",
        ONE_GRAPH,
    ),
    **_each("fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap mp_parameters", ONE_PROCESS),
    **_each("adafactor vllm_guided_decoding_regex", UNSUPPORTED),
    **_each("vllm_device", SERVER),
    "overwrite_output_dir": "a run folder is never overwritten; name a new one as output_dir",
    "save_safetensors": "an adapter is always saved so; leave it out",
    **_each("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", REFERENCE),
    **_each("vllm_importance_sampling_correction", 'write importance_sampling_correction="none" to do without'),
    "max_lora_rank": 'the rank is that of the adapter; write lora={"r": 32}',
    "rope_scaling": "the model's own scaling is used as far as max_seq_length needs it; leave it out",
    "token": "the token is taken from HF_TOKEN or from `hf auth login`; leave it out",
    "processing_class": "the tokenizer is the model's; a template is given as grpo.load(..., chat_template=...)",
    "tokenizer": "the tokenizer is the model's; a template is given as grpo.load(..., chat_template=...)",
    "data_seed": "one seed decides sampling and order; write seed=0",
    "args": "pass the settings themselves, as max_steps=30, learning_rate=1e-5",
    "warmup_steps": "write warmup_ratio with the share of the steps, warmup_steps / max_steps",
    "resume_from_checkpoint": "continue a run with `python -m grpo.train --resume RUN_FOLDER`",
    "reward_weights": 'write rewards=[{"function": first, "weight": 0.8}, {"function": second, "weight": 0.2}]',
    "shuffle_dataset": 'write task={"name": ..., "shuffle": False}',
    "report_to": 'write log={"to": ["wandb"]}, or ["tensorboard"], ["trackio"]',
    "save_strategy": "write save_steps=50; the end of a run is always saved",
    "do_train": "policy.train trains; leave it out",
    "max_tool_calling_iterations": "pass it to policy.train with tools or environment_factory; N are N + 1 turns",
    "tools": 'pass it to policy.train, where it is environment={"tools": [...]} (docs/environments.md)',
    "environment_factory": 'pass it to policy.train, where it is environment={"factory": ...} (docs/environments.md)',
    "rollout_func": 'write the same loop as environment={"program": ...} (docs/environments.md)',
    "do_sample": "write temperature=0.0 for the likeliest token each time",
    "sampling_params": "pass temperature, top_p, max_tokens, n and seed themselves",
    "vllm_sampling_params": "pass temperature, top_p, top_k, min_p and max_completion_length themselves",
    "lora_request": "the policy's adapter is always on; adapter=False asks the base",
    "input_ids": "pass the text or the messages; policy.tokenizer is the tokenizer",
    "attention_mask": "pass the text or the messages; policy.tokenizer is the tokenizer",
    "streamer": "write stream=True and read the pieces: for piece in policy.generate(prompt, stream=True)",
    "use_tqdm": "leave it out",
}
"""What to write for an argument whose meaning differs from ours, or that is none here."""

ATTRIBUTES = {
    **_each("fast_generate fast_generate_batches chat", "write policy.generate(prompts, max_tokens=256)"),
    **_each("get_peft_model", ADAPTER_SHAPE),
    **_each("save_pretrained", "write policy.save_lora(FOLDER)"),
    **_each("save_pretrained_merged save_pretrained_torchao", "write policy.save_merged(FOLDER)"),
    "save_pretrained_gguf": 'write policy.save_merged(FOLDER, to="gguf", gguf_type="q8_0")',
    **_each("push_to_hub push_to_hub_merged push_to_hub_gguf", HUB),
    **_each("for_inference for_training eval", "a policy is always ready for both; leave the line out"),
    **_each("print_trainable_parameters", "write policy.model.print_trainable_parameters()"),
    **_each("from_pretrained", "write policy = grpo.load(MODEL, max_seq_length=1024)"),
    **_each("evaluate", "write python -m grpo.evaluate, or eval={'every': 50} in policy.train"),
}
"""Methods of the models that TRL and Unsloth work with, by what a policy has for them."""

CLASSES = {
    **_each(
        "FastLanguageModel FastModel FastVisionModel AutoModelForCausalLM",
        "write policy = grpo.load(MODEL, max_seq_length=1024, lora={'r': 16})",
    ),
    **_each("FastTextModel PeftModel AutoPeftModelForCausalLM", "write policy = grpo.load(MODEL_OR_ADAPTER)"),
    **_each(
        "GRPOConfig GRPOTrainer UnslothGRPOConfig UnslothGRPOTrainer",
        "write policy.train(rows, rewards=[function], max_steps=100, learning_rate=1e-5)",
    ),
    **_each("RLOOConfig RLOOTrainer", "write policy.train(rows, rewards=[function], leave_one_out=True)"),
    **_each("DPOConfig DPOTrainer", "TRL's trainer takes policy.model as its model (docs/sft.md)"),
    **_each("PatchFastRL PatchDPOTrainer PatchKTOTrainer", "nothing is patched; leave the line out"),
    **_each("AutoTokenizer", "the tokenizer is policy.tokenizer"),
    **_each(
        "get_chat_template", "the template is the model's, or a file: grpo.load(MODEL, chat_template='template.jinja')"
    ),
    **_each("Dataset load_dataset", "take it from the package datasets; policy.train takes a Dataset as it is"),
    **_each("BitsAndBytesConfig", "write grpo.load(MODEL, load_in_4bit=True)"),
    **_each("LLM", "write policy = grpo.load(MODEL); policy.generate(prompts, max_tokens=256)"),
    **_each(
        "train_on_responses_only standardize_sharegpt to_sharegpt standardize_data_formats UnslothTrainer "
        "UnslothTrainingArguments unsloth_train",
        "python -m grpo.sft reads such chats and trains on the answers (docs/sft.md)",
    ),
    **_each("SFTConfig SFTTrainer", "write a configuration and run python -m grpo.sft (docs/sft.md)"),
    **_each("LoraConfig", "write grpo.load(MODEL, lora={'r': 16, 'lora_alpha': 32})"),
    **_each("SamplingParams vLLMSamplingParams", "write policy.generate(prompts, temperature=0.8, max_tokens=256)"),
    **_each("is_bfloat16_supported is_bf16_supported", "dtype is chosen by itself; leave it out"),
}
"""What a copied cell may look for in `grpo`."""


def refuse_class(name: str) -> None:
    """Raise UserError where `grpo` is asked for a class of another library."""
    if name in CLASSES:
        raise UserError(f"grpo has no {name}: {CLASSES[name]}")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _checkpointing(value: Any) -> Settings:
    known = {True: "layer", False: "none", "True": "layer", "unsloth": "offload"}
    return {"gradient_checkpointing": known.get(value, value)}


def _half(dtype: str) -> Callable[[Any], Settings]:
    return lambda value: {"dtype": dtype} if value else {}


VALUES: dict[str, Callable[[Any], Settings]] = {
    "gradient_checkpointing": _checkpointing,
    "use_gradient_checkpointing": _checkpointing,
    "bf16": _half("bfloat16"),
    "fp16": _half("float16"),
    "load_in_16bit": lambda value: {"load_in_4bit": False} if value else {},
    "float8_kv_cache": lambda value: {"kv_cache_dtype": "fp8"} if value else {},
    # transformers 5 takes a share of the steps here as well.
    "warmup_steps": lambda value: {"warmup_ratio" if isinstance(value, float) and value < 1 else "warmup_steps": value},
    "optim": lambda value: {"optim": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"}.get(value, value)},
    "scale_rewards": lambda value: {"scale_rewards": {True: "group", False: "none"}.get(value, value)},
    "min_p": lambda value: {"min_p": 0.0 if value is None else value},
    "dtype": lambda value: {"dtype": "auto" if value is None else str(value).removeprefix("torch.")},
}
"""Arguments whose values have other names here."""


EPISODES = {"tools": "tools", "environment_factory": "factory"}
"""TRL's arguments for episodes, by the key of `[environment]` that means the same."""
CALLS = "max_tool_calling_iterations"


def with_environment(given: Settings, call: str) -> Settings:
    """`given` with TRL's arguments for episodes as the table of the environment.

    TRL lets a turn, and all of them together, be as long as max_completion_length, and has no limit of turns unless
    `max_tool_calling_iterations` sets one: the answer after so many calls is the last turn.
    """
    for name in (*EPISODES, CALLS):
        if given.get(name, name) in (None, [], {}):
            given.pop(name)
    named = {name: given.pop(name) for name in EPISODES if name in given}
    calls, table = given.pop(CALLS, None), given.get("environment")
    if not named and calls is None:
        return given
    if not named and table is None:
        raise UserError(
            f"{call}: {CALLS}={calls!r} is for tools or environment_factory; pass one of them, or leave it out"
        )
    if len(named) > 1 or (named and table is not None):
        twice = [*named, *(["environment"] if table is not None else [])]
        raise UserError(f"{call}: {' and '.join(twice)} are each an environment, and there is one; keep one of them")
    chosen = dict(table) if isinstance(table, Mapping) else {EPISODES[name]: value for name, value in named.items()}
    longest = given.get("max_completion_length", 512)
    if named:
        chosen |= {"max_turns": longest, "max_turn_tokens": longest}
    if calls is not None:
        if type(calls) is not int or calls < 0:
            raise UserError(f"{call}: {CALLS}={calls!r} must be a whole number of at least 0")
        chosen["max_turns"] = calls + 1
    return given | {"environment": chosen}


def ours(settings: Mapping[str, Any], call: str) -> Settings:
    """`settings` with familiar names and values turned into this project's.

    Raises UserError, which `call` begins, for one whose meaning is another, with what to write instead.
    """
    given = {**given_by(settings["args"], call), **settings} if "args" in settings else dict(settings)
    given.pop("args", None)
    if call == "policy.train":
        given = with_environment(given, call)
    translated: Settings = {}
    for name, value in ((name, _plain(value)) for name, value in given.items()):
        if name in ALWAYS_SO and any(value is known or value == known for known in ALWAYS_SO[name]):
            continue
        new = VALUES[name](value) if name in VALUES and _hashable(value) else {RENAMED.get(name, name): value}
        twice = next((key for key in new if key in translated or (key != name and key in given)), None)
        if twice is not None:
            raise UserError(f"{call}: {name} and {twice} are the same setting; leave one out")
        if name in INSTEAD and not (name in VALUES and name not in new):
            raise UserError(f"{call}: {name}={value!r}: {batch(given) if INSTEAD[name] is BATCH else INSTEAD[name]}")
        translated |= new
    return translated


def _hashable(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, int, float)) or type(value).__module__ == "torch"


MACHINE = ("use_cpu", "bf16", "fp16", "tf32")
"""Fields of transformers' arguments that have to fit the machine, and say nothing that is not chosen by itself here."""


def given_by(arguments: Any, call: str) -> Settings:
    """What a GRPOConfig sets to something else than its default."""
    if not dataclasses.is_dataclass(arguments) or isinstance(arguments, type) or not hasattr(arguments, "output_dir"):
        raise UserError(f"{call}: args={arguments!r}: {INSTEAD['args']}")
    names = {field.name for field in dataclasses.fields(arguments)}
    same = {name: getattr(arguments, name) for name in ("output_dir", *MACHINE) if name in names}
    changed = changed_fields(arguments, type(arguments)(**same))
    return changed | ({"output_dir": arguments.output_dir} if arguments.output_dir else {})


def changed_fields(arguments: Any, defaults: Any) -> Settings:
    """The fields in which one value of a dataclass differs from another."""
    pairs = ((field.name, getattr(arguments, field.name)) for field in dataclasses.fields(arguments))
    return {name: value for name, value in pairs if value != getattr(defaults, name)}


def adapter_table(lora: Any) -> Settings:
    """A [lora] table from a dict or from peft's LoraConfig, of which what was set counts."""
    if isinstance(lora, Mapping):
        return dict(lora)
    if not dataclasses.is_dataclass(lora) or isinstance(lora, type):
        raise UserError(
            f"grpo.load: lora={lora!r} must be a dict of [lora] keys, such as {{'r': 16, 'lora_alpha': 32}}"
        )
    changed = changed_fields(lora, type(lora)())
    changed.pop("task_type", None)
    if loftq := changed.pop("loftq_config", None):
        settings = loftq if isinstance(loftq, Mapping) else vars(loftq)
        if settings.get("loftq_bits", 4) != 4:
            raise UserError(f"grpo.load: loftq_config={loftq!r}: bases are quantised to 4 bits; leave loftq_bits out")
        changed["loftq_iter"] = settings.get("loftq_iter", 1)
    return {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()}


def batch(given: Mapping[str, Any]) -> str:
    """BATCH, with its number where all that it takes is given."""
    size, generations = given.get("per_device_train_batch_size"), given.get("num_generations", 8)
    total = given.get("generation_batch_size")
    if total is None and isinstance(size, int):
        total = size * (given.get("gradient_accumulation_steps") or 1)
    if not isinstance(total, int) or not isinstance(generations, int) or generations < 1:
        return BATCH
    return f"{BATCH}: here prompts_per_step={max(total // generations, 1)}"
