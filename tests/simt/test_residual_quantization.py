"""What is particular to the CUDA kernels: schedules, plans for small machines, and the filter of the search.

Their values are tested where those of every implementation are, in tests/bbqrec_kernels/residual_quantization.
"""

from types import ModuleType

import numpy as np
import pytest
import torch

from bbqrec_kernels.testing import residual_quantization as rq


def everything(simt: ModuleType, x: torch.Tensor, codebooks: torch.Tensor) -> list[np.ndarray]:
    """All outputs of all operators."""
    rows, books = x.numpy(), codebooks.numpy()
    quantized, codes, *losses = simt.residual_quantize(rows, books)
    ups = np.ones_like(rows), *(np.ones(len(books), np.float32) for _ in range(2))
    backward = simt.residual_quantize_backward(rows, books, codes, *ups, True, True)
    decoded = simt.residual_decode(codes, books)
    decode_backward = simt.residual_decode_backward(rows, codes, books)
    statistics = simt.residual_statistics(rows, codes, books)
    return [quantized, codes, *losses, *backward, decoded, decode_backward, *statistics]


@pytest.mark.parametrize(("width", "size"), [(20, 33), (64, 100), (100, 65), (130, 40), (300, 9)])
def test_turns_of_threads_change_no_bit(simt: ModuleType, width: int, size: int) -> None:
    x, codebooks = rq.random_inputs(77, width=width, size=size, levels=2)
    expected = everything(simt, x, codebooks)
    for order in ("reverse", "shuffled"):
        simt.set_order(order)
        for one, other in zip(expected, everything(simt, x, codebooks), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("processors", "kibibytes"), [(1, 227), (2, 163), (7, 99), (3, 48)])
def test_plans_for_every_machine(simt: ModuleType, processors: int, kibibytes: int) -> None:
    """H100, A100, consumer cards, and one smaller than any: other tiles, chunks and tables, the same rows."""
    x, codebooks = rq.random_inputs(300, width=130, size=60, levels=2)
    expected = everything(simt, x, codebooks)
    simt.set_limits(processors, kibibytes * 1024)
    actual = everything(simt, x, codebooks)
    for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
        if index in (2, 3, 5, 7, 9):  # sums over rows, whose order is the plan's
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(one, other)


def test_tables_too_large_for_shared_memory(simt: ModuleType) -> None:
    x, codebooks = rq.random_inputs(200, width=9, size=700, levels=2)
    expected = everything(simt, x, codebooks)
    simt.set_limits(3, 24 * 1024)
    with_global_tables = everything(simt, x, codebooks)
    for index in (5, 7, 8, 9):  # gradients of codebooks, counts and sums
        np.testing.assert_allclose(expected[index], with_global_tables[index], rtol=1e-5, atol=1e-6)


def exact_search(x: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """The float32 search that the filter must not change: the kernel's own scores, of all codewords.

    Products are summed lane by lane and the lanes pairwise, as `score_exactly` does.
    """

    def fma(a, b, c):  # one rounding: float64 holds a product exactly, and its sum with c to far below a float32's half
        return (a.astype(np.float64) * b + c).astype(np.float32)

    residual, codes = x.copy(), []
    padded = -x.shape[1] % 32
    for words in codebooks:
        half_squares = (0.5 * (words.astype(np.float64) ** 2).sum(-1)).astype(np.float32)
        left = np.pad(residual, ((0, 0), (0, padded))).reshape(len(x), 1, -1, 32)
        right = np.pad(words, ((0, 0), (0, padded))).reshape(1, len(words), -1, 32)
        lanes = np.zeros((len(x), len(words), 32), np.float32)
        for step in range(left.shape[2]):
            lanes = fma(left[:, :, step], right[:, :, step], lanes)
        for half in (16, 8, 4, 2, 1):
            lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        best = (half_squares - lanes[..., 0]).argmin(-1)
        codes.append(best)
        residual = residual - words[best]
    return np.stack(codes, -1)


@pytest.mark.parametrize("width", [8, 64, 111, 256])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_filter_changes_no_code(simt: ModuleType, width: int, spread: float) -> None:
    """Bit for bit the codes of a float32 search, also where codewords are closer than float16 can tell."""
    x, codebooks = rq.random_inputs(64, width=width, size=50, levels=2)
    codebooks[:, 1:] = codebooks[:, :1] + spread * codebooks[:, 1:]
    x[1::3] *= 1e-3  # rows of other sizes in the same tile
    x[2::3] *= 1e-7
    codes = simt.residual_quantize(x.numpy(), codebooks.numpy())[1]
    np.testing.assert_array_equal(codes, exact_search(x.numpy(), codebooks.numpy()))


@pytest.mark.parametrize("row_exponent", [-60, -30, 0, 30, 60])
@pytest.mark.parametrize("word_exponent", [-60, -30, 0, 30])
def test_filter_at_every_scale(simt: ModuleType, row_exponent: int, word_exponent: int) -> None:
    x, codebooks = rq.random_inputs(40, width=33, size=35, levels=1)
    x, codebooks = x * 2.0**row_exponent, codebooks * 2.0**word_exponent
    codes = simt.residual_quantize(x.numpy(), codebooks.numpy())[1]
    rq.assert_codes(torch.from_numpy(codes), x, codebooks)


def test_padding_of_codewords_is_never_chosen(simt: ModuleType) -> None:
    """Padding is zeros: the nearest of all, were it not for its score."""
    x, codebooks = 1e-3 * torch.randn(40, 16), 100 + torch.randn(2, 3, 16)
    codes = simt.residual_quantize(x.numpy(), codebooks.numpy())[1]
    rq.assert_codes(torch.from_numpy(codes), x, codebooks)
