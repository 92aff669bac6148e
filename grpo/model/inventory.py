"""Every tensor of a checkpoint is accounted for before weights are read: used, named in a notice, or refused.

What the model needs is asked of transformers, whose class is built without weights. Beyond that a file may hold what is
known to be no part of a text model's computation. An output head that is not the embedding, although the configuration
says so, is kept, as transformers keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.model.architectures import causal_class, vllm_class
from grpo.model.checks import one_line
from grpo.model.decoder_config import DecoderConfig
from grpo.model.families.table import family_of
from grpo.model.layout import EMBEDDING, HEAD
from grpo.model.stored_form import stored_form
from grpo.model.weight_source import Packed, Source, dense

EXTRAS = {
    "a scale for activations or the KV cache, which stay in their own type": re.compile(
        r"(^|\.)layers\.\d+\..*\.((input|activation|output|k|v|q|kv|prob_output)_scale|input_scale_ub"
        r"|input_zero_point)$"
    ),
    "rotary frequencies, which are computed from the configuration": re.compile(
        r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)attn_rot_embd\."
    ),
    "a part for images or sound, of which text needs nothing": re.compile(
        r"^(model\.)?(\w*(vision|visual|image|audio|speech)\w*|multi_modal_projector|mm_projector)\.|^(v|a|mm)\."
    ),
    "a part that predicts several tokens at once, which sampling does not use": re.compile(
        r"^(model\.)?(mtp|mtp_layers|mtp_block|nextn)\.|^blk\.\d+\.nextn\."
    ),
}
"""What is left out of a text model, in the words of the notice -> how its tensors are called."""
ROWS = 8192
"""Of a vocabulary, compared at once."""


def account(source: Source) -> list[str]:
    """Check that `source` has all tensors of its model and no other; a sentence each about what is not used.

    Afterwards `source.names` are the used ones, and `tie_word_embeddings` in its configuration is what its tensors
    say. Raises UserError naming the tensor that is missing, of another shape or form, or of no use.
    """
    config = source.config.get_text_config()
    needed, left_out = parameters(source, config)
    if config.tie_word_embeddings and HEAD not in source.names:
        del needed[HEAD]
    for name, shape in needed.items():
        check_tensor(source, name, shape)
    surplus = source.names - needed.keys() - set(source.tower.values())
    notices = [*source.notices, *extras(source, config, surplus, left_out)]
    source.notices = []
    source.names = set(needed)
    return notices + settled_head(source, config)


def parameters(source: Source, config: DecoderConfig) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Of transformers' model of `config`: name -> shape of everything that it keeps in a checkpoint, and patterns of
    what it expects in checkpoints of its family and leaves out."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever transformers makes of a stranger's configuration
        raise UserError(
            f"{source.path}: transformers builds no model of its configuration ({one_line(error)}); correct it"
        ) from None
    lists = [getattr(module, "_keys_to_ignore_on_load_unexpected", None) or [] for module in model.modules()]
    left_out = [pattern for each in lists for pattern in each]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return as_stored(config, shapes), left_out


def as_stored(config: DecoderConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """`shapes` of the graph's tensors, under the names and in the pieces in which a checkpoint has them."""
    form = stored_form(config)
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name not in form.pieces:
            stored[form.renamed.get(name, name)] = shape
        for piece in form.pieces.get(name, ()):
            stored[piece.name] = (*(shape[:1] if piece.expert is None else ()), piece.rows, *shape[2:])
    return stored


def check_tensor(source: Source, name: str, shape: tuple[int, ...]) -> None:
    """Raise UserError unless `source` has the tensor `name`, of that shape, in a form that is read."""
    if name not in source.names:
        raise UserError(f"{source.path}: tensor {name} is missing{in_place_of(source, name)}; pass a complete model")
    stored = source.shape(name)
    if stored != shape:
        raise UserError(
            f"{source.path}: {name} has shape {stored}, config.json says {shape}; pass a model whose files belong "
            "together"
        )


def in_place_of(source: Source, name: str) -> str:
    """What else the layer of the missing tensor `name` has, for the sentence: there it may be in another form."""
    layer = name.rpartition(".")[0]
    others = sorted(other for other in source.names if other.startswith(f"{layer}.") and not other.endswith(".bias"))
    return f" (there is {others[0]}, and only plain, 8-bit and NF4 weights are read)" if others else ""


def extras(source: Source, config: DecoderConfig, surplus: set[str], left_out: list[str]) -> Iterator[str]:
    """A sentence about each kind of `surplus` tensors that may be left out; `left_out` are patterns of what
    transformers does not read. Raises UserError for any other."""
    names_of_kind: dict[str, list[str]] = {}
    for name in sorted(surplus):
        kind = next((kind for kind, pattern in EXTRAS.items() if pattern.search(name)), None)
        if kind is None and predicts_more(config, name):
            kind = list(EXTRAS)[-1]
        if kind is None and any(re.search(pattern, name) for pattern in left_out):
            kind = f"which transformers' {causal_class(config.model_type)} leaves out too"
        if kind is None:
            raise UserError(
                f"{source.path}: tensor {name} has no use in transformers' {causal_class(config.model_type)} as "
                "config.json describes it; pass a model whose files belong together, or convert it to plain weights"
            )
        names_of_kind.setdefault(kind, []).append(name)
    for kind, names in names_of_kind.items():
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{source.path}: not used: {names[0]}{rest}, {kind}"


def predicts_more(config: DecoderConfig, name: str) -> bool:
    """Whether `name` is of one of the layers after the last that `num_nextn_predict_layers` announces."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    further = getattr(config, "num_nextn_predict_layers", None)
    if layer is None or not isinstance(further, int):
        return False
    return config.num_hidden_layers <= int(layer[1]) < config.num_hidden_layers + further


def settled_head(source: Source, config: DecoderConfig) -> list[str]:
    """Let the configuration say whether the output head is the embedding, by their values; a sentence if it changes."""
    if HEAD not in source.names or not (config.tie_word_embeddings or family_of(config.model_type).always_tied):
        return []
    if same_values(source.read(HEAD), source.read(EMBEDDING)):
        source.names.discard(HEAD)
        config.tie_word_embeddings = True
        return []
    if family_of(config.model_type).always_tied:
        raise UserError(
            f"{source.path}: {HEAD} differs from {EMBEDDING}, and vLLM's {vllm_class(config.model_type)} has the "
            "embedding for its output head; remove the head from the file, or use another model"
        )
    config.tie_word_embeddings = False
    return [
        f"{source.path}: config.json says that the output head is the embedding, and {HEAD} has other values; the two "
        "are kept apart, as transformers does (set tie_word_embeddings = false there)"
    ]


def same_values(one: Tensor | Packed, other: Tensor | Packed) -> bool:
    """Whether two [vocabulary, hidden] tensors are equal as numbers, looked at by rows to spare memory."""
    return all(
        torch.equal(some.float(), others.float())
        for some, others in zip(dense(one).split(ROWS), dense(other).split(ROWS), strict=True)
    )
