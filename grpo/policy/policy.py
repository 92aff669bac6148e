"""The training graph: transformers' model over the one copy of the base, with LoRA through peft.

Built on the `meta` device and then given views of `BaseWeights`, so it owns nothing but the adapter. It turns token
ids into logprobs; for sampling see `engine.py`, for how other trainers call the graph `hf_forward.py`. Sequences are
packed one after another without padding, and logits exist only for a chunk of tokens at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from grpo.config.schema import Lora
from grpo.errors import UserError
from grpo.kernels.trained_head import token_logprobs
from grpo.model.adapter_config import takes_from_base
from grpo.model.adapter_layers import adapted_experts, adapted_layers
from grpo.model.base_weights import BaseWeights
from grpo.model.checks import one_line
from grpo.model.fingerprint import check_base
from grpo.model.initial_adapter import LOFTQ, digest, read_record, write_record
from grpo.policy.activation_checkpointing import recompute_layers
from grpo.policy.adapter_files import open_adapter
from grpo.policy.experts import ExpertsAdapter, adapt_experts
from grpo.policy.fused_layers import install_fused_layers, wants_kernels
from grpo.policy.graph import build_graph, peft_config
from grpo.policy.hf_forward import patch_hf_forward
from grpo.policy.image_rows import ImageRows
from grpo.policy.lora_linear import ADAPTER, LoraLinear
from grpo.policy.packing import predicting_states
from grpo.policy.vision_tower import VisionTower

if TYPE_CHECKING:
    from grpo.images import Image


@dataclass(frozen=True)
class TokenLogprobs:
    """At T completion tokens, sequences one after another."""

    logprobs: Tensor
    """float32 [T], with gradient."""
    entropy: Tensor
    """float32 [T], of the whole distribution; with gradient where that was asked for."""


class Policy:
    """The model in training: base (borrowed) plus adapter (owned)."""

    artefact: ClassVar[str] = "adapter"
    """What `save` writes, as folders are named after it."""

    def __init__(
        self,
        base: BaseWeights,
        lora: Lora,
        *,
        seed: int = 0,
        base_name: str = "",
        kernels: str = "auto",
        tower: VisionTower | None = None,
    ):
        """Build the graph and a fresh adapter, or the one in `lora.init`. `base_name` is recorded in saved adapters;
        `kernels` is `train.kernels`. `tower` encodes the images of prompts."""
        self.base, self.tower = base, tower
        self.lora = lora
        self.peft_config = peft_config(base, lora, base_name)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft names our layer as unknown, and the base's folder as renamed
            torch.manual_seed(seed)
            self.model: PeftModel = with_adapter(build_graph(base), self.peft_config)
            if lora.target_parameters:
                adapt_experts(self.decoder, adapted_experts(base.config, lora))
                self.model.peft_config[ADAPTER].target_parameters = list(lora.target_parameters)
        self.model.peft_config[ADAPTER].base_model_name_or_path = base_name  # peft put the configuration's folder there
        self._start_from_base()
        if wants_kernels(kernels, base.device):
            install_fused_layers(self.decoder, base)
        patch_hf_forward(self.decoder)
        self.model.eval()
        self._reference: list[Tensor] | None = None
        self._check_layers()
        if lora.init is not None:
            self.load_adapter(lora.init)

    @property
    def decoder(self) -> nn.Module:
        """The causal LM inside peft's wrapper."""
        return self.model.get_base_model()

    def adapter_layers(self) -> dict[str, LoraLinear]:
        """transformers module name -> its LoRA layer."""
        return {name: module for name, module in self.decoder.named_modules() if isinstance(module, LoraLinear)}

    def expert_adapters(self) -> dict[str, ExpertsAdapter]:
        """The graph's parameter of experts -> its adapter."""
        found: dict[str, ExpertsAdapter] = {}
        for name, module in self.decoder.named_modules():
            if isinstance(module, ExpertsAdapter) and not name.endswith(".base_layer"):
                found |= {f"{name}.{each.matrix}": each for each in module.chain()}
        return found

    def all_adapters(self) -> list[LoraLinear | ExpertsAdapter]:
        """Whatever has an A and a B."""
        return [*self.adapter_layers().values(), *self.expert_adapters().values()]

    def adapted(self) -> str:
        """The kinds of linear layers that have an adapter, for a sentence."""
        return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in self.adapter_layers()))

    def _check_layers(self) -> None:
        """Raise UserError unless peft put adapters on the layers that `[lora]` means, and on no other module."""
        built = {name: (layer.r[ADAPTER], layer.scaling[ADAPTER]) for name, layer in self.adapter_layers().items()}
        meant = {name: tuple(adapter) for name, adapter in adapted_layers(self.base.config, self.lora).items()}
        others = [
            name
            for name, module in self.decoder.named_modules()
            if isinstance(module, BaseTunerLayer) and not isinstance(module, ExpertsAdapter)
        ]
        for name in sorted({*others, *meant}):
            if built.get(name) != meant.get(name) or name not in meant:
                raise UserError(
                    f"lora.target_modules = {self.lora.target_modules!r}: the installed peft puts {built.get(name)} on "
                    f"{name}, expected were {meant.get(name)} (rank, scale); name linear layers of the decoder by name"
                )

    def _start_from_base(self) -> None:
        """Give every adapter what it starts from, where that is a part of the base, and record which way it is."""
        kind = self.lora.init_lora_weights
        if takes_from_base(kind) != bool(self.base.initial):
            raise UserError(
                f"lora.init_lora_weights = {kind!r}: the base is {'' if self.base.initial else 'not '}held without "
                "what such an adapter starts from; load base and adapter together, as grpo.load does"
            )
        if not self.base.initial:
            return
        layers = self.adapter_layers()
        for name, initial in self.base.initial.items():
            layers[name].start_from(initial.start.a, initial.start.b)
        config = self.model.peft_config[ADAPTER]
        config.init_lora_weights = kind
        if kind == LOFTQ:
            config.loftq_config = {"loftq_bits": 4, "loftq_iter": self.lora.loftq_iter}

    def parameters(self) -> list[nn.Parameter]:
        """The trained tensors, in a fixed order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def set_longest(self, tokens: int) -> bool:
        """Rotate positions as for sequences of at most `tokens`, whichever share a row. Whether that is a change."""
        return self.decoder.model.rotary_emb.set_longest(tokens)

    def recompute_layers(self, mode: str, kept_mlps: int = 0) -> None:
        """What training keeps of each layer for the backward pass: one of `activations.CHECKPOINTING_MODES`.
        `kept_mlps` layers keep all of theirs under "mlp"."""
        recompute_layers(self.decoder.model.layers, mode, kept_mlps)

    def adapter_is_zero(self) -> bool:
        """Whether the adapter changes nothing, as a fresh one: it is zero, or what it started from."""
        return all(layer.is_fresh() for layer in self.all_adapters())

    def remember_reference(self) -> None:
        """Let the adapter's values of this moment be the KL reference."""
        self._reference = [parameter.detach().clone() for parameter in self.parameters()]

    def forget_reference(self) -> None:
        """Let the base be the KL reference, as it is at first."""
        self._reference = None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, without gradient, the KL reference has the adapter's place: the values remembered, or none."""
        with torch.no_grad():
            if self._reference is None:
                with self.model.disable_adapter():
                    yield
                return
            parameters = self.parameters()
            # Exchanged, not copied: a graph that waits for its backward keeps the trained values.
            trained = [parameter.data for parameter in parameters]
            for parameter, value in zip(parameters, self._reference, strict=True):
                parameter.data = value
            try:
                yield
            finally:
                for parameter, value in zip(parameters, trained, strict=True):
                    parameter.data = value

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float,
        chunk_tokens: int = 1024,
        entropy_gradient: bool = False,
        sampled: Sequence[bool] | None = None,
        tree: bool = False,
        routes: Sequence[Tensor | None] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> TokenLogprobs:
        """Logprob of every completion token under `softmax(logits / temperature)`, and the entropy there.

        `prompts` and `completions` are token ids of S sequences, none empty. `sampled` says of all completion tokens,
        one after another, which are scored; None: each. Those are the T of the result. Neighbours with the same prompt
        share one computation of it; with `tree`, so do all that begin alike, as far as they do. The last completion
        token predicts nothing and is not fed. `routes`: of each sequence the experts of its tokens that are fed
        [tokens, layers, top_k]; where one has none, or without them, routers choose. `images`: those of each sequence,
        in the order of their placeholders.
        """
        # [T, hidden] and int64 [T]
        hidden, targets = predicting_states(
            self.decoder.model, prompts, completions, self.base.device, sampled,
            tree=tree, routes=routes, images=self.image_rows(prompts, completions, images),
        )  # fmt: skip
        logprobs, entropy = token_logprobs(
            hidden,
            self.head_weight(),
            targets,
            **self.base.head_form.arguments(temperature),
            chunk_tokens=chunk_tokens,
            entropy_gradient=entropy_gradient,
        )
        return TokenLogprobs(logprobs, entropy)

    def image_rows(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        images: Sequence[Sequence[Image]] | None,
    ) -> ImageRows | None:
        """The `images` of sequences as a packed row takes them; None where there are none."""
        if images is None or not any(images):
            return None
        if self.tower is None:
            raise UserError("a prompt has images, and the model was loaded without its tower; set model.images = true")
        return ImageRows(self.tower, prompts, completions, images)

    def head_weight(self) -> Tensor:
        """The output head [vocabulary, hidden]; on the CPU, pinned, where `model.offload_head` keeps it from a GPU."""
        return self.base.head()

    def save(self, folder: Path) -> None:
        """Write what is trained."""
        self.save_adapter(folder)

    def load(self, folder: Path) -> None:
        """Take the values that `save` wrote to `folder`."""
        self.load_adapter(folder)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in peft's format, and by which it knows its base again."""
        # Trainers may have added adapters of their own; and peft would ask the hub for the base's embedding.
        self.model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=[ADAPTER])
        self.base.fingerprint.write(folder)
        write_record(folder, self.lora, self.base.initial)

    def load_adapter(self, folder: Path) -> None:
        """Replace the adapter's values by those in `folder`, whose shape and base must be the same."""
        from peft.utils import set_peft_model_state_dict

        file = open_adapter(folder, self.lora, self.base.config)
        check_base(folder, self.base.fingerprint, str(self.base.source_path))
        record = read_record(folder)
        if record is not None and digest(record) != digest(self.base.initial):
            raise UserError(
                f"{folder}: this adapter started from other values than the base was loaded without; load them together"
            )
        set_peft_model_state_dict(self.model, file.tensors(), ADAPTER)


def with_adapter(graph: nn.Module, config: LoraConfig) -> PeftModel:
    """`graph` with what `config` says on it. Raises UserError for a configuration that peft refuses."""
    try:
        return get_peft_model(graph, config)
    except ValueError as error:
        raise UserError(f"[lora]: peft takes no such adapter ({one_line(error)}); correct it") from None
