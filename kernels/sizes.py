"""What a memory plan has to know of the kernels: how much they hold at once. Nothing here imports torch.

Each is used by the file that is named, and by grpo/memory, so that the two cannot disagree.
"""

from __future__ import annotations

QKV_TILE = 8192
"""lora_attention.py: rows whose normalised input exists at once."""
MLP_TILE = 4096
"""lora_mlp.py: rows whose intermediate tensors exist at once."""
MLP_TILES = {"none": 4}
"""Mode of gradient checkpointing -> so many times as many rows: beside what every layer keeps in it a tile's tensors
are small, and fewer tiles are fewer launches, which a host may be too slow for."""
ADAPTER_COLUMNS = 64
"""lora_linear.py: columns for adapters beside a matrix are a multiple of this; rows stay aligned to 128 bytes."""
RANK_MULTIPLE = 16
"""lora_shrink.py: the ranks of a served layer's adapter are rounded up to a multiple of this."""
HEAD_SLICE_BYTES = 32 << 20
"""host_matmul.py: of a matrix in host memory, what is on the GPU at a time; a copy of half a millisecond, in which its
start is lost."""
WEIGHT_SLICE_BYTES = 128 << 20
"""weight_gradient.py: of a product in float32 that is made only to be added to a gradient."""
NORM_ROWS = 1024
"""rms_norm.py: rows that are in float32 at once for the gradient of a norm's weight."""
CPU_BLOCK_BYTES = 8 << 20
"""logprob.py: each of two wide buffers on a CPU. Small enough for the caches, large enough that threads meet at few
barriers, which are slow where other processes use the cores too."""
DELTA_RULE_BYTES = 1 << 30
"""gated_delta.py: intermediate tensors at once, about; as many heads are computed together as fit, and at least one."""
DELTA_CHUNK = 64
"""recurrence.py: tokens whose part of the delta rule is computed by matrix products."""
DELTA_RULE_TENSORS = 12
"""gated_delta.py: how many float32 tensors as large as a head's keys and values exist at once in a backward pass of
torch's form, about."""
CONVOLUTION_BYTES = 512 << 20
"""short_conv.py: intermediate tensors of torch's form at once, about; so many channels are computed together."""
CONVOLUTION_TENSORS = 8
"""short_conv.py: how many float32 tensors as large as the input exist at once in a backward pass of it, about."""
EXPERTS_BYTES = 1 << 30
"""experts.py: of dequantised experts at a time, in training. Above it the host has to know how many rows each has; a
matrix of 128 experts of 1,536 x 2,048 in 16 bit takes 768 MiB."""


def delta_rule_bytes(chunks: int, spans: int, dim: int, value_dim: int) -> int:
    """delta_rule.py: of what a backward keeps for one head of values."""
    state = dim * value_dim
    chunk = 2 * DELTA_CHUNK * DELTA_CHUNK + 2 * (DELTA_CHUNK * value_dim + state)
    return 4 * (chunks * chunk + 3 * state * spans)


def largest_tile(size: int) -> int:
    """Rows of the largest tile where tiles have `size`: a small rest is shared out."""
    return size + size // 8
