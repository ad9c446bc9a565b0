"""`residual_decode` and `residual_statistics` against loops, and what happens to codes out of range."""

import pytest
import torch
from torch import Tensor

from bbqrec_kernels import residual_decode, residual_quantize, residual_statistics
from bbqrec_kernels.residual_quantization import reference
from bbqrec_kernels.testing import LAYOUTS, assert_gradient, assert_within_budget, poisoned_outputs, with_layout
from bbqrec_kernels.testing import residual_quantization as rq

SHAPES = [
    (0, 8, 3, 4),
    (1, 1, 1, 1),
    (3, 63, 3, 16),
    (65, 64, 4, 2),
    (200, 65, 1, 17),
    (1500, 7, 3, 3),
    (64, 256, 2, 256),
]


def some_codes(rows: int, levels: int, size: int) -> Tensor:
    """Random codes, a tenth of them -1."""
    codes = torch.randint(size, (rows, levels))
    return codes.masked_fill(torch.rand(rows, levels) < 0.1, -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "width", "levels", "size"), SHAPES)
def test_decode(impl: str, rows: int, width: int, levels: int, size: int, layout: str) -> None:
    codes = some_codes(rows, levels, size)
    codebooks, up = torch.randn(levels, size, width, requires_grad=True), torch.randn(rows, width)
    with poisoned_outputs():
        strided = with_layout(codebooks, layout)
        decoded = residual_decode(with_layout(codes, layout), strided, impl=impl)
        grad = torch.autograd.grad(decoded, strided, with_layout(up, layout))[0]

    low = reference.residual_decode(codes, codebooks)
    low_grad = torch.autograd.grad(low, codebooks, up)[0]
    expected, expected_grad = torch.zeros(rows, width).double(), torch.zeros(levels, size, width).double()
    for i in range(rows):
        for level in range(levels):
            if (code := codes[i, level]) >= 0:
                expected[i] += codebooks[level, code].detach()
                expected_grad[level, code] += up[i]
    assert_within_budget("decoded", decoded, low, expected)
    assert_gradient("gradient of codebooks", grad, low_grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "width", "levels", "size"), SHAPES)
def test_statistics(impl: str, rows: int, width: int, levels: int, size: int, layout: str, dtype: torch.dtype) -> None:
    codes = some_codes(rows, levels, size)
    x, codebooks = rq.random_inputs(rows, width=width, levels=levels, size=size, dtype=dtype)
    with poisoned_outputs():
        counts, sums = residual_statistics(
            with_layout(x, layout), with_layout(codes, layout), with_layout(codebooks, layout), impl=impl
        )
    expected_counts, expected = torch.zeros(levels, size), torch.zeros(levels, size, width).double()
    for i in range(rows):
        residual = x[i].double()
        for level in range(levels):
            if (code := codes[i, level]) >= 0:
                expected_counts[level, code] += 1
                expected[level, code] += residual
                residual = residual - codebooks[level, code]
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts, expected_counts)
    low = reference.residual_statistics(x, codes, codebooks)[1]
    assert_within_budget("sums", sums, low, expected)


def test_decode_of_the_codes_is_the_quantized_row(impl: str) -> None:
    x, codebooks = rq.random_inputs((2, 70), width=33)
    result = residual_quantize(x, codebooks, impl=impl)
    assert torch.equal(residual_decode(result.codes, codebooks, impl=impl), result.quantized)


def test_minus_one_everywhere(impl: str) -> None:
    codes, codebooks = torch.full((70, 3), -1), torch.randn(3, 5, 8, requires_grad=True)
    x = torch.full((70, 8), torch.nan)  # a bad row: its residual must reach no sum
    with poisoned_outputs():
        decoded = residual_decode(codes, codebooks, impl=impl)
        decoded.sum().backward()
        counts, sums = residual_statistics(x, codes, codebooks, impl=impl)
    for zero in (decoded, codebooks.grad, counts, sums):
        assert not zero.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integers_of_any_size(impl: str, dtype: torch.dtype) -> None:
    x, codebooks = rq.random_inputs(20, width=5, size=256)
    codes = torch.randint(100, (20, 3))
    assert torch.equal(
        residual_decode(codes.to(dtype), codebooks, impl=impl), residual_decode(codes, codebooks, impl=impl)
    )
    for one, other in zip(
        residual_statistics(x, codes.to(dtype), codebooks, impl=impl),
        residual_statistics(x, codes, codebooks, impl=impl),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("code", [-2, 16, 2**40, -(2**63)])
def test_code_out_of_range(impl: str, code: int) -> None:
    x, codebooks = rq.random_inputs(130, width=5, size=16)
    codes = torch.zeros(130, 3, dtype=torch.int64)
    codes[129, 2] = code
    message = rf"^codes: got {code}, expected -1 to 15 \(codebook_size - 1\)$"
    with pytest.raises(IndexError, match=message):
        residual_decode(codes, codebooks, impl=impl)
    with pytest.raises(IndexError, match=message):
        residual_statistics(x, codes, codebooks, impl=impl)


def test_code_out_of_range_in_a_backward_operator() -> None:
    """Operators can be called without the public functions: even then nothing is read out of bounds."""
    operators, codes = torch.ops.bbqrec_kernels, torch.full((4, 1), 9)
    x, codebooks = torch.randn(4, 3), torch.randn(1, 2, 3)
    with pytest.raises(IndexError, match="codes: got 9"):
        operators.residual_decode_backward(x, codes, codebooks)
    with pytest.raises(IndexError, match="codes: got 9"):
        operators.residual_quantize_backward(x, codebooks, codes, x, None, None, True, False)


def test_counts_do_not_stop_where_float32_stops_counting() -> None:
    rows = 2**24 + 5
    x, codes = torch.zeros(rows, 1, dtype=torch.float16), torch.zeros(rows, 1, dtype=torch.int64)
    for impl in ("cpu", "reference"):
        counts, _ = residual_statistics(x, codes, torch.zeros(1, 1, 1), impl=impl)
        assert counts.item() == 2**24 + 4, impl  # the nearest float32


def test_statistics_are_not_differentiable(impl: str) -> None:
    x, codebooks = rq.random_inputs(5)
    counts, sums = residual_statistics(
        x.requires_grad_(), torch.zeros(5, 3, dtype=torch.int64), codebooks.requires_grad_(), impl=impl
    )
    assert not counts.requires_grad
    assert not sums.requires_grad


def test_statistics_give_the_means_of_k_means(impl: str) -> None:
    """At one level, codebooks moved to `sums / counts` never fit worse: what the statistics are for."""
    x, codebooks = rq.random_inputs(500, width=8, levels=1, size=16)
    losses = []
    for _ in range(4):
        result = residual_quantize(x, codebooks, impl=impl)
        losses.append(float(result.commitment_loss))
        counts, sums = residual_statistics(x, result.codes, codebooks, impl=impl)
        codebooks = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp_min(1), codebooks)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
