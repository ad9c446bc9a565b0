"""`residual_decode` and `residual_statistics` against loops, and what happens to codes out of range."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bbqrec_kernels import residual_decode, residual_quantize, residual_statistics
from bbqrec_kernels.residual_quantization import ops, reference
from bbqrec_kernels.testing import LAYOUTS, assert_gradient, assert_within_budget, poisoned_outputs, with_layout
from bbqrec_kernels.testing import residual_quantization as rq

OPERATORS = {"cpu": ops.native, "triton": ops.triton}

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
    words, gradient = codebooks.detach().double().numpy(), up.double().numpy()
    expected, expected_grad = np.zeros((rows, width)), np.zeros((levels, size, width))
    for i, row_codes in enumerate(codes.tolist()):
        for level, code in enumerate(row_codes):
            if code >= 0:
                expected[i] += words[level, code]
                expected_grad[level, code] += gradient[i]
    assert_within_budget("decoded", decoded, low, torch.from_numpy(expected))
    assert_gradient("gradient of codebooks", grad, low_grad, torch.from_numpy(expected_grad))


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
    words, residuals = codebooks.double().numpy(), x.double().numpy()
    expected_counts, expected_sums = np.zeros((levels, size), dtype=np.float32), np.zeros((levels, size, width))
    for residual, row_codes in zip(residuals, codes.tolist(), strict=True):
        for level, code in enumerate(row_codes):
            if code >= 0:
                expected_counts[level, code] += 1
                expected_sums[level, code] += residual
                residual = residual - words[level, code]
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts, torch.from_numpy(expected_counts))
    low = reference.residual_statistics(x, codes, codebooks)[1]
    assert_within_budget("sums", sums, low, torch.from_numpy(expected_sums))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_layout_and_code_of_small_integers(impl: str, data: st.DataObject) -> None:
    """Sums of small integers are exact; a code past either end is refused."""
    rows, width, levels, size = (data.draw(st.integers(1, n)) for n in (70, 80, 4, 9))
    layout, dtype = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randint(-3, 4, (rows, width), generator=generator).to(dtype)
    codebooks = torch.randint(-2, 3, (levels, size, width), generator=generator).float()
    codes = torch.randint(-1, size, (rows, levels), generator=generator)
    residual, counts, sums = x.double(), torch.zeros(levels, size), torch.zeros(levels, size, width).double()
    for level in range(levels):
        chosen = torch.zeros(rows, size + 1).double()
        chosen[torch.arange(rows), codes[:, level]] = 1  # -1 is the last column
        counts[level], sums[level] = chosen[:, :size].sum(0), chosen[:, :size].T @ residual
        residual = residual - chosen[:, :size] @ codebooks[level].double()
    strided = [with_layout(each, layout) for each in (x, codes, codebooks)]
    with poisoned_outputs():
        assert torch.equal(residual_decode(*strided[1:], impl=impl), (x.double() - residual).float())
        for found, expected in zip(residual_statistics(*strided, impl=impl), (counts, sums), strict=True):
            assert torch.equal(found, expected.float())
    wrong = data.draw(st.sampled_from([-2, size]))
    codes[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, levels - 1))] = wrong
    for call in (residual_decode, lambda *a, **b: residual_statistics(x, *a, **b)):
        with pytest.raises(IndexError, match=f"codes: got {wrong}, expected -1 to {size - 1}"):
            call(with_layout(codes, layout), codebooks, impl=impl)


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


def test_operator_called_directly_reads_nothing_out_of_bounds(kernel: str) -> None:
    ops, codes = OPERATORS[kernel], torch.zeros(4, 1, dtype=torch.int64)
    x, codebooks = torch.randn(4, 3), torch.randn(1, 2, 3)
    with pytest.raises(IndexError, match="codes: got 9"):
        ops.residual_decode_backward(x, codes + 9, codebooks)
    with pytest.raises(IndexError, match="codes: got 9"):
        ops.residual_quantize_backward(x, codebooks, codes + 9, x, None, None, True, False)
    for operator, arguments, message in [
        (ops.residual_quantize, (x, codebooks.double()), "codebooks: expected 3 dimensions"),
        (ops.residual_quantize, (x, codebooks[0]), "codebooks: expected 3 dimensions"),
        (ops.residual_quantize, (x, codebooks[:, :0]), "codebooks: expected at least one level, codeword and D"),
        (ops.residual_quantize, (x[:, 1:], codebooks), r"x: expected shape \(\.\.\., D\)"),
        (ops.residual_decode, (codes.int(), codebooks), r"codes: expected shape \(\.\.\., levels\) of int64"),
        (ops.residual_decode, (codes[:, :0], codebooks), r"codes: expected shape \(\.\.\., levels\) of int64"),
        (ops.residual_statistics, (x, codes[1:], codebooks), "codes: expected one row for each row of x"),
        (ops.residual_decode_backward, (x[1:], codes, codebooks), "codes: expected one row for each row of x"),
        (ops.residual_decode_backward, (x.half(), codes, codebooks), "grad: expected the shape and dtype"),
        (
            ops.residual_quantize_backward,
            (x, codebooks, codes, x[1:], None, None, True, False),
            "grad_quantized: expected the shape and dtype of what it is the gradient of",
        ),
        (
            ops.residual_quantize_backward,
            (x, codebooks, codes, None, None, torch.ones(2), False, True),
            "grad_codebook_loss: expected the shape and dtype of what it is the gradient of",
        ),
        (ops.residual_quantize, (x.double(), codebooks), "x: expected dtype float32, bfloat16 or float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            operator(*arguments)


def test_sums_of_a_codeword_that_most_rows_chose(impl: str) -> None:
    """More rows than one program or chunk takes; integers add up exactly in any order."""
    x, codes = torch.randint(-8, 9, (1400, 3)).float(), (torch.arange(1400)[:, None] % 50 == 0).long()
    codebooks = torch.randn(1, 3, 3, requires_grad=True)
    counts, sums = residual_statistics(x, codes, codebooks, impl=impl)
    chosen = codes[:, 0] == 1
    expected = torch.stack([x[~chosen].sum(0), x[chosen].sum(0), torch.zeros(3)])
    assert counts.tolist() == [[1372, 28, 0]]
    assert torch.equal(sums[0], expected)
    grad = torch.autograd.grad(residual_decode(codes, codebooks, impl=impl), codebooks, x)[0]
    assert torch.equal(grad[0], expected)


def test_counts_do_not_stop_where_float32_stops_counting() -> None:
    rows = 2**24 + 5  # float32 adds no 1 to 2^24
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
