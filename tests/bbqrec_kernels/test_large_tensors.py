"""CPU kernels on tensors of more than 2^31 elements: what lies behind them is read and written where it is.

That of attention backward, and of every implementation where tensors are only far apart, is
`similarity_attention/test_accuracy.py::test_offsets_past_32_bits`.
"""

import fcntl
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bbqrec_kernels import residual_decode, residual_quantize, residual_statistics, similarity_attention
from bbqrec_kernels.testing import simd_targets

GIGABYTES = 11  # the most that a test here writes, and some more

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(not simd_targets(), reason="the CPU library is not built"),
    pytest.mark.usefixtures("_memory"),
]


@pytest.fixture
def _memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One test at a time, in all workers of pytest-xdist, and only where there is memory for it."""
    shared = tmp_path_factory.getbasetemp().parent
    with (shared / "large_tensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        meminfo = Path("/proc/meminfo")
        if not meminfo.exists():
            pytest.skip("how much memory is free is not known on this system")
        free = int(re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text())[1]) / 2**20
        if free < GIGABYTES:
            pytest.skip(f"{free:.0f} GiB of memory are free, tensors of more than 2^31 elements need {GIGABYTES}")
        yield


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of memory that takes none until something else is written to it."""
    array = np.zeros((math.prod(shape), dtype.itemsize), np.uint8)
    return torch.from_numpy(array).view(dtype).view(shape)


def test_residual_quantization() -> None:
    width, last = 1024, 100
    rows = 2**31 // width + last
    x, codebooks = zeros(rows, width), torch.randn(1, 2, width)
    x[-last:] = torch.randn(last, width)
    expected = residual_quantize(x[-last:].double(), codebooks.double(), impl="reference")
    assert len(expected.codes.unique()) == 2

    result = residual_quantize(x.requires_grad_(), codebooks, impl="cpu")
    codes, loss = result.codes, result.commitment_loss
    assert torch.equal(codes[-last:], expected.codes)
    assert torch.equal(result.quantized[-last:], expected.quantized.bfloat16())
    del result  # the memory of `quantized`
    shortest, code = codebooks[0].double().square().mean(1).min(0)  # what is nearest to the rows of zeros
    assert torch.equal(codes[:-last].unique(), code[None])
    total = shortest * (rows - last) + expected.commitment_loss * last
    torch.testing.assert_close(loss.detach(), (total / rows).float())
    (grad,) = torch.autograd.grad(loss, x, torch.full((1,), float(rows)))
    rest = 2 / width * (x.detach()[-last:] - codebooks[0, codes[-last:, 0]])
    torch.testing.assert_close(grad[-last:], rest.bfloat16())
    del grad

    counts, sums = residual_statistics(x, codes, codebooks, impl="cpu")
    few_counts, few_sums = residual_statistics(x[-last:].double(), expected.codes, codebooks.double(), impl="reference")
    few_counts[0, code] += rows - last
    assert torch.equal(counts, few_counts.float())
    torch.testing.assert_close(sums, few_sums.float())


def test_residual_decode() -> None:
    width, last = 1024, 100
    rows = 2**31 // width + last
    codebooks = torch.randn(1, 2, width, requires_grad=True)
    codes = torch.full((rows, 1), -1)
    codes[-last:] = torch.arange(last)[:, None] % 2
    decoded = residual_decode(codes, codebooks, impl="cpu")
    assert torch.equal(decoded[-last:], codebooks[0, codes[-last:, 0]])
    grad = zeros(rows, width, dtype=torch.float32)
    grad[-last:] = torch.randn(last, width)
    (total,) = torch.autograd.grad(decoded, codebooks, grad)
    torch.testing.assert_close(total[0], torch.stack([grad[-last:][start::2].sum(0) for start in (0, 1)]))


def test_similarity_attention() -> None:
    """Of 33 sequences the last one alone has tokens, and it begins where 2^31 elements end."""
    shape, tokens = (33, 2, 2**17, 256), 70
    inputs = [zeros(*shape) for _ in range(3)]
    for tensor in inputs:
        tensor[-1, :, :tokens] = torch.randn(2, tokens, 256)
    lengths = torch.zeros(len(inputs[0]), dtype=torch.int64)
    lengths[-1] = tokens
    output = similarity_attention(*inputs, is_causal=True, query_lengths=lengths, key_lengths=lengths, impl="cpu")
    few = [tensor[-1:, :, :tokens].double() for tensor in inputs]
    expected = similarity_attention(*few, is_causal=True, impl="reference")
    torch.testing.assert_close(output[-1:, :, :tokens], expected.bfloat16(), rtol=0.01, atol=0.01)
    assert not output[-1, :, tokens:].any()
