"""What training all weights takes beside them, by the form of their update: arithmetic alone, without torch."""

from __future__ import annotations

from typing import Any, Literal

from grpo.config.schema import Config
from grpo.errors import UserError
from grpo.memory.states import has_states
from grpo.model.expert_sizes import expert_sizes

Form = Literal["float32", "compensated", "stochastic"]
FORMS: tuple[Form, ...] = ("float32", "compensated", "stochastic")
"""In the order in which "auto" tries them."""
LOW_BYTES: dict[Form, int] = {"float32": 2, "compensated": 2, "stochastic": 0}
"""Of a weight's float32 value, what is kept beside the 16 bits that are served."""
GRADIENT_BYTES: dict[Form, int] = {"float32": 4, "compensated": 2, "stochastic": 2}
BLOCK = 256
"""Numbers that share a scale in 8-bit moments, as in bitsandbytes."""


def state_bytes(form: Form, optim: str, itemsize: int, *, on_gpu: bool) -> float:
    """Bytes a weight that the optimiser keeps on the device, the weight itself not among them."""
    low = LOW_BYTES[form] if itemsize == 2 else 0
    if optim == "adamw" or not on_gpu:
        return low + 8
    scales = 2 * 4 / BLOCK
    return low + scales + (0 if optim.startswith("paged") else 2)


def gradient_bytes(form: Form, itemsize: int) -> int:
    """Bytes a weight of its gradient."""
    return GRADIENT_BYTES[form] if itemsize == 2 else 4


def chosen_form(config: Config) -> Form:
    """`train.weight_update`, "auto" being the first of FORMS until a plan has chosen another."""
    asked = config.train.weight_update
    return FORMS[0] if asked == "auto" else asked


def check_trainable(shape: Any, dtype: str) -> None:
    """Raise UserError for a model of `shape` (a Shape or transformers' configuration), computed in `dtype`, whose
    weights cannot be trained in place."""
    if dtype == "float16":
        raise UserError(
            "model.full_finetuning: this device has no bfloat16, and weights in float16 lose small updates and "
            'overflow; set model.dtype = "float32", or train a LoRA adapter'
        )
    kinds = {
        "experts": expert_sizes(shape) is not None,
        "recurrent states": has_states(shape),
        "an embedding for every layer": bool(getattr(shape, "hidden_size_per_layer_input", None)),
    }
    for kind, has in kinds.items():
        if has:
            raise UserError(
                f"model.full_finetuning: the family {shape.model_type!r} has {kind}, whose weights get no gradient "
                "here; train a LoRA adapter instead"
            )
