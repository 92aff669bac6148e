"""Calling the training graph as any transformers model is called: batches with padding, or packed by position ids.

Its layers take one row of sequences without padding. Here a batch becomes such a row and its result a batch again, so
that transformers' and TRL's trainers run it, with our kernels, as they run a model that they loaded themselves. While
it trains, a call with labels gives the loss from chunks of logits and no logits at all.

Not here: a cache of keys and values, attention weights and hidden states of inner layers. Asking for one is an error.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from grpo.errors import UserError
from grpo.kernels.attention import Packing
from grpo.kernels.trained_head import token_logprobs
from grpo.model.head import Head
from grpo.policy.activation_checkpointing import patch_checkpointing_switch
from grpo.policy.image_rows import deepstack
from grpo.policy.marked_images import MarkedImages
from grpo.policy.shared_prefix import pairs_of

MARKED = "marked_images"
"""The attribute of a decoder that has the images under negative numbers."""
IGNORED = -100
"""The label of a token that has no part in the loss, as everywhere in transformers."""
DERIVED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What TRL's collator adds for other attention kernels; position ids say the same."""


def patch_hf_forward(graph: nn.Module) -> None:
    """Let `graph`, a causal LM over packed rows, be called like transformers' own of its class."""
    for module, forward in ((graph.model, backbone_forward), (graph, causal_lm_forward)):
        module.forward = types.MethodType(method(forward, type(module).forward), module)
    patch_checkpointing_switch(graph)
    graph.config.use_cache = graph.generation_config.use_cache = False
    show_images(graph, None)


def show_images(graph: nn.Module, images: MarkedImages | None) -> None:
    """Let negative numbers in the `input_ids` of `graph`, a causal LM, be tokens of `images`."""
    object.__setattr__(graph.model, MARKED, images)  # no module, whose state would be the graph's


def method(forward: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` over `inner`, with the signature of `inner`: trainers choose the columns of a data set by it."""

    @functools.wraps(inner)
    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(inner, self, *args, **kwargs)

    return called


def backbone_forward(
    packed_forward: Callable[..., Any],
    self: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    packing: Packing | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """The decoder without its head. With `packing` the inputs are a packed row [1, tokens] already.

    input_ids [batch, length] or inputs_embeds [batch, length, hidden]; attention_mask [batch, length], 1 for a token;
    position_ids [batch, length], by default 0, 1, ... Without a mask, a position that does not follow the one before
    begins another sequence. Rows of the batch's two halves that begin alike, as a preference trainer's do, are computed
    once as far as they do. The result is 0 where the mask is. Autocast has no effect: the model's dtype decides.
    """
    if packing is not None:
        row = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        return packed_forward(self, **row, position_ids=position_ids, packing=packing, **kwargs)
    refuse(attention_mask, past_key_values if cache is None else cache, kwargs)  # `cache` since transformers 5.24
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("pass either input_ids or inputs_embeds")
    rows = Rows(given, attention_mask, position_ids)
    inputs: dict[str, Any] = {"input_ids" if inputs_embeds is None else "inputs_embeds": rows.pack(given)}
    inputs["position_ids"] = rows.positions
    wants_dict = kwargs.pop("return_dict", None)
    kwargs = {name: value for name, value in kwargs.items() if name not in DERIVED} | {"use_cache": False}
    marked: MarkedImages | None = getattr(self, MARKED)
    shown: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if marked is not None and input_ids is not None:
        embeddings, seen, at = marked.embedded(inputs.pop("input_ids")[0], self.get_input_embeddings())
        axes = marked.positions(input_ids, rows.starts)
        inputs |= {"inputs_embeds": embeddings[None], "position_ids": torch.stack([rows.pack(axis) for axis in axes])}
        shown = deepstack(self.layers, seen, at, marked.vision)
    with torch.autocast(given.device.type, enabled=False), shown:
        result = packed_forward(self, **inputs, packing=rows.packing, **kwargs)
    output = BaseModelOutputWithPast(last_hidden_state=rows.unpack(result.last_hidden_state))
    return output.to_tuple() if wants_dict is False else output


def refuse(attention_mask: Tensor | None, cache: Any, kwargs: dict[str, Any]) -> None:
    """Raise UserError for what the training graph has not."""
    if cache is not None:
        raise UserError(
            "the training graph keeps no cache of keys and values; generate with policy.generate, which uses vLLM, or "
            "pass use_cache=False"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise UserError(
                f"{name}=True: the training graph has fused layers, whose insides are not kept; leave it out"
            )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UserError(
            f"an attention mask of {attention_mask.ndim} dimensions is not supported, attention is causal; pass one of "
            "shape [batch, length]"
        )


class Rows:
    """Where the tokens of a batch are in the packed row."""

    def __init__(self, given: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None):
        self.shape = batch, length = given.shape[:2]
        device = given.device
        self.present: Tensor | None = None
        self.sources: Tensor | None = None
        """Flat places in the order of the packed row; None where it is that of `present`."""
        self.positions_in_row: Tensor | None = None
        """Where in the packed row each of `present` is; None where it is in order."""
        present = None if attention_mask is None else attention_mask.to(device).bool()
        positions = torch.arange(length, device=device) if position_ids is None else position_ids.to(device)
        positions = positions.expand(batch, length)
        self.starts = starts = torch.zeros(batch, length, dtype=torch.bool, device=device)
        """Where a sequence begins."""
        starts[:, 0] = True
        pairs = pairs_of(given, present) if position_ids is None and given.ndim == 2 else None
        if pairs is not None:
            self.present, self.sources, self.positions_in_row = pairs.present, pairs.sources, pairs.positions_in_row
            self.positions = self.pack(positions)
            self.packing = Packing(pairs.spans, device)
            return
        if present is None:
            starts[:, 1:] = positions.diff(dim=1) != 1
        elif not bool(present.all()):
            self.present = present.flatten().nonzero()[:, 0]
        sequence = starts.flatten().cumsum(0).view(batch, length)
        self.positions = self.pack(positions)
        lengths = torch.unique_consecutive(self.pack(sequence)[0], return_counts=True)[1]
        self.packing = Packing.of_lengths(lengths.tolist(), device)

    def pack(self, x: Tensor) -> Tensor:
        """[batch, length, ...] to [1, tokens, ...]."""
        flat = x.flatten(0, 1)
        sources = self.present if self.sources is None else self.sources
        return (flat if sources is None else flat.index_select(0, sources))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, tokens, ...] to [batch, length, ...], 0 at padding."""
        if self.present is None:
            return x[0].unflatten(0, self.shape)
        tokens = x[0] if self.positions_in_row is None else x[0].index_select(0, self.positions_in_row)
        rows = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return rows.index_copy(0, self.present, tokens).unflatten(0, self.shape)


def causal_lm_forward(
    logits_forward: Callable[..., Any],
    self: nn.Module,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Any:
    """The causal LM. In training mode with labels [batch, length] the result has the loss, and None for the logits.

    The loss is that of transformers: the negative log-likelihood of each label from the token before it, over
    `num_items_in_batch` or the number of labels that are not -100. `shift_labels` are in their predictors' place.
    """
    if not self.training or (labels is None and shift_labels is None):
        for name, value in (("labels", labels), ("shift_labels", shift_labels)):
            kwargs |= {} if value is None else {name: value}
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        return logits_forward(self, *args, **kwargs)
    wants_dict = kwargs.pop("return_dict", None)
    kwargs.pop("logits_to_keep", None)
    hidden = self.model(*args, **kwargs).last_hidden_state
    targets = labels_of_predictors(labels) if shift_labels is None else shift_labels
    chosen = targets != IGNORED
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, _ = token_logprobs(
            hidden[chosen],
            self.get_output_embeddings().weight,
            targets[chosen],
            **Head.of(self.config).arguments(),
        )
    loss = -logprobs.sum() / (len(logprobs) if num_items_in_batch is None else num_items_in_batch)
    output = CausalLMOutputWithPast(loss=loss)
    return output.to_tuple() if wants_dict is False else output


def labels_of_predictors(labels: Tensor) -> Tensor:
    """`labels` [batch, length], each moved to the token before it."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
