"""The policy whose weights are trained themselves, without an adapter: what the optimiser moves is what vLLM reads.

It is used as a `Policy` is. What it saves is a whole model in Hugging Face's format. There is no adapter to switch off,
so the reference of a KL penalty is a second, frozen copy of the model that the run began with (`frozen_reference.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grpo.config.schema import Lora
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.policy.frozen_reference import FrozenReference
from grpo.policy.fused_layers import install_fused_layers, wants_kernels
from grpo.policy.graph import build_graph
from grpo.policy.hf_forward import patch_hf_forward
from grpo.policy.model_files import load_weights, save_model
from grpo.policy.policy import Policy
from grpo.policy.trained_weights import train_weights

NO_ADAPTER = "this model is trained whole (full_finetuning) and has no adapter"


class FullPolicy(Policy):
    """The model in training: every parameter of `base`."""

    artefact: ClassVar[str] = "model"

    def __init__(self, base: BaseWeights, *, tokenizer: Any = None, kernels: str = "auto"):
        """Build the graph over `base`, whose memory is trained. `tokenizer`, transformers', is saved with the model;
        `kernels` is `train.kernels`."""
        self.base, self.lora, self.tower, self.tokenizer = base, Lora(), None, tokenizer
        graph = build_graph(base)
        train_weights(graph, base)
        self.model = graph
        if wants_kernels(kernels, base.device):
            install_fused_layers(graph, base)
        patch_hf_forward(graph)
        self.model.eval()
        self.kernels = kernels
        self.frozen: FrozenReference | None = None
        """What a KL penalty is measured against."""
        self._longest: int | None = None
        self._stands_in = False

    @property
    def decoder(self) -> nn.Module:
        """The causal LM that scores: the one in training, or inside `reference` the frozen one."""
        if self._stands_in and self.frozen is not None:
            return self.frozen.decoder
        return self.model

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """transformers' name -> parameter, each once."""
        return dict(self.model.named_parameters())

    def adapted(self) -> str:
        return "all layers"

    def head_weight(self) -> Tensor:
        """The output head [vocabulary, hidden]."""
        return self.decoder.get_output_embeddings().weight

    def adapter_is_zero(self) -> bool:
        """There is none."""
        return True

    def freeze_reference(self, storage: str) -> None:
        """Let the weights of this moment be the KL reference, copied as `loss.reference_storage` says."""
        self.forget_reference()
        self.frozen = FrozenReference(self.base, self.named_parameters(), storage, self.kernels)
        if self._longest is not None:
            self.frozen.set_longest(self._longest)

    def forget_reference(self) -> None:
        """Free the reference, if there is one."""
        self.frozen = None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, without gradient, the frozen copy scores."""
        assert self.frozen is not None, "set_reference makes one where loss.beta is above 0"
        self._stands_in = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._stands_in = False

    def set_longest(self, tokens: int) -> bool:
        self._longest = tokens
        if self.frozen is not None:
            self.frozen.set_longest(tokens)
        return bool(self.model.model.rotary_emb.set_longest(tokens))

    def save(self, folder: Path) -> None:
        """Write the model as it is now, in the dtype that it is held in."""
        save_model(folder, self.base, self.named_parameters(), self.tokenizer)

    def load(self, folder: Path) -> None:
        """Replace all weights, in place, by those that `save` wrote to `folder`."""
        load_weights(folder, self.named_parameters())

    def save_adapter(self, folder: Path) -> None:
        raise UserError(f"{NO_ADAPTER}; save the model with save_merged")

    def load_adapter(self, folder: Path) -> None:
        raise UserError(f"{folder}: {NO_ADAPTER}; load the adapter without full_finetuning")
