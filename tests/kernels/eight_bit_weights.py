"""Random 8-bit weights of every kind, with the values that are easily got wrong."""

import torch

from grpo.kernels.eight_bit import FP8, INT8

KINDS = (INT8, FP8)


def random_form(kind, rows, columns, shared, groups, device="cpu"):
    """(codes, scales) of all codes that there are: subnormal, negative and largest ones too."""
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    if kind == FP8:
        codes[codes & 0x7F == 0x7F] = 0x80
    scales = (torch.rand(rows // shared, groups, generator=generator) + 0.5) * 0.01
    return codes.view(kind).to(device), scales.to(device)
