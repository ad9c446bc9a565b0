"""Inputs for residual quantization, and the rule that says which codes are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CODE_BAND = 1e-5


def random_inputs(
    rows: int | Sequence[int],
    *,
    width: int = 64,
    levels: int = 3,
    size: int = 256,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns normal `x (*rows, width)` in `dtype` and `codebooks (levels, size, width)`, each level at half the last.

    `codebooks` are float32 (float64 if `dtype` is). Values are drawn on the CPU: every device gets the same.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (rows,) if isinstance(rows, int) else tuple(rows)
    x = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    codebooks = torch.randn(levels, size, width, generator=generator, dtype=torch.float64)
    codebooks *= 0.5 ** torch.arange(levels)[:, None, None]
    return x.to(dtype).to(device), codebooks.to(_codebook_dtype(dtype)).to(device)


def separated_inputs(
    rows: int | Sequence[int],
    *,
    width: int = 64,
    levels: int = 3,
    size: int = 256,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `x`, `codebooks` and the codes `(*rows, levels)` int64 that are right beyond doubt.

    Codewords are corners of a cube of side `4^-level`, and each row of `x` is a sum of one codeword per level, exact
    in every floating dtype: with the right codes `quantized` equals `x`, and the last loss is zero.

    Raises:
        ValueError: a cube of `width` dimensions has fewer than `size` corners, or `levels` exceeds the 4 that bfloat16
            can tell apart.
    """
    bits = max(1, (size - 1).bit_length())
    if bits > width or levels > 4:
        raise ValueError(f"size, levels: got {size} and {levels}, expected at most 2^width = 2^{width} and 4")
    corners = (torch.arange(size)[:, None] >> torch.arange(width) % bits) & 1
    codebooks = (corners - 0.5) * 0.25 ** torch.arange(levels)[:, None, None]
    shape = (rows,) if isinstance(rows, int) else tuple(rows)
    codes = torch.randint(size, (*shape, levels), generator=torch.Generator().manual_seed(seed))
    x = codebooks[torch.arange(levels), codes].sum(-2)
    return x.to(dtype).to(device), codebooks.to(_codebook_dtype(dtype)).to(device), codes.to(device)


def tied_inputs(rows: int | Sequence[int], *, size: int = 256, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns `random_inputs` whose codewords all occur twice (or more): codes `>= ceil(size / 2)` are never right."""
    x, codebooks = random_inputs(rows, size=size, **options)
    half = (size + 1) // 2
    codebooks[:, half:] = codebooks[:, : size - half]
    return x, codebooks


def assert_codes(codes: Tensor, x: Tensor, codebooks: Tensor) -> None:
    """Checks that every code is a nearest codeword, up to the rounding of float32.

    With the residual that the codes of the levels before leave in float64, the squared distance of the chosen codeword
    may exceed the least one by at most `CODE_BAND * (‖x‖² + max‖c‖²)`, `x` being the row itself, and by squares for
    which float32 has no normal number.

    Args:
        codes: `(..., levels)` integers, no bad rows.
        x: `(..., D)`.
        codebooks: `(levels, size, D)`.

    Raises:
        AssertionError: a code is out of range, or a closer codeword exists.
    """
    levels, size, width = codebooks.shape
    if codes.shape != (*x.shape[:-1], levels):
        raise AssertionError(f"codes: got shape {tuple(codes.shape)}, expected {(*x.shape[:-1], levels)}")
    if not ((codes >= 0) & (codes < size)).all():
        raise AssertionError(f"codes: got {codes.min()} to {codes.max()}, expected 0 to {size - 1}")
    residual, books = x.detach().reshape(-1, width).double(), codebooks.detach().double()
    band = CODE_BAND * (residual.square().sum(-1) + books.square().sum(-1).max())
    band = band + width * torch.finfo(torch.float32).tiny
    for level, (words, chosen) in enumerate(zip(books, codes.reshape(-1, levels).unbind(-1), strict=True)):
        distances = torch.cdist(residual, words, compute_mode="donot_use_mm_for_euclid_dist").square()
        excess = distances.gather(-1, chosen[:, None].long())[:, 0] - distances.amin(-1) - band
        if len(excess) and excess.max() > 0:
            row = int(excess.argmax())
            raise AssertionError(
                f"codes: row {row}, level {level}: got {int(chosen[row])}, but {int(distances[row].argmin())} is "
                f"closer by {float(excess[row] + band[row]):.3g}, more than the band of {float(band[row]):.3g}"
            )
        residual = residual - words[chosen.long()]


def _codebook_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
