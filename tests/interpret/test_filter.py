"""The filter of the Triton search: its bound holds whatever the inputs, and it loses no winner.

The kernel computes rows in float16, factors and bound; what tensor cores make of them is modelled here, as badly as
they may: products are exact, every sum is cut off towards zero to 22 bits, in the order that is worst.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bbqrec_kernels import residual_quantize
from bbqrec_kernels.residual_quantization import triton_kernels as tk
from bbqrec_kernels.testing import residual_quantization as rq


@triton.jit
def _rounded_rows_kernel(
    x,
    ranges,
    rounded,
    norm_factor,
    slack,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row, d = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    residual = tl.load(x + row[:, None] * WIDTH + d[None, :], (row < ROWS)[:, None] & (d < WIDTH)[None, :], 0.0)
    norm = tl.sum(residual * residual, 1)
    a, b, c = tk._rounded_rows(residual, norm, ranges, 1, WIDTH)
    tl.store(rounded + row[:, None] * BLOCK_WIDTH + d[None, :], a)
    tl.store(norm_factor + row, b)
    tl.store(slack + row, c)


def prepared(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    """What the search works with: rows and codewords in float16, half norms, factors, bounds; and the two scales."""
    (rows, width), (size, _) = x.shape, codebook.shape
    constants = tk.codebook_constants(1, size, width)
    block_rows, block_width, size_block = (
        triton.next_power_of_2(rows),
        constants["BLOCK_WIDTH"],
        constants["BLOCK_SIZE"],
    )
    ranges, grid = torch.zeros(3, 1, dtype=torch.int32), (triton.cdiv(size, size_block), 1)
    words, half_norms = torch.empty(size, block_width, dtype=torch.float16), torch.empty(size)
    tk._range_kernel[grid](codebook, ranges, **constants)
    tk._prepare_kernel[grid](codebook, ranges, words, half_norms, PADDED_SIZE=size, **constants)
    rounded = torch.empty(block_rows, block_width, dtype=torch.float16)
    factor, slack = torch.empty(block_rows), torch.empty(block_rows)
    sizes = {"ROWS": rows, "WIDTH": width, "BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width}
    _rounded_rows_kernel[(1,)](x, ranges, rounded, factor, slack, **sizes)
    return rounded[:rows, :width], words[:, :width], half_norms, factor[:rows], slack[:rows]


def cut(value: Tensor, bits: int = 22) -> Tensor:
    """float64 cut off towards zero to so many bits: less than any tensor core keeps of a sum."""
    mantissa, exponent = torch.frexp(value)
    return torch.ldexp((mantissa * 2.0**bits).trunc(), exponent - bits)


def tensor_core_scores(rounded: Tensor, words: Tensor, half_norms: Tensor, factor: Tensor) -> Tensor:
    """Scores as the kernel may get them: one product after the other, the largest first, all cut off the same way."""
    products = rounded.double()[:, None] * words.double()
    products = products.gather(-1, products.abs().argsort(-1, descending=True))
    total = torch.zeros(products.shape[:2], dtype=torch.float64)
    for product in products.unbind(-1):
        total = cut(total + product)
    return (half_norms.double() * factor.double()[:, None] - total).float().double()


def exact_scores(x: Tensor, codebook: Tensor, rounded: Tensor, words: Tensor, factor: Tensor) -> Tensor:
    """The same scores in exact arithmetic (float64), in the units of the kernel."""

    def scale(values: Tensor, in_float16: Tensor) -> Tensor:  # a power of two, read off the largest element
        at = values.abs().flatten().argmax()
        ratio = in_float16.double().flatten()[at] / values.double().flatten()[at]
        return 2.0 ** ratio.log2().round()

    word_scale = scale(codebook, words)
    scaled = codebook.double() * word_scale
    dots = []
    for row, in_float16 in zip(x, rounded, strict=True):
        dots.append(row.double() * scale(row, in_float16) @ scaled.T if row.any() else torch.zeros(len(codebook)))
    return 0.5 * scaled.square().sum(-1) * factor.double()[:, None] - torch.stack(dots).double()


def adversarial(name: str) -> tuple[Tensor, Tensor]:
    """Rows and codewords that are hard on a bound."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, codebook = normal(16, 96), normal(48, 96)
    if name == "halfway between float16 numbers":
        step = 2.0**-11
        x = (1 + torch.randint(0, 512, x.shape, generator=generator) * 2 * step + step) * x.sign()
        codebook = (1 + torch.randint(0, 512, codebook.shape, generator=generator) * 2 * step + step) * codebook.sign()
    elif name == "errors of one sign":
        x, codebook = torch.full((16, 96), 1 + 2.0**-11 * 0.999), torch.full((48, 96), 1 + 2.0**-11 * 0.999)
        codebook = codebook + 1e-4 * normal(48, 96).abs()
    elif name == "large norms":
        x, codebook = x * 1e18, codebook * 1e18
    elif name == "tiny norms":
        x, codebook = x * 1e-15, codebook * 1e-15
    elif name == "near ties":
        codebook = codebook[:1] + 1e-4 * normal(48, 96)
    elif name == "cancellation":
        x = torch.cat([x[:, :48], x[:, :48]], 1)
        codebook = torch.cat([codebook[:, :48], 1e-3 * normal(48, 48) - codebook[:, :48]], 1)
    elif name == "one element of all":
        x[:, 5] *= 3e4
        codebook[:, 5] *= 3e4
    elif name == "rows much longer":
        x = x * 1e12
    elif name == "codewords much longer":
        codebook = codebook * 1e12
    elif name == "one row of zeros":
        x[3] = 0
    elif name == "one long codeword":
        codebook[7] *= 1000
    return x, codebook


NAMES = [
    "normal",
    "halfway between float16 numbers",
    "errors of one sign",
    "large norms",
    "tiny norms",
    "near ties",
    "cancellation",
    "one element of all",
    "rows much longer",
    "codewords much longer",
    "one row of zeros",
    "one long codeword",
]


@pytest.mark.parametrize("name", NAMES)
def test_triton_bound_holds(name: str) -> None:
    x, codebook = adversarial(name)
    rounded, words, half_norms, factor, slack = prepared(x, codebook)
    scores = tensor_core_scores(rounded, words, half_norms, factor)
    exact = exact_scores(x, codebook, rounded, words, factor)
    error = (scores - exact).abs().amax(-1)
    assert (error <= slack).all(), (error / slack).max()
    best = exact.argmin(-1, keepdim=True)
    assert (scores.gather(-1, best)[:, 0] - scores.amin(-1) <= 2 * slack).all()  # the winner passes


def test_triton_bound_is_not_idle() -> None:
    """It is tight enough to settle nearly all rows, and rounding to float16 alone would give wrong codes."""
    x, codebooks = rq.random_inputs(512, width=64, levels=1)
    rounded, words, half_norms, factor, slack = prepared(x, codebooks[0])
    scores = tensor_core_scores(rounded, words, half_norms, factor)
    ordered = scores.sort(-1).values
    unsettled = (ordered[:, 1:3] - ordered[:, :1] <= 2 * slack[:, None]).float().mean(0)
    assert unsettled[0] < 0.06
    assert unsettled[1] < 0.01
    close = codebooks[0, :1] + 2e-4 * codebooks[0]
    rounded, words, half_norms, factor, slack = prepared(x[:64], close)
    wrong = tensor_core_scores(rounded, words, half_norms, factor).argmin(-1)
    right = torch.cdist(x[:64].double(), close.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    assert (wrong != right).any()
    codes = residual_quantize(x[:64], close[None], impl="triton").codes
    rq.assert_codes(codes, x[:64], close[None])
    assert (codes[:, 0] == right).float().mean() > (wrong == right).float().mean()


@pytest.mark.parametrize("size", [1500, 2100])
def test_triton_sections_of_a_large_codebook(size: int) -> None:
    """Codes are told apart by 10 bits within a section; sections are compared with each other."""
    x, codebooks = rq.tied_inputs(40, width=6, size=size, levels=2)
    codes = residual_quantize(x, codebooks, impl="triton").codes
    rq.assert_codes(codes, x, codebooks)
    assert codes.max() < (size + 1) // 2
    assert (codes >= 1024).any() or size < 2048


@pytest.mark.parametrize("copies", [2, 3])
def test_triton_ties_give_the_lowest_index(copies: int) -> None:
    """Two candidates are compared in the tile; three or more take the search by distances."""
    x, codebooks = rq.random_inputs(64, width=20, size=90, levels=2)
    part = 90 // copies
    codebooks = codebooks[:, :part].repeat(1, copies, 1)
    assert residual_quantize(x, codebooks, impl="triton").codes.max() < part


def test_triton_extreme_values() -> None:
    """The same rows are bad as in the reference, and the codes of the others are right."""
    values = [0.0, 1.0, -1.0, 1e-30, -1e10, 1e19, -1.8e19, 2e19, 3e19, 1e30, -3e38, torch.inf, torch.nan]
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        chosen = torch.randint(len(values), (22,), generator=generator)
        row, words = torch.tensor(values)[chosen[:16]].reshape(8, 2), torch.tensor(values[:11])[chosen[16:] % 11]
        codebooks = words.reshape(1, 3, 2)
        expected = residual_quantize(row, codebooks, impl="reference").codes
        codes = residual_quantize(row, codebooks, impl="triton").codes
        assert torch.equal(codes < 0, expected < 0)
        good = codes[:, 0] >= 0
        rq.assert_codes(codes[good], row[good], codebooks)


@pytest.mark.parametrize("width", [513, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_rows_too_wide_for_registers(width: int, dtype: torch.dtype) -> None:
    x, codebooks = rq.tied_inputs(20, width=width, size=18, levels=3, dtype=dtype)
    x[4, 7] = torch.nan
    good = torch.arange(20) != 4
    result = residual_quantize(x, codebooks, impl="triton")
    rq.assert_codes(result.codes[good], x[good], codebooks)
    assert result.codes.max() < 9
    assert (result.codes[4] == -1).all()
    assert result.quantized[4].isnan().all()
    assert result.commitment_loss.isnan().all()
    clean = residual_quantize(x[good], codebooks, impl="triton")
    expected = residual_quantize(x[good], codebooks, impl="reference")
    assert torch.equal(clean.codes, result.codes[good])
    torch.testing.assert_close(clean.quantized, expected.quantized)
    torch.testing.assert_close(clean.commitment_loss, expected.commitment_loss)
    codebooks[1, 3, 2] = torch.inf
    assert (residual_quantize(x[good], codebooks, impl="triton").codes == -1).all()


def test_triton_needs_no_aligned_section() -> None:
    """A level of zeros, and a residual of zeros: all distances tie."""
    x, codebooks = torch.ones(5, 8), torch.zeros(2, 7, 8)
    assert not residual_quantize(x, codebooks, impl="triton").codes.any()
    codebooks[0, 2:] = 1
    assert residual_quantize(x, codebooks, impl="triton").codes.tolist() == [[2, 0]] * 5
