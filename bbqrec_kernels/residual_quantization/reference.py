"""The formulas in plain torch: the oracle in float64, and what runs where no compiled library could be built."""

from __future__ import annotations

import torch
from torch import Tensor

_SEARCH_ELEMENTS = 1 << 22  # of the largest temporary tensor in the search


def residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `api.residual_quantize`. Differentiable; exact in float64."""
    levels, _, width = codebooks.shape
    rows = x.reshape(-1, width).to(codebooks.dtype)  # (N, D)
    with torch.no_grad():
        codes, bad = _search(rows, codebooks)
    rows = torch.where(bad[:, None], rows * torch.nan, rows)  # a bad row's gradient is NaN

    residual, quantized = rows, torch.zeros_like(rows)
    commitment, codebook = [], []
    safe_codes = codes.clamp_min(0)
    for level in range(levels):
        words = codebooks[level, safe_codes[:, level]]  # (N, D)
        words = torch.where(bad[:, None], torch.zeros_like(words), words)
        commitment.append(_mean_square(residual - words.detach()))
        rest = torch.where(bad[:, None], torch.zeros_like(residual), residual).detach()
        codebook.append(_mean_square(rest - words))
        residual = residual - words.detach()
        quantized = quantized + words.detach()
    straight_through = quantized + (rows - rows.detach())  # the gradient of the identity, the value of `quantized`
    any_bad = torch.where(bad.any(), torch.nan, 0.0).to(rows.dtype)
    return (
        straight_through.to(x.dtype).reshape(x.shape),
        codes.masked_fill(bad[:, None], -1).reshape(*x.shape[:-1], levels),
        torch.stack(commitment) + any_bad,
        torch.stack(codebook) + any_bad,
    )


def residual_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """See `api.residual_decode`."""
    _check_range(codes, codebooks)
    total = codebooks.new_zeros(*codes.shape[:-1], codebooks.shape[-1])
    for level, words in enumerate(codebooks):
        chosen = codes[..., level].long()
        total = total + torch.where(chosen[..., None] >= 0, words[chosen.clamp_min(0)], 0)
    return total


@torch.no_grad()
def residual_statistics(x: Tensor, codes: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """See `api.residual_statistics`."""
    _check_range(codes, codebooks)
    levels, size, width = codebooks.shape
    residual = x.reshape(-1, width).to(codebooks.dtype)
    codes = codes.reshape(-1, levels).long()
    counts, sums = codebooks.new_zeros(levels, size), torch.zeros_like(codebooks, memory_format=torch.contiguous_format)
    for level in range(levels):
        chosen = codes[:, level]
        valid = chosen >= 0
        bucket = torch.where(valid, chosen, 0)
        counts[level].index_add_(0, bucket, valid.to(counts.dtype))
        sums[level].index_add_(0, bucket, torch.where(valid[:, None], residual, 0))
        residual = torch.where(valid[:, None], residual - codebooks[level, bucket], residual)
    return counts, sums


def _search(rows: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """`(N, L)` nearest codes and `(N,)` whether a row is bad. Squared differences are summed, so that ties are exact."""
    levels, size, width = codebooks.shape
    if len(rows) == 0:
        empty = torch.zeros(0, levels, dtype=torch.int64, device=rows.device)
        return empty, torch.zeros(0, dtype=torch.bool, device=rows.device)
    codes, bad = [], []
    for chunk in rows.split(max(1, _SEARCH_ELEMENTS // (size * width))):
        residual, found = chunk, []
        failed = ~codebooks.isfinite().all().expand(len(chunk))
        for words in codebooks:
            best, code = (residual[:, None] - words).square().sum(-1).min(-1)  # the first of equal minima
            failed = failed | ~best.isfinite()
            found.append(code)
            residual = residual - words[code]
        codes.append(torch.stack(found, -1))
        bad.append(failed)
    return torch.cat(codes), torch.cat(bad)


def _mean_square(difference: Tensor) -> Tensor:
    """Mean over all elements, zero where there is none."""
    return difference.square().sum() / max(difference.numel(), 1)


def _check_range(codes: Tensor, codebooks: Tensor) -> None:
    """Raises where a kernel would read out of bounds; tracing and CUDA leave that to the gather itself."""
    if torch.compiler.is_compiling() or codes.device.type != "cpu" or codes.numel() == 0:
        return
    low, high = torch.aminmax(codes)
    if low < -1 or high >= codebooks.shape[1]:
        wrong = int(low) if low < -1 else int(high)
        raise IndexError(f"codes: got {wrong}, expected -1 to {codebooks.shape[1] - 1} (codebook_size - 1)")
