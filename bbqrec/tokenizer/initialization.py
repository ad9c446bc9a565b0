"""Codebooks that start where the data is: residual k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from bbqrec_kernels import residual_quantize, residual_statistics


@torch.no_grad()
def residual_kmeans(
    x: Tensor, levels: int, codebook_size: int, *, iterations: int = 10, generator: torch.Generator
) -> Tensor:
    """`(N, d)` vectors to `(levels, codebook_size, d)` codebooks, each level clustering what the last left over.

    Every level starts from distinct random residuals (with repetition and a little noise where there are fewer than
    codewords) and takes `iterations` steps of Lloyd's algorithm; a codeword that nobody chose moves to a random
    residual.
    """
    codebooks, residual = [], x
    for _ in range(levels):
        centroids = _sample(residual, codebook_size, generator)
        for _ in range(iterations):
            codes = residual_quantize(residual, centroids[None]).codes
            counts, sums = residual_statistics(residual, codes, centroids[None])
            centroids = torch.where(
                counts[0, :, None] > 0,
                sums[0] / counts[0, :, None].clamp_min(1),
                _sample(residual, codebook_size, generator),
            )
        codebooks.append(centroids)
        residual = residual - residual_quantize(residual, centroids[None]).quantized
    return torch.stack(codebooks)


def _sample(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(x), generator=generator)
    if len(x) >= n:
        return x[order[:n]]
    rows = order[torch.arange(n) % len(x)]
    spread = x.std(0, correction=0) if len(x) > 1 else torch.ones_like(x[0])
    return x[rows] + 1e-3 * spread * torch.randn(n, x.shape[1], generator=generator)
