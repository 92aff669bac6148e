"""`model.keep_16bit = "auto"`: which linear layers stay in 16 bit, by what rounding each costs the model's output.

Rounding a weight W to NF4 changes what its layer gives for the input x_t of token t by dW x_t. To second order the
divergence of the model's distributions that this causes is the Fisher information along dW,

    KL(p || p + dW) = 1/2 E [ ( sum_t g_t . dW x_t )^2 ],

where g_t is the gradient of a text's log-likelihood with respect to the layer's output, and the expectation is over
labels drawn from the model itself (with the text's own tokens it would be no divergence: Kunstner and others,
"Limitations of the Empirical Fisher Approximation", 2019). Texts and draws are few, so it is an estimate, good for an
order. How the errors of two layers add up is left out: products of estimates this rough make the choice worse.

The loaded NF4 base is walked forward once and backward layer by layer, and every weight is read once more, alone: of
the 16-bit model there is never more than one weight, and of activations every layer's input and one layer's inside. Not
here: how kept layers are held (`base_weights.py`), and the file that records them (`fingerprint.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.kernels.attention import Packing
from grpo.kernels.host_matmul import mm_transposed
from grpo.kernels.logprob import selected_logprobs
from grpo.model import fingerprint, weight_source
from grpo.model.base_weights import BaseWeights
from grpo.model.decoder_config import DecoderConfig
from grpo.model.head import Head
from grpo.model.initial_adapter import write_record
from grpo.model.meta_graph import last_norm
from grpo.model.sizes import AUTO_SHARE, linear_shapes, nf4_bytes
from grpo.model.weight_source import NF4Tensor, Source
from grpo.policy.calibration_texts import TEXTS
from grpo.policy.graph import build_graph
from grpo.policy.lora_linear import BaseLinear
from grpo.policy.packing import PackedRow

LABELS = 8
"""Draws of every text's labels. Each is a backward pass."""
LABEL_SEED = 0
CHUNK_TOKENS = 128
"""Tokens whose logits exist at once."""


def load_base(
    source: Source,
    model: Model,
    tokenizer: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    like: Sequence[Path] = (),
    agree: Callable[[Any], Any] = lambda value: value,
    status: Callable[[str], None] = lambda text: None,
) -> BaseWeights:
    """The base as `model` says, with the layers of `keep_16bit = "auto"` chosen, or those that were chosen before.

    `like`: folders of a run or an adapter whose base this is to be; the first that records a choice decides. `agree`
    gives every process of a run what the first one passes: a GPU may order two close layers either way. The base's
    fingerprint says what "auto" has come to. Raises UserError for a checkpoint that is 4-bit already.
    """
    if model.keep_16bit != "auto" or not model.load_in_4bit:
        return BaseWeights(source, model, device=device, dtype=dtype)
    if source.stored_as == "NF4":
        raise UserError(f'{source.path}: keep_16bit = "auto" needs an unquantised checkpoint; this one is NF4')
    in_16bit = agree(recorded(like, linear_shapes(source.config.get_text_config())))
    if in_16bit is None:
        base = BaseWeights(source, model.model_copy(update={"keep_16bit": []}), device=device, dtype=dtype)
        status("choosing the layers to keep in 16 bit")
        costs = rounding_costs(source, base, calibration(tokenizer, base))
        in_16bit = agree(choose(costs, base.config, dtype.itemsize))
        base.keep_16bit(source, in_16bit)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM takes what the driver calls free
    else:
        base = BaseWeights(source, model.model_copy(update={"keep_16bit": in_16bit}), device=device, dtype=dtype)
    base.fingerprint = replace(base.fingerprint, kept_16bit=in_16bit)
    return base


def recorded(folders: Sequence[Path], layers: Collection[str]) -> list[str] | None:
    """What "auto" chose for the run or the adapter in the first of `folders` that says so. Names beside `layers` are
    another model's: loading its adapter will be refused in better words."""
    for folder in folders:
        record = fingerprint.read(folder)
        if record is not None and record.kept_16bit is not None and set(record.kept_16bit) <= set(layers):
            return record.kept_16bit
    return None


def record_base(base: BaseWeights, lora: Lora, run: Path) -> None:
    """Write into the folder of a run what its base is known by when it is resumed, what "auto" chose, and what its
    adapter started from in the base."""
    base.fingerprint.write(run)
    write_record(run, lora, base.initial)


def calibration(tokenizer: Any, base: BaseWeights) -> list[list[int]]:
    """Token ids of the calibration texts, as far as the model has positions for them."""
    longest = getattr(base.config, "max_position_embeddings", None)
    return [tokenizer(text)["input_ids"][:longest] for text in TEXTS]


def choose(costs: dict[str, float], config: DecoderConfig, itemsize: int, share: float = AUTO_SHARE) -> list[str]:
    """The layers that are worth most for the memory they take, within `share` of what all of them would take.

    `costs`: layer -> what rounding it costs. `config`: transformers', of the text model. In the order of the model.
    """
    sizes = {
        part: rows * columns * itemsize - nf4_bytes(rows, columns, itemsize)
        for part, (rows, columns) in linear_shapes(config).items()
    }
    left = share * sum(sizes.values())
    selected = set()
    for part in sorted(costs, key=lambda part: costs[part] / sizes[part], reverse=True):
        if costs[part] > 0 and sizes[part] <= left:
            selected.add(part)
            left -= sizes[part]
    return [part for part in sizes if part in selected]


def rounding_costs(
    source: Source, base: BaseWeights, sequences: Sequence[Sequence[int]], labels: int = LABELS
) -> dict[str, float]:
    """Every linear layer -> nats of divergence, summed over the tokens of `sequences`, that its rounding causes.

    `base`: `source` in NF4. Layers that are NF4 in the checkpoint itself cost nothing, as there is nothing to keep.
    """
    graph = build_graph(base).eval()
    lengths = [len(tokens) for tokens in sequences]
    calls, last = walk(graph, sequences, base.device)
    gradients = label_gradients(last_norm(graph), base, last, labels)
    costs: dict[str, float] = {}
    for call in reversed(calls):
        layer_costs, gradients = through_layer(source, call, gradients, lengths)
        costs |= layer_costs
    return costs


@dataclass(frozen=True)
class LayerCall:
    """A decoder layer, by its name, and what it was called with."""

    name: str
    layer: nn.Module
    x: Tensor
    """[1, tokens, hidden]"""
    arguments: dict[str, Any]


@torch.no_grad()
def walk(graph: nn.Module, sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[list[LayerCall], Tensor]:
    """Run the decoder on `sequences`, one after another in a row: its layers' calls, and what the last one gives."""
    row = PackedRow()
    for number, tokens in enumerate(sequences):
        row.append(list(tokens), 0, number)
    calls: list[LayerCall] = []
    last: list[Tensor] = []

    def called(name: str, layer: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        calls.append(LayerCall(name, layer, inputs[0], arguments))

    hooks = [last_norm(graph).register_forward_pre_hook(lambda norm, inputs: last.append(inputs[0]))]
    for number, layer in enumerate(graph.model.layers):
        name = f"model.layers.{number}"
        hooks.append(layer.register_forward_pre_hook(lambda *args, name=name: called(name, *args), with_kwargs=True))
    graph.model(
        input_ids=torch.tensor([row.tokens], device=device),
        position_ids=torch.tensor([row.positions], device=device),
        use_cache=False,
        packing=Packing(row.spans, device),
    )
    for hook in hooks:
        hook.remove()
    return calls, last[0]


def label_gradients(norm: nn.Module, base: BaseWeights, last: Tensor, labels: int) -> list[Tensor]:
    """Gradients with respect to `last`, the last layer's output, of the log-likelihood of `labels` draws of labels."""
    last = last.detach().requires_grad_()
    hidden, head, form = norm(last)[0], base.head(), base.head_form
    gradients = []
    for targets in draw(hidden.detach(), head, labels, form).unbind(1):
        logprobs, _ = selected_logprobs(hidden, head, targets, **form.arguments(), chunk_tokens=CHUNK_TOKENS)
        gradients += torch.autograd.grad(logprobs.sum(), [last], retain_graph=True)
    return gradients


@torch.no_grad()
def draw(hidden: Tensor, head: Tensor, count: int, form: Head) -> Tensor:
    """int64 [tokens, count], drawn from the model's own distribution at every one of `hidden` [tokens, hidden]."""
    generator = torch.Generator(hidden.device).manual_seed(LABEL_SEED)
    drawn = []
    for rows in hidden.split(CHUNK_TOKENS):
        logits = torch.empty(len(rows), len(head), dtype=hidden.dtype, device=hidden.device)
        mm_transposed(rows, head, logits)
        drawn.append(
            torch.multinomial(form.logits(logits.float()).softmax(-1), count, replacement=True, generator=generator)
        )
    return torch.cat(drawn)


def through_layer(
    source: Source, call: LayerCall, gradients: list[Tensor], lengths: list[int]
) -> tuple[dict[str, float], list[Tensor]]:
    """What rounding each linear of one layer costs, and the gradients with respect to the layer's input.

    `gradients`: one for each draw of labels, with respect to the layer's output. `lengths` of the sequences.
    """
    linears = {f"{call.name}.{name}": each for name, each in call.layer.named_modules() if isinstance(each, BaseLinear)}
    changes, outputs = {}, {}

    def ran(part: str, linear: BaseLinear, inputs: tuple[Tensor], output: Tensor) -> None:
        changes[part], outputs[part] = output_change(source, part, linear, inputs[0].detach()), output

    hooks = [
        linear.register_forward_hook(lambda *args, part=part: ran(part, *args)) for part, linear in linears.items()
    ]
    x = call.x.detach().requires_grad_()
    with torch.enable_grad():
        result = call.layer(x, **call.arguments)
    for hook in hooks:
        hook.remove()
    result = result[0] if isinstance(result, tuple) else result
    sums = {part: torch.zeros(len(lengths), device=x.device) for part in linears}
    earlier = []
    for gradient in gradients:
        to_input, *to_outputs = torch.autograd.grad(result, [x, *outputs.values()], gradient, retain_graph=True)
        earlier.append(to_input)
        for part, g in zip(outputs, to_outputs, strict=True):
            by_token = (g[0].float() * changes[part][0].float()).sum(-1)
            sums[part] += torch.stack([each.sum() for each in by_token.split(lengths)]).square()
    return {part: float(each.sum()) / (2 * len(gradients)) for part, each in sums.items()}, earlier


@torch.no_grad()
def output_change(source: Source, part: str, linear: BaseLinear, x: Tensor) -> Tensor:
    """What `linear` would give more for `x` if its weight were not rounded, in `x`'s dtype."""
    weight = source.read(f"{part}.weight")
    dense = linear.dense()
    exact = dense if isinstance(weight, NF4Tensor) else weight_source.dense(weight).to(x.device, x.dtype)
    return F.linear(x, exact - dense)
