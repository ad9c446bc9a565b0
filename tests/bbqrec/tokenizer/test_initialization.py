"""Residual k-means."""

import torch

from bbqrec.tokenizer.initialization import residual_kmeans
from bbqrec_kernels import residual_quantize


def run(x, levels=2, size=4, seed=0, **options):
    return residual_kmeans(x, levels, size, generator=torch.Generator().manual_seed(seed), **options)


def test_finds_planted_clusters():
    centres = 10 * torch.eye(4, 6)
    x = (centres[:, None] + 0.01 * torch.randn(4, 50, 6)).flatten(0, 1)
    best = min((run(x, levels=1, seed=seed)[0] for seed in range(5)), key=lambda c: torch.cdist(x, c).amin(1).sum())
    assert torch.cdist(centres, best).amin(1).max() < 0.05


def test_each_level_and_each_iteration_leaves_less():
    x = torch.randn(300, 6)
    rest = [residual_quantize(x, run(x, levels=3, size=8, iterations=n)).commitment_loss for n in (0, 10)]
    assert (rest[1].diff() < 0).all()
    assert rest[1][-1] < rest[0][-1]


def test_repeats_with_the_same_generator_only():
    x = torch.randn(100, 6)
    assert torch.equal(run(x), run(x))
    assert not torch.equal(run(x), run(x, seed=1))


def test_fewer_rows_than_codewords():
    codebooks = run(torch.randn(3, 6), size=8)
    assert codebooks.shape == (2, 8, 6)
    assert codebooks.isfinite().all()
    assert len(codebooks[0].unique(dim=0)) == 8
