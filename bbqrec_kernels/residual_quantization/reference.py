"""The formulas in plain torch: the oracle in float64, and what runs where no compiled library could be built.

Codewords are looked up by `F.embedding`: gradients of `words[codes]` would be summed in no fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bbqrec_kernels._checks import assert_all, is_on_cpu_to_look_at

_SEARCH_ELEMENTS = 1 << 22  # of the largest temporary tensor in the search


def residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `api.residual_quantize`. Differentiable, any number of times; exact in float64."""
    return quantize_to_codes(x, codebooks, nearest_codes(x, codebooks))


@torch.no_grad()
def nearest_codes(x: Tensor, codebooks: Tensor) -> Tensor:
    """`(..., L)` int64 codes, -1 in bad rows. Squared differences are summed, so that ties are exact."""
    levels, size, width = codebooks.shape
    chunks = []
    for residual in x.reshape(-1, width).to(codebooks.dtype).split(max(1, _SEARCH_ELEMENTS // (size * width))):
        codes, bad = [], ~codebooks.isfinite().all().expand(len(residual))
        for words in codebooks:
            best, code = (residual[:, None] - words).square().sum(-1).min(-1)  # the first of equal minima
            codes.append(code)
            bad = bad | ~best.isfinite()
            residual = residual - words[code]
        chunks.append(torch.stack(codes, -1).masked_fill(bad[:, None], -1))
    return torch.cat(chunks).reshape(*x.shape[:-1], levels)


def quantize_to_codes(x: Tensor, codebooks: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `residual_quantize`, and through autograd their gradients, for codes found before."""
    bad = codes[..., :1] < 0
    mark = torch.where(bad, torch.nan, 1.0).to(codebooks.dtype)
    rows = x.to(codebooks.dtype) * mark  # a bad row and its gradient are NaN
    residual, quantized = rows, torch.zeros_like(rows)
    commitment, codebook = [], []
    for words, chosen in zip(codebooks, codes.clamp_min(0).unbind(-1), strict=True):
        word = torch.where(bad, 0.0, F.embedding(chosen, words))  # (..., D)
        commitment.append(_mean_square(residual - word.detach()))
        codebook.append(_mean_square(residual.detach() - word))
        residual = residual - word.detach()
        quantized = quantized + word.detach()
    straight_through = quantized + (rows - rows.detach())  # the value of `quantized`, the gradient of the identity
    return straight_through.to(x.dtype), codes, torch.stack(commitment), torch.stack(codebook)


def residual_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """See `api.residual_decode`."""
    check_range(codes, codebooks)
    total = codebooks.new_zeros(*codes.shape[:-1], codebooks.shape[-1])
    for level, words in enumerate(codebooks):
        chosen = codes[..., level].long()
        total = total + torch.where(chosen[..., None] >= 0, F.embedding(chosen.clamp_min(0), words), 0)
    return total


@torch.no_grad()
def residual_statistics(x: Tensor, codes: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """See `api.residual_statistics`."""
    check_range(codes, codebooks)
    levels, size, width = codebooks.shape
    residual = x.reshape(-1, width).to(codebooks.dtype)
    codes = codes.reshape(-1, levels).long()
    counts_of_none = torch.zeros(size, dtype=torch.int64, device=x.device)  # a float32 stops counting at 2^24
    counts, sums = [], []  # not in place: torch.func.vmap could not
    for level in range(levels):
        chosen = codes[:, level]
        valid = chosen >= 0
        bucket = torch.where(valid, chosen, 0)
        counts.append(counts_of_none.index_add(0, bucket, valid.long()))
        sums.append(torch.zeros_like(codebooks[level]).index_add(0, bucket, torch.where(valid[:, None], residual, 0)))
        residual = torch.where(valid[:, None], residual - codebooks[level, bucket], residual)
    return torch.stack(counts).to(codebooks.dtype), torch.stack(sums)


def _mean_square(difference: Tensor) -> Tensor:
    """Mean over all elements, zero where there is none."""
    return difference.square().sum() / max(difference.numel(), 1)


def check_range(codes: Tensor, codebooks: Tensor) -> None:
    """Raises where a kernel would read out of bounds: an assertion while tracing and on CUDA, otherwise a sentence."""
    if codes.numel() == 0:
        return
    if not is_on_cpu_to_look_at(codes):
        assert_all((codes >= -1) & (codes < codebooks.shape[1]), "codes: expected -1 to codebook_size - 1")
        return
    low, high = map(int, torch.aminmax(codes))
    if low < -1 or high >= codebooks.shape[1]:
        wrong = low if low < -1 else high
        raise IndexError(f"codes: got {wrong}, expected -1 to {codebooks.shape[1] - 1} (codebook_size - 1)")
