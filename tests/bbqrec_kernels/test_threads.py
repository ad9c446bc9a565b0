"""Several Python threads that call the operators at once get what each would get alone, to the last bit."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bbqrec_kernels import prefix, residual_decode, residual_quantize, residual_statistics, similarity_attention
from bbqrec_kernels.testing import simd_targets

THREADS, CALLS = 6, 48
IMPL = "cpu" if simd_targets() else "reference"


def quantized(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200 + 61 * seed, 48, generator=generator, requires_grad=True)
    codebooks = torch.randn(3, 40, 48, generator=generator, requires_grad=True)
    result = residual_quantize(x, codebooks, impl=IMPL)
    loss = (result.quantized * x.detach()).sum() + result.codebook_loss.sum() + result.commitment_loss.sum()
    counts, sums = residual_statistics(x.detach(), result.codes, codebooks.detach(), impl=IMPL)
    return [result.codes, result.quantized.detach(), counts, sums, *torch.autograd.grad(loss, (x, codebooks))]


def attended(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = 30 + 23 * seed
    inputs = [torch.randn(2, 3, length, 16, generator=generator, requires_grad=True) for _ in range(3)]
    codes = torch.randint(0, 4, (2, length, 2, 3), generator=generator)
    table = torch.randn(2, 3, 4, generator=generator, requires_grad=True)
    output = similarity_attention(*inputs, [prefix(codes, table, codebook_size=4)], is_causal=True, impl=IMPL)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), (*inputs, table))]


@pytest.mark.parametrize("operator", [quantized, attended])
def test_calls_from_several_threads_at_once(operator):
    alone = [operator(seed) for seed in range(8)]
    seeds = [call % 8 for call in range(CALLS)]
    with ThreadPoolExecutor(THREADS) as threads:
        for seed, together in zip(seeds, threads.map(operator, seeds), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(alone[seed], together, strict=True)), seed


def test_bad_rows_and_wrong_codes_that_several_threads_meet():
    codebooks = torch.randn(2, 256, 64)
    bad = torch.arange(4000) % 40 == 0
    x = torch.randn(4000, 64).where(~bad[:, None], torch.nan)
    result = residual_quantize(x, codebooks, impl=IMPL)
    assert torch.equal((result.codes == -1).all(1), bad)
    assert result.commitment_loss.isnan().all()
    wrong = result.codes.where(~bad[:, None], 256)
    for call in (
        lambda: residual_decode(wrong, codebooks, impl=IMPL),
        lambda: residual_statistics(x, wrong, codebooks, impl=IMPL),
    ):
        with pytest.raises(IndexError, match=r"^codes: got 256, expected -1 to 255"):
            call()
