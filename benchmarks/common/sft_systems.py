"""The two systems that sft_peers.py compares, in TRL's trainers: random weights, synthetic rows, steps timed.

    ours   the training graph over `BaseWeights` in NF4, `[train] gradient_checkpointing` in each of its modes
    peer   transformers with bitsandbytes' NF4 linears, peft's LoRA, gradient checkpointing, SDPA or another attention

A `System` is loaded once in its process and measures one row after another. Nothing is compared here.
"""

from __future__ import annotations

import random
import statistics
import string
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.common.random_model import RandomSource, shape_config
from benchmarks.common.timing import free_memory
from grpo.config.schema import SEVEN_PROJECTIONS, Lora, Model
from grpo.model.base_weights import BaseWeights
from grpo.policy.fused_layers import install_fused_layers
from grpo.policy.policy import Policy

SPECIAL = ["<pad>", "<eos>", "<bos>"]


@dataclass(frozen=True)
class Row:
    """One measurement."""

    trainer: str
    """"sft" or "dpo"."""
    system: str
    """"ours" or "peer"."""
    form: str
    """What the backward pass finds: one of `grpo.memory.activations.CHECKPOINTING_MODES`; the peer has "none" and
    "layer"."""
    size: int
    """Sequences of a micro-batch; for DPO pairs, of two sequences each."""

    @property
    def name(self) -> str:
        return f"{self.trainer} {self.system} {self.form} {self.size}"


@dataclass(frozen=True)
class Settings:
    """What all rows have in common."""

    shape: str = "3b"
    rank: int = 16
    length: int = 2048
    """Tokens of a row for SFT."""
    pair_length: int = 1024
    """Tokens of each sequence of a pair, half of them the prompt's."""
    warmup: int = 2
    steps: int = 3
    attention: str = "sdpa"
    """The peer's; ours is the project's own."""
    double_quant: bool = False
    """bitsandbytes' second quantisation of the peer's absmax."""
    device: str = "cuda"


class Clock(TrainerCallback):
    """Seconds of each optimiser step after the warm-up, and the memory's peak in them."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.seconds: list[float] = []
        self.before = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_gpu = self.settings.device == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step > self.settings.warmup:
            self.seconds.append(now - self.before)
        elif on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.before = time.perf_counter()


class System:
    """A model that is trained for a few steps at a time."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.device = torch.device(settings.device)
        self.tokenizer = byte_tokenizer()
        self.load()

    def load(self) -> None:
        raise NotImplementedError

    def trainer(self, row: Row, arguments: dict[str, Any]) -> Any:
        """TRL's trainer for `row`."""
        raise NotImplementedError

    def release(self, trainer: Any) -> None:
        """Undo what the trainer did to the model."""
        raise NotImplementedError

    def measure(self, row: Row) -> dict[str, Any]:
        """The figures of `row`. Whatever goes wrong is the caller's."""
        settings = self.settings
        free_memory()
        clock = Clock(settings)
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(row, self.arguments(row, folder))
            trainer.add_callback(clock)
            trainer.remove_callback(PrinterCallback)
            try:
                trainer.train()
            finally:
                self.release(trainer)
                used = device_bytes(self.device)
                trainer.model = trainer.model_wrapped = trainer.optimizer = None
        tokens = row.size * (settings.length if row.trainer == "sft" else 2 * settings.pair_length)
        median = statistics.median(clock.seconds)
        on_gpu = self.device.type == "cuda"
        return {
            **asdict(row),
            "tokens": tokens,
            "ms": round(median * 1e3, 1),
            "range_ms": [round(one * 1e3, 1) for one in (min(clock.seconds), max(clock.seconds))],
            "tokens_per_second": round(tokens / median, 1),
            "allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
            "device_bytes": used,
            "last_loss": trainer.state.log_history[-1].get("train_loss"),
        }

    def arguments(self, row: Row, folder: str) -> dict[str, Any]:
        """TRL's arguments that both systems share: its defaults but for the length of the run and what it writes."""
        settings = self.settings
        length = settings.length if row.trainer == "sft" else settings.pair_length
        return {
            "output_dir": folder,
            "max_length": length,
            "per_device_train_batch_size": row.size,
            "max_steps": settings.warmup + settings.steps,
            "learning_rate": 2e-4 if row.trainer == "sft" else 5e-6,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": settings.device == "cpu",
        }

    def data(self, row: Row) -> Dataset:
        """Enough rows for every step, each of exactly the length that is counted."""
        settings = self.settings
        count = row.size * (settings.warmup + settings.steps)
        if row.trainer == "sft":
            vocabulary = shape_config(settings.shape).vocab_size
            drawn = torch.randint(10, vocabulary, (count, settings.length), generator=torch.Generator().manual_seed(1))
            return Dataset.from_dict({"input_ids": drawn.tolist(), "labels": drawn.tolist()})
        letters = random.Random(1)
        half = settings.pair_length // 2

        def text(length: int) -> str:
            return "".join(letters.choices(string.ascii_lowercase, k=length))

        # One token less, for the end token that TRL appends.
        columns = {"prompt": half, "chosen": half - 1, "rejected": half - 1}
        return Dataset.from_dict({name: [text(length) for _ in range(count)] for name, length in columns.items()})


class Ours(System):
    """The project's training graph."""

    def load(self) -> None:
        settings = self.settings
        source = RandomSource(settings.shape, self.device)
        model = Model(name=settings.shape, load_in_4bit=True, dtype="bfloat16")
        base = BaseWeights(source, model, device=self.device, dtype=torch.bfloat16)  # type: ignore[arg-type]
        self.policy = Policy(base, Lora(r=settings.rank, lora_alpha=2 * settings.rank))
        if self.device.type == "cpu":
            install_fused_layers(self.policy.decoder, base)  # the kernels' torch forms, to try the script

    def trainer(self, row: Row, arguments: dict[str, Any]) -> Any:
        self.policy.recompute_layers(row.form)
        kind, arguments_kind = TRAINERS[row.trainer]
        return kind(
            self.policy.model,
            args=arguments_kind(**arguments, gradient_checkpointing=False, bf16=False),
            train_dataset=self.data(row),
            processing_class=self.tokenizer,
        )

    def release(self, trainer: Any) -> None:
        if "ref" in self.policy.model.peft_config:
            self.policy.model.delete_adapter("ref")
        for parameter in self.policy.parameters():
            parameter.grad = None


class Peer(System):
    """transformers, bitsandbytes and peft, as their documentation joins them."""

    def load(self) -> None:
        self.model = quantised_model(self.settings, self.device)

    def trainer(self, row: Row, arguments: dict[str, Any]) -> Any:
        kind, arguments_kind = TRAINERS[row.trainer]
        rank = self.settings.rank
        return kind(
            self.model,
            args=arguments_kind(
                **arguments, gradient_checkpointing=row.form == "layer", bf16=self.device.type == "cuda"
            ),
            train_dataset=self.data(row),
            processing_class=self.tokenizer,
            # Given here and not applied before, DPO's reference is the model without adapter: the cheaper way.
            peft_config=LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=SEVEN_PROJECTIONS, task_type="CAUSAL_LM"
            ),
        )

    def release(self, trainer: Any) -> None:
        self.model = trainer.model.unload()
        self.model.gradient_checkpointing_disable()


SYSTEMS: dict[str, type[System]] = {"ours": Ours, "peer": Peer}
TRAINERS: dict[str, tuple[Any, Any]] = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


def quantised_model(settings: Settings, device: torch.device) -> nn.Module:
    """A causal LM as transformers' `load_in_4bit` leaves it, with random weights: NF4 linears, the rest in 16 bit."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    config = shape_config(settings.shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=settings.attention)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        rows, columns = module.weight.shape
        layer = Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        layer.weight = Params4bit(
            drawn(module.weight.shape),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=settings.double_quant,
            module=layer,
        ).to(device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = name.rpartition(".")
            values = torch.ones_like(parameter, device=device) if "norm" in name else drawn(parameter.shape)
            setattr(model.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.is_loaded_in_4bit = True  # what TRL and peft ask a quantised model for
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, so that lengths are known."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def device_bytes(device: torch.device) -> int:
    """What is used on the device, CUDA contexts included, by NVML or else the CUDA driver; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    try:
        return torch.cuda.device_memory_used(device)
    except Exception:  # without NVML or its Python binding, in whichever way that shows
        free, total = torch.cuda.mem_get_info(device)
        return total - free
