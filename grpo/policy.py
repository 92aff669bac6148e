"""The training graph: transformers' model over the one copy of the base, with LoRA through peft.

Built on the `meta` device and then given views of `BaseWeights`, so it owns nothing but the adapter. It turns token
ids into logprobs; sampling is `engine.py`'s, and how other trainers call the graph is `forward.py`'s. Sequences are
packed one after another without padding, and logits exist only for a chunk of tokens at a time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress, groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AutoModelForCausalLM

from grpo.adapter_files import read_adapter
from grpo.architectures import adapter_targets
from grpo.base import BaseWeights, Segment
from grpo.config import Lora
from grpo.errors import UserError
from grpo.fingerprint import check_base
from grpo.forward import accept_batches
from grpo.graph_kernels import install, wants_kernels
from grpo.kernels import nf4
from grpo.kernels.attention import Packing, Span, packed_attention
from grpo.kernels.logprob import selected_logprobs
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.lora_sum import dense_linear
from grpo.recompute import recompute_layers
from grpo.rope import Rotary

ADAPTER = "default"
ATTENTION = "grpo_packed"


class BaseLinear(nn.Module):
    """A frozen linear layer over rows of the one copy; knows no adapter."""

    def __init__(self, rows: Segment, bias: Tensor | None):
        super().__init__()
        self.out_features = rows.rows
        self.in_features = rows.weight.shape[1] * (1 if rows.absmax is None else 2)
        self.weight = nn.Parameter(rows.weight, requires_grad=False)
        self.register_buffer("absmax", rows.absmax, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def dense(self) -> Tensor:
        """The weight [out, in] in the compute dtype: a view, or dequantised anew."""
        return self.weight if self.absmax is None else nf4.dequantize(self.weight, self.absmax)

    def forward(self, x: Tensor) -> Tensor:
        return FrozenLinear.apply(x, self)


class FrozenLinear(torch.autograd.Function):
    """x W^T + b, rounded once. W is dequantised in the forward and again in the backward: no dense W is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: BaseLinear) -> Tensor:
        ctx.layer = layer
        return dense_linear(x.flatten(0, -2), layer.dense(), layer.bias, None).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.layer.dense(), None


class RoundedOnce(torch.autograd.Function):
    """x W^T + b + shrunk up^T, rounded once (kernels/lora_sum.py). W is made again in the backward, not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shrunk: Tensor, up: Tensor, layer: BaseLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(shrunk, up)
        low_rank = LowRank(shrunk.flatten(0, -2), up)
        y = dense_linear(x.flatten(0, -2), layer.dense(), layer.bias, low_rank)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shrunk, up = ctx.saved_tensors
        x_grad = grad @ ctx.layer.dense() if ctx.needs_input_grad[0] else None
        return x_grad, grad @ up, grad.flatten(0, -2).t() @ shrunk.flatten(0, -2), None


class LoraLinear(nn.Module, LoraLayer):
    """peft's LoRA on a BaseLinear: y = x W^T + b + (dropout(x) A^T) (s B)^T, rounded once.

    A and B are kept in float32 and used in x's dtype, with s B rounded once, as the engine uses them.
    """

    def __init__(
        self,
        base_layer: BaseLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def scaled(self, adapter: str = ADAPTER) -> tuple[Tensor, Tensor]:
        """A [r, in] and s B [out, r] in float32."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight * self.scaling[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return self.base_layer(x)
        shrunk, up = [], []
        for adapter in active:
            a, b = self.scaled(adapter)
            shrunk.append(F.linear(self.lora_dropout[adapter](x), a.to(x.dtype)))
            up.append(b.to(x.dtype))
        return RoundedOnce.apply(x, joined(shrunk), joined(up), self.base_layer)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "the adapter cannot be merged in place, the base is shared with generation; export a merged model instead"
        )

    unmerge = merge


def joined(columns: list[Tensor]) -> Tensor:
    """Side by side; one alone as it is."""
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over `packed_attention`. query, key, value [1, heads, tokens, dim]."""
    assert attention_mask is None and query.shape[0] == 1, "sequences come packed in one row, without a mask"
    packing = packing or Packing.of_lengths([query.shape[2]], query.device)
    output = packed_attention(
        query[0], key[0], value[0], packing, scale=scaling, window=sliding_window, softcap=softcap
    )
    return output[None], None


AttentionInterface.register(ATTENTION, attend)


@dataclass(frozen=True)
class Scored:
    """Logprob and entropy of every completion token, sequences one after another; float32 [tokens]."""

    logprobs: Tensor
    entropy: Tensor


@dataclass
class PackedRow:
    """Sequences laid out one after another, a prompt shared by neighbours only once."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Of each token in its own sequence."""
    spans: list[Span] = field(default_factory=list)
    predicting: list[int] = field(default_factory=list)
    """For every completion token, the place in the row that predicts it."""

    def append(self, tokens: Sequence[int], first_position: int, prefix: Span | None = None) -> None:
        """Add `tokens` as a span that continues `prefix`."""
        if not tokens:
            return
        place = (prefix.start, prefix.length) if prefix else (0, 0)
        self.spans.append(Span(len(self.tokens), len(tokens), *place))
        self.positions += range(first_position, first_position + len(tokens))
        self.tokens += tokens


def packed_row(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], sampled: Sequence[bool] | None = None
) -> PackedRow:
    """`completions` after their `prompts`. `sampled`: which of all completion tokens are predicted; None: each."""
    row = PackedRow()
    pairs = zip(prompts, completions, strict=True)
    for prompt, members in groupby(pairs, key=lambda pair: list(pair[0])):
        fed = [list(completion[:-1]) for _, completion in members]
        if len(fed) == 1:
            row.append(prompt + fed[0], 0)
            row.predicting += range(len(row.tokens) - len(fed[0]) - 1, len(row.tokens))
            continue
        row.append(prompt, 0)
        shared = row.spans[-1]
        for own in fed:
            row.predicting += [shared.start + shared.length - 1, *range(len(row.tokens), len(row.tokens) + len(own))]
            row.append(own, len(prompt), prefix=shared)
    if sampled is not None:
        row.predicting = list(compress(row.predicting, sampled))
    return row


def predictors(
    decoder: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    sampled: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """(`decoder`'s output where each completion token is predicted [tokens, hidden], those tokens [tokens]).

    Only tokens that are `sampled` count, where it is given: what an environment wrote is context and no more.
    """
    row = packed_row(prompts, completions, sampled)
    hidden = decoder(
        input_ids=torch.tensor([row.tokens], device=device),
        position_ids=torch.tensor([row.positions], device=device),
        use_cache=False,
        packing=Packing(row.spans, device),
    ).last_hidden_state[0]
    tokens = [token for completion in completions for token in completion]
    targets = torch.tensor(tokens if sampled is None else list(compress(tokens, sampled)), device=device)
    return hidden.index_select(0, torch.tensor(row.predicting, device=device)), targets


class Policy:
    """The model in training: base (borrowed) plus adapter (owned)."""

    def __init__(self, base: BaseWeights, lora: Lora, *, seed: int = 0, base_name: str = "", kernels: str = "auto"):
        """Build the graph and a fresh adapter, or the one in `lora.init`. `base_name` is recorded in saved adapters;
        `kernels` is `train.kernels`."""
        self.base = base
        self.lora = lora
        self.peft_config = peft_config(base, lora, base_name)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft names our layer as unknown, and the base's folder as renamed
            torch.manual_seed(seed)
            self.model: PeftModel = get_peft_model(build_graph(base), self.peft_config)
        self.model.peft_config[ADAPTER].base_model_name_or_path = base_name  # peft put the configuration's folder there
        if wants_kernels(kernels, base.device):
            install(self.decoder, base)
        accept_batches(self.decoder)
        self.model.eval()
        self._reference: list[Tensor] | None = None
        if lora.init is not None:
            self.load_adapter(lora.init)
        if not self.adapter_layers():
            raise UserError(f"lora.target_modules = {lora.target_modules}: the model has none of them")

    @property
    def decoder(self) -> nn.Module:
        """The causal LM inside peft's wrapper."""
        return self.model.get_base_model()

    def adapter_layers(self) -> dict[str, LoraLinear]:
        """transformers module name -> its LoRA layer."""
        return {name: module for name, module in self.decoder.named_modules() if isinstance(module, LoraLinear)}

    def parameters(self) -> list[nn.Parameter]:
        """The trained tensors, in a fixed order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def set_longest(self, tokens: int) -> bool:
        """Rotate positions as for sequences of at most `tokens`, whichever share a row. Whether that is a change."""
        return self.decoder.model.rotary_emb.set_longest(tokens)

    def recompute_layers(self, form: str) -> None:
        """What training keeps of each layer for the backward pass: one of `memory.FORMS`."""
        recompute_layers(self.decoder.model.layers, form)

    def adapter_is_idle(self) -> bool:
        """Whether the adapter changes nothing, as a fresh one."""
        return not any(bool(layer.lora_B[ADAPTER].weight.any()) for layer in self.adapter_layers().values())

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
    ) -> Scored:
        """Logprob of every completion token under `softmax(logits / temperature)`, and the entropy there.

        Neighbours with the same prompt share one computation of it. The last completion token predicts nothing and is
        not fed. `sampled` says of all completion tokens, one after another, which are scored; None: each.
        """
        hidden, targets = predictors(self.decoder.model, prompts, completions, self.base.device, sampled)
        logprobs, entropy = selected_logprobs(
            hidden,
            self.head_weight(),
            targets,
            temperature=temperature,
            softcap=getattr(self.base.config, "final_logit_softcapping", None),
            chunk_tokens=chunk_tokens,
            entropy_gradient=entropy_gradient,
        )
        return Scored(logprobs, entropy)

    def head_weight(self) -> Tensor:
        """The output head [vocabulary, hidden]; on the CPU, pinned, where `model.offload_head` keeps it from a GPU."""
        return self.base.head()

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in peft's format, and by which it knows its base again."""
        # Trainers may have added adapters of their own; and peft would ask the hub for the base's embedding.
        self.model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=[ADAPTER])
        self.base.fingerprint.write(folder)

    def load_adapter(self, folder: Path) -> None:
        """Replace the adapter's values by those in `folder`, whose shape and base must be the same."""
        from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

        mine = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        tensors = read_adapter(folder, self.peft_config, {name: tensor.shape for name, tensor in mine.items()})
        check_base(folder, self.base.fingerprint, str(self.base.source_path))
        set_peft_model_state_dict(self.model, tensors, ADAPTER)


def peft_config(base: BaseWeights, lora: Lora, base_name: str) -> LoraConfig:
    """`[lora]` as peft's configuration, with our layer registered for the shared weights."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=adapter_targets(base.config, lora.target_modules),
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        bias=lora.bias,
        init_lora_weights=lora.init_lora_weights,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    config._register_custom_module({BaseLinear: LoraLinear})
    return config


def build_graph(base: BaseWeights) -> nn.Module:
    """transformers' causal LM with every weight a view of `base`."""
    config = copy.deepcopy(base.config)
    with torch.device("meta"):
        graph = AutoModelForCausalLM.from_config(config, dtype=base.dtype, attn_implementation=ATTENTION)
    for linear in base.linears.values():
        for part in linear.parts:
            set_module(graph, part, BaseLinear(*linear.part(part)))
    for name, tensor in base.tensors.items():
        rows = base.config.vocab_size if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor.shape[0]
        set_parameter(graph, name, tensor[:rows])
    graph.tie_weights()
    rebuild_buffers(graph, config, base.device, base.dtype)
    left = [name for name, tensor in [*graph.named_parameters(), *graph.named_buffers()] if tensor.is_meta]
    if left:
        raise UserError(f"{base.source_path}: tensor {left[0]} is missing; pass a complete model")
    return graph.requires_grad_(False)


def rebuild_buffers(
    graph: nn.Module, config: Any, device: torch.device, dtype: torch.dtype, longest: int | None = None
) -> None:
    """Compute what a checkpoint has not: rotary frequencies, for `longest` tokens, and Gemma's embedding scale."""
    for name, module in list(graph.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if "rotary" in name:
            set_module(graph, name, Rotary(config, longest, device))
        elif hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(config.hidden_size**0.5, dtype=dtype, device=device)


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def set_parameter(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the frozen parameter at the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    try:
        owner = root.get_submodule(parent)
    except AttributeError:
        owner = nn.Module()
    expected = owner._parameters.get(leaf)
    if expected is None:
        raise UserError(
            f"the checkpoint has a tensor {name} that the model's architecture lacks; pass a model whose "
            "files belong together"
        )
    if expected.shape != tensor.shape:
        raise UserError(
            f"the checkpoint's {name} has shape {tuple(tensor.shape)}, config.json says "
            f"{tuple(expected.shape)}; pass a model whose files belong together"
        )
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
