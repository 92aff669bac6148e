"""Gradient checkpointing of decoder layers: keep a layer's input, run the layer again in the backward pass.

"none" keeps what autograd saves, "mlp" all but what the kernels' MLP computes again by itself, "layer" only the input
of each layer, and "offload" moves those inputs to host memory (pinned, on a stream of its own, overlapping the
computation) and fetches each while the layer after it is still in its backward. All give the same bits as long as a
micro-batch is one tile of the MLP (kernels/sizes.py), beyond it the same to the rounding of float32 sums. Which mode a
run takes is decided in `activations.py`; the layers know of this through transformers' checkpointing hook, and trainers
that switch checkpointing on and off as transformers has it get the same.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from grpo.kernels.sizes import MLP_TILES
from grpo.memory.activations import CHECKPOINTING_MODES
from grpo.policy.fused_layers import FusedLayer
from grpo.policy.rng import RandomState

HOST_BLOCK = 64 << 20
"""Bytes of a pinned block. torch rounds pinned allocations up to a power of two, which would double large ones."""

SHARED = "shared_kv_states"
"""transformers' argument for keys and values that later layers see too."""

Layer = Callable[..., Tensor]


def recompute_layers(layers: Sequence[nn.Module], mode: str, kept_mlps: int = 0) -> None:
    """Let `layers`, decoder layers that run one after another in training mode, use `mode`, of CHECKPOINTING_MODES.
    `kept_mlps`: under "mlp" as many layers keep what the others compute again."""
    assert mode in CHECKPOINTING_MODES, mode
    store = HostStore() if mode == "offload" else None
    for index, layer in enumerate(layers):
        if hasattr(layer, "keep_mlp"):
            layer.keep_mlp, layer.mlp_tiles = mode != "mlp" or index < kept_mlps, MLP_TILES.get(mode, 1)
        assert mode != "mlp" or hasattr(layer, "keep_mlp"), "transformers' own layers have no such mode"
        layer.gradient_checkpointing = mode in ("layer", "offload")
        layer._gradient_checkpointing_func = partial(recomputed, layer, store, index == 0)


def patch_checkpointing_switch(graph: nn.Module) -> None:
    """Let `graph.gradient_checkpointing_enable()` and `_disable()`, as trainers call them, switch this recomputation.

    Enabling takes the mode that was chosen last if it recomputes layers, else "layer". DPO in TRL disables it for the
    reference and enables it again at every step: transformers' own way would put torch's function in its place.
    """
    graph._set_gradient_checkpointing = types.MethodType(switch_layers, graph)


def switch_layers(
    graph: nn.Module,
    enable: bool = True,
    gradient_checkpointing_func: Callable[..., Any] | None = None,
    every_n_layers: int = 1,
) -> None:
    """transformers' hook; torch's function is not used, so how it would be called (`use_reentrant`) does not matter."""
    for index, layer in enumerate(graph.model.layers):
        if not hasattr(layer, "_gradient_checkpointing_func"):
            layer._gradient_checkpointing_func = partial(recomputed, layer, None, index == 0)
        layer.gradient_checkpointing = enable and index % every_n_layers == 0


def recomputed(
    layer: nn.Module, store: HostStore | None, first: bool, run: Layer, x: Tensor, *others: Tensor | None
) -> Tensor:
    """`run(x, *others)`, with nothing but these kept for the backward pass. `run` is `layer` with its other arguments
    bound; among these may be the keys and values that layers share, which count as given and made."""
    call = LayerCall(layer, run, others)
    tensors = [*call.given(), *call.trained]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, *tensors)):
        return run(x, *others)
    output, *made = _Recomputed.apply(call, store, first, x, *tensors)
    call.share(made)
    return output


class LayerCall:
    """A call of a decoder layer as a function of tensors alone, which may be called again."""

    def __init__(self, layer: nn.Module, run: Layer, others: Sequence[Tensor | None]):
        self.run, self.others = run, others
        self.again = partial(run, make_output=False) if isinstance(layer, FusedLayer) else run
        self.trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        keywords = run.keywords if isinstance(run, partial) else {}
        self.shared: Any = keywords.get(SHARED)
        """Type of layer -> (keys, values) of the layers before, by transformers; None where layers share none."""
        self.read: dict[str, tuple[Tensor, ...]] = dict(self.shared or {})
        self.made: list[str] = []
        """The types of layers whose keys and values this one makes."""

    def given(self) -> list[Tensor]:
        """All tensors but x that the layer may use."""
        return [*(each for each in self.others if each is not None), *chain.from_iterable(self.read.values())]

    def __call__(self, run: Layer, x: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
        """The output of `run`, `self.run` or `self.again`, and the keys and values that it makes."""
        tensors = iter(given)
        others = [None if each is None else next(tensors) for each in self.others]
        if self.shared is None:
            return [run(x, *others)]
        read = {kind: tuple(next(tensors) for _ in pair) for kind, pair in self.read.items()}
        shared = dict(read)
        output = partial(run, **{SHARED: shared})(x, *others)
        self.made = [kind for kind, pair in shared.items() if pair is not read.get(kind)]
        return [output, *chain.from_iterable(shared[kind] for kind in self.made)]

    def share(self, made: Sequence[Tensor]) -> None:
        """Give later layers the keys and values that this one made."""
        for kind, pair in zip(self.made, batched(made, 2), strict=True):
            self.shared[kind] = pair


def batched(tensors: Sequence[Tensor], size: int) -> list[tuple[Tensor, ...]]:
    """`tensors` in tuples of `size`."""
    return [tuple(tensors[start : start + size]) for start in range(0, len(tensors), size)]


class _Recomputed(torch.autograd.Function):
    """A LayerCall's `run` in the forward pass, its `again` in the backward, which may leave out what no backward reads.

    The trained parameters are inputs, so that a gradient exists even where the first layer's x needs none.
    """

    @staticmethod
    def forward(
        ctx: Any, call: LayerCall, store: HostStore | None, first: bool, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.random, ctx.offloaded = call, RandomState(x.device), None
        ctx.set_materialize_grads(False)
        given = tensors[: len(tensors) - len(call.trained)]
        if store is None:
            ctx.save_for_backward(*given, x)
        else:
            ctx.save_for_backward(*given)
            ctx.offloaded = store.keep(x, first)
        return tuple(call(call.run, x, given))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = list(ctx.saved_tensors)
        if ctx.offloaded is None:
            x = given.pop()
        else:
            x, ctx.offloaded = ctx.offloaded.load(), None
        needed = ctx.needs_input_grad[3 : 4 + len(given)]
        x, *given = (tensor.detach().requires_grad_(wanted) for tensor, wanted in zip((x, *given), needed, strict=True))
        with torch.enable_grad(), ctx.random.restored():
            outputs = ctx.call(ctx.call.again, x, given)
            # The edges alone: the layer's output would otherwise live as long as its graph.
            pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
            edges = [(get_gradient_edge(output), grad) for output, grad in pairs if grad is not None]
            del outputs, pairs
        tensors = [x, *given, *ctx.call.trained]
        ends, starts = zip(*edges, strict=True)
        wanted = [each for each in tensors if each.requires_grad]
        found = iter(torch.autograd.grad(ends, wanted, starts, allow_unused=True))
        return None, None, None, *(next(found) if each.requires_grad else None for each in tensors)


class HostStore:
    """Host memory for the layer inputs of one forward pass, in blocks that later passes use again.

    On a GPU the blocks are pinned and all copies run on one side stream, in order; a block may therefore be handed
    out again as soon as the copy from it is queued. On a CPU the same code copies at once.
    """

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self.stream: torch.cuda.Stream | None = None
        self.newest: Callable[[], Offloaded | None] = lambda: None

    def keep(self, x: Tensor, first: bool) -> Offloaded:
        """Start copying `x` to the host. `first`: no layer before this one waits for its backward."""
        if self.stream is None and x.is_cuda:
            self.stream = torch.cuda.Stream(x.device)
        before = None if first else self.newest()
        if before is not None:
            before.drop_device_copy()
        offloaded = Offloaded(self, x, before)
        self.newest = weakref.ref(offloaded)
        return offloaded

    def take(self, size: int, device: torch.device) -> list[Tensor]:
        """Blocks for `size` bytes."""
        pinned = device.type == "cuda"
        block = HOST_BLOCK if pinned else size
        count = -(-size // block)
        result = [self.free.pop() for _ in range(min(count, len(self.free)))] if pinned else []
        while len(result) < count:
            result.append(torch.empty(block, dtype=torch.uint8, pin_memory=pinned))
        return result

    def copying(self) -> Any:
        """Inside, copies are queued behind what the current stream has been given so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)


class Offloaded:
    """One layer's input: on the device until the next layer runs, then on the host, fetched once."""

    def __init__(self, store: HostStore, x: Tensor, before: Offloaded | None):
        self.store, self.before = store, before
        self.on_device: Tensor | None = x.detach()
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        blocks = store.take(x.nbytes, x.device)
        self.blocks = blocks
        if store.stream is not None:
            # Also gives the blocks of a pass that ends without a backward back.
            self.release = weakref.finalize(self, store.free.extend, blocks)
        with store.copying():
            for block, part in self.parts(x.detach()):
                block.copy_(part, non_blocking=True)
            self.copied = self.mark()

    def parts(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each block, as far as it is used, with the bytes of `x` that belong there."""
        flat = x.reshape(-1).view(torch.uint8)
        for block, part in zip(self.blocks, flat.split(self.blocks[0].numel()), strict=True):
            yield block[: part.numel()], part

    def mark(self) -> torch.cuda.Event | None:
        """The point that the copies have reached."""
        return self.store.stream.record_event() if self.store.stream is not None else None

    def drop_device_copy(self) -> None:
        """Give up the tensor on the device. Waiting for the copy first makes its memory safe to use again."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        self.on_device = None

    def fetch(self) -> None:
        """Start copying back, unless the tensor is still there."""
        if self.on_device is not None:
            return
        self.on_device = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with self.store.copying():
            for block, part in self.parts(self.on_device):
                part.copy_(block, non_blocking=True)
            self.copied = self.mark()
        self.blocks = []
        if self.store.stream is not None:
            self.release()

    def load(self) -> Tensor:
        """The layer's input. The one before starts to come back meanwhile."""
        self.fetch()
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        x, self.on_device = self.on_device, None
        if self.before is not None:
            self.before.fetch()
            self.before = None
        assert x is not None
        return x
