"""`residual_quantize`: codes, values and gradients against the formula in float64."""

import itertools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bbqrec_kernels import residual_quantize
from bbqrec_kernels.residual_quantization import reference
from bbqrec_kernels.testing import (
    LAYOUTS,
    assert_gradient,
    assert_within_budget,
    poisoned_outputs,
    requires_grad_subsets,
    with_layout,
)
from bbqrec_kernels.testing import residual_quantization as rq

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 8, 60, 63, 64, 65, 100, 111, 128, 256]
SIZES = [1, 2, 15, 16, 17, 256]
LEVELS = [1, 3, 4]
ROWS = [0, 1, 3, 63, 64, 65, 200]
INF, NAN = torch.inf, torch.nan
OUTPUTS = ("quantized", "commitment_loss", "codebook_loss")

# Every dtype, width, codebook size and number of levels together; rows and layouts take turns.
CASES = [
    (dtype, width, size, levels, ROWS[i % len(ROWS)], LAYOUTS[i % len(LAYOUTS)])
    for i, (dtype, width, size, levels) in enumerate(itertools.product(DTYPES, WIDTHS, SIZES, LEVELS))
]
TIES = list(itertools.product(DTYPES, [(2, 200), (15, 200), (16, 70), (17, 70), (33, 200), (256, 20)]))
BAD_ROWS = list(itertools.product(DTYPES, [NAN, INF, -INF, 1e30, -1e30], [0, 5, 64, 66]))
if os.environ.get("TRITON_INTERPRET") == "1":  # slow; no stride shares a factor with the numbers it strides over
    CASES, TIES, BAD_ROWS = CASES[::17], TIES[::5], BAD_ROWS[::7]


def differentiate(outputs, inputs: dict[str, Tensor], cotangents: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients of the outputs named in `cotangents`; None where an input gets none."""
    outputs = dict(zip(("quantized", "codes", "commitment_loss", "codebook_loss"), outputs, strict=True))
    used = [name for name in cotangents if outputs[name].requires_grad]
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    if not used or not wanted:
        return dict.fromkeys(inputs)
    grads = torch.autograd.grad(
        [outputs[name] for name in used],
        list(wanted.values()),
        [cotangents[name].to(outputs[name].dtype) for name in used],
        allow_unused=True,
    )
    return dict.fromkeys(inputs) | dict(zip(wanted, grads, strict=True))


def check(impl: str, x: Tensor, codebooks: Tensor, outputs=OUTPUTS, bad: Tensor | None = None) -> None:
    """Compares everything with the formula in float64, for the codes that the implementation found."""
    x.requires_grad_(x.requires_grad or not codebooks.requires_grad)
    generator = torch.Generator().manual_seed(1)
    levels = codebooks.shape[0]
    shapes = {"quantized": x.shape, "commitment_loss": (levels,), "codebook_loss": (levels,)}
    cotangents = {name: torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in outputs}
    if "quantized" in cotangents:  # one upstream gradient for all precisions
        cotangents["quantized"] = cotangents["quantized"].to(x.dtype).double()

    with poisoned_outputs():
        result = residual_quantize(x, codebooks, impl=impl)
        grads = differentiate(result, {"x": x, "codebooks": codebooks}, cotangents)
    bad = torch.zeros(x.shape[:-1], dtype=torch.bool) if bad is None else bad
    assert (result.codes[bad] == -1).all()
    rq.assert_codes(result.codes[~bad], x[~bad], codebooks)
    assert result.quantized.dtype == x.dtype
    assert result.codes.dtype == torch.int64
    assert not result.codes.requires_grad
    assert result.commitment_loss.dtype == result.codebook_loss.dtype == torch.float32

    def formula(dtype_x: torch.dtype, dtype_codebooks: torch.dtype):
        inputs = {
            "x": x.detach().to(dtype_x).requires_grad_(x.requires_grad),
            "codebooks": codebooks.detach().to(dtype_codebooks).requires_grad_(codebooks.requires_grad),
        }
        values = reference.quantize_to_codes(*inputs.values(), result.codes)
        return values, differentiate(values, inputs, cotangents)

    low, low_grads = formula(x.dtype, codebooks.dtype)
    oracle, oracle_grads = formula(torch.float64, torch.float64)
    for name, index in (("quantized", 0), ("commitment_loss", 2), ("codebook_loss", 3)):
        assert_within_budget(name, result[index], low[index], oracle[index])
    for name, grad in grads.items():
        if oracle_grads[name] is None:
            assert grad is None or not grad.any(), f"{name} got a gradient that it should not have"
        else:
            assert grad.dtype == {"x": x, "codebooks": codebooks}[name].dtype
            assert_gradient(f"gradient of {name}", grad, low_grads[name], oracle_grads[name])


@pytest.mark.parametrize(("dtype", "width", "size", "levels", "rows", "layout"), CASES)
def test_values_and_gradients(
    every_kernel: str, dtype: torch.dtype, width: int, size: int, levels: int, rows: int, layout: str
) -> None:
    x, codebooks = rq.random_inputs(rows, width=width, size=size, levels=levels, dtype=dtype)
    x, codebooks = with_layout(x.requires_grad_(), layout), with_layout(codebooks.requires_grad_(), layout)
    check(every_kernel, x, codebooks)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process tests the Triton kernels")
@pytest.mark.parametrize("impl", ["simt"], indirect=True)
@pytest.mark.parametrize(("dtype", "width", "size", "levels", "rows", "layout"), CASES[::7])
def test_values_and_gradients_of_the_cuda_kernels(
    impl: str, dtype: torch.dtype, width: int, size: int, levels: int, rows: int, layout: str
) -> None:
    test_values_and_gradients(impl, dtype, width, size, levels, rows, layout)


@pytest.mark.parametrize("rows", ROWS)
def test_reference_in_low_precision(rows: int) -> None:
    x, codebooks = rq.random_inputs(rows, width=63, size=17, dtype=torch.bfloat16)
    check("reference", x.requires_grad_(), codebooks.requires_grad_())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 0, 3), (3, 1, 5)])
def test_leading_dimensions(impl: str, shape: tuple[int, ...], layout: str) -> None:
    x, codebooks = rq.random_inputs(shape, width=9, size=5, levels=2)
    x = with_layout(x.requires_grad_(), layout)
    check(impl, x, with_layout(codebooks.requires_grad_(), layout))
    result = residual_quantize(x, codebooks, impl=impl)
    assert result.quantized.shape == x.shape
    assert result.codes.shape == (*shape, 2)
    if impl != "reference":
        assert result.quantized.stride() == torch.empty_like(x).stride()


def test_formula_one_row_at_a_time(impl: str) -> None:
    """Against loops over rows, levels and codewords, so that the oracle itself is not taken on trust."""
    x, codebooks = rq.random_inputs(7, width=5, size=4, levels=3)
    x.requires_grad_()
    codebooks.requires_grad_()
    result = residual_quantize(x, codebooks, impl=impl)
    up = torch.randn(7, 5)
    commitment_weight, codebook_weight = torch.randn(2, 3)
    loss = (result.quantized * up).sum()
    loss = loss + result.commitment_loss @ commitment_weight + result.codebook_loss @ codebook_weight
    loss.backward()

    losses, grad_codebooks = torch.zeros(3), torch.zeros(3, 4, 5)
    for i in range(7):
        residual, quantized, grad = x[i].detach().clone(), torch.zeros(5), up[i].clone()
        for level in range(3):
            distances = [float(((residual - word) ** 2).sum()) for word in codebooks[level].detach()]
            code = distances.index(min(distances))
            assert result.codes[i, level] == code
            residual -= codebooks[level, code].detach()
            quantized += codebooks[level, code].detach()
            losses[level] += residual.square().sum() / 35
            grad += commitment_weight[level] * 2 * residual / 35
            grad_codebooks[level, code] -= codebook_weight[level] * 2 * residual / 35
        torch.testing.assert_close(result.quantized[i], quantized)
        torch.testing.assert_close(x.grad[i], grad)
    torch.testing.assert_close(result.commitment_loss, losses)
    torch.testing.assert_close(result.codebook_loss, losses)
    torch.testing.assert_close(codebooks.grad, grad_codebooks)


def test_reference_gradients_are_derivatives() -> None:
    x, codebooks = rq.random_inputs(6, width=4, size=3, levels=3, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.residual_quantize(x, codebooks)[2], x)
    for level in range(3):  # a level's loss sees the codewords of the levels before as constants

        def loss(words: Tensor, level: int = level) -> Tensor:
            books = torch.stack([*codebooks[:level], words, *codebooks[level + 1 :]])
            return reference.residual_quantize(x.detach(), books)[3][level]

        assert torch.autograd.gradcheck(loss, codebooks[level].clone().requires_grad_())


def test_quantized_is_straight_through(impl: str) -> None:
    x, codebooks = rq.random_inputs(70, dtype=torch.bfloat16)
    x.requires_grad_()
    codebooks.requires_grad_()
    up = torch.randn_like(x)
    quantized = residual_quantize(x, codebooks, impl=impl).quantized
    grad_x, grad_codebooks = torch.autograd.grad(quantized, (x, codebooks), up, allow_unused=True)
    assert torch.equal(grad_x, up)
    assert grad_codebooks is None or not grad_codebooks.any()


@pytest.mark.parametrize("outputs", requires_grad_subsets(OUTPUTS))
@pytest.mark.parametrize("inputs", requires_grad_subsets(["x", "codebooks"]))
def test_every_subset_of_inputs_and_outputs(impl: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    x, codebooks = rq.random_inputs(65, width=20, size=17, levels=2)
    check(impl, x.requires_grad_("x" in inputs), codebooks.requires_grad_("codebooks" in inputs), outputs)


def test_losses_together_add_up(impl: str) -> None:
    x, codebooks = rq.random_inputs(65, width=20, size=17)

    def grads(commitment: float, codebook: float) -> tuple[Tensor, Tensor]:
        a, b = x.clone().requires_grad_(), codebooks.clone().requires_grad_()
        result = residual_quantize(a, b, impl=impl)
        (commitment * result.commitment_loss.sum() + codebook * result.codebook_loss.sum()).backward()
        return a.grad, b.grad

    together, commitment, codebook = grads(0.25, 1), grads(0.25, 0), grads(0, 1)
    assert torch.equal(together[0], commitment[0])
    assert torch.equal(together[1], codebook[1])
    assert not codebook[0].any()
    assert not commitment[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "levels", "size"), [(1, 1, 1), (1, 4, 2), (8, 4, 256), (111, 3, 17)])
def test_planted_codes_are_found(impl: str, dtype: torch.dtype, width: int, levels: int, size: int) -> None:
    x, codebooks, codes = rq.separated_inputs((3, 67), width=width, levels=levels, size=size, dtype=dtype)
    result = residual_quantize(x, codebooks, impl=impl)
    assert torch.equal(result.codes, codes)
    assert torch.equal(result.quantized, x)
    assert result.commitment_loss[-1] == 0


@pytest.mark.parametrize(("dtype", "size_and_rows"), TIES)
def test_tie_takes_the_lowest_code(impl: str, dtype: torch.dtype, size_and_rows: tuple[int, int]) -> None:
    size, rows = size_and_rows
    x, codebooks = rq.tied_inputs(rows, size=size, width=65, dtype=dtype)
    result = residual_quantize(x, codebooks, impl=impl)
    assert (result.codes < (size + 1) // 2).all()
    codebooks[:, 1:] = codebooks[:, :1]
    assert not residual_quantize(x, codebooks, impl=impl).codes.any()


@pytest.mark.parametrize("size", [15, 31, 62, 63, 127, 254, 255])
def test_short_rows_choose_no_word_behind_the_last(impl: str, size: int) -> None:
    """Codebooks that lack a word or two of a tile: what fills it up is nearer to zero than any codeword."""
    generator = torch.Generator().manual_seed(size)
    x, codebooks = 0.01 * torch.randn(40, 17, generator=generator), torch.randn(2, size, 17, generator=generator)
    rq.assert_codes(residual_quantize(x, codebooks, impl=impl).codes, x, codebooks)


FOR_EACH_IMPL = [HealthCheck.function_scoped_fixture]  # the fixture holds for all examples


@settings(max_examples=100, deadline=None, suppress_health_check=FOR_EACH_IMPL)
@given(data=st.data())
def test_small_integers_are_exact(impl: str, data: st.DataObject) -> None:
    """Integer coordinates tie all the time and round never: every code and value is known exactly."""
    rows, width, levels, size = (data.draw(st.integers(1, n)) for n in (9, 20, 3, 35))
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (rows, width), generator=generator).float()
    codebooks = torch.randint(-2, 3, (levels, size, width), generator=generator).float()
    residual, codes = x.clone(), []
    for words in codebooks:
        codes.append((residual[:, None] - words).square().sum(-1).min(-1).indices)
        residual = residual - words[codes[-1]]
    result = residual_quantize(x, codebooks, impl=impl)
    assert torch.equal(result.codes, torch.stack(codes, -1))
    assert torch.equal(result.quantized, x - residual)


@pytest.mark.parametrize("exponent", [-50, -20, 20, 55])
def test_powers_of_two_change_nothing(impl: str, exponent: int) -> None:
    x, codebooks = rq.random_inputs(130, width=17, size=40)
    scale = 2.0**exponent
    plain = residual_quantize(x, codebooks, impl=impl)
    scaled = residual_quantize(x * scale, codebooks * scale, impl=impl)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.quantized, plain.quantized * scale)


@pytest.mark.parametrize("width", [256, 1024, 4096])
@pytest.mark.parametrize("offset", [0.1, 1.0])
def test_rounding_errors_do_not_pile_up_over_the_width(every_kernel: str, width: int, offset: float) -> None:
    """Products of one sign, and codewords just outside each other's band: the hardest case for a sum in float32."""
    generator = torch.Generator().manual_seed(0)
    spread = offset * 0.03
    codebooks = offset + spread * torch.randn(1, 256, width, generator=generator)
    x = offset + spread * torch.randn(300 if every_kernel == "cpu" else 5, width, generator=generator)
    rq.assert_codes(residual_quantize(x, codebooks, impl=every_kernel).codes, x, codebooks)


def test_expanded_inputs_and_gradients(impl: str) -> None:
    row, words = torch.randn(1, 12, requires_grad=True), torch.randn(1, 5, 12, requires_grad=True)
    result = residual_quantize(row.expand(70, 12), words.expand(3, 5, 12), impl=impl)
    (result.quantized.sum() + result.commitment_loss.sum() + result.codebook_loss.sum()).backward()
    dense_row, dense_words = row.detach().repeat(70, 1), words.detach().repeat(3, 1, 1)
    dense = residual_quantize(dense_row.requires_grad_(), dense_words.requires_grad_(), impl=impl)
    ones = [torch.ones_like(t) for t in (dense.quantized, dense.commitment_loss, dense.codebook_loss)]
    outputs = [dense.quantized, dense.commitment_loss, dense.codebook_loss]
    grads = torch.autograd.grad(outputs, (dense_row, dense_words), ones)
    for plain, expanded in zip(dense, result, strict=True):
        assert torch.equal(plain, expanded)
    torch.testing.assert_close(row.grad, grads[0].sum(0, keepdim=True))
    torch.testing.assert_close(words.grad, grads[1].sum(0, keepdim=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradients_of_any_strides(impl: str, layout: str) -> None:
    x, codebooks = rq.random_inputs((5, 13), width=10, size=6)
    ups = [torch.randn(5, 13, 10), torch.randn(3), torch.randn(3)]

    def grads(ups: list[Tensor]) -> tuple[Tensor, ...]:
        a, b = x.clone().requires_grad_(), codebooks.clone().requires_grad_()
        result = residual_quantize(a, b, impl=impl)
        outputs = (result.quantized, result.commitment_loss, result.codebook_loss)
        return torch.autograd.grad(outputs, (a, b), ups)

    for plain, other in zip(grads(ups), grads([with_layout(up, layout) for up in ups]), strict=True):
        assert torch.equal(plain, other)


def test_zero_rows(impl: str) -> None:
    x, codebooks = torch.empty(4, 0, 8, requires_grad=True), torch.randn(3, 16, 8, requires_grad=True)
    with poisoned_outputs():
        result = residual_quantize(x, codebooks, impl=impl)
        (result.quantized.sum() + result.commitment_loss.sum() + result.codebook_loss.sum()).backward()
    assert result.codes.shape == (4, 0, 3)
    assert result.quantized.shape == (4, 0, 8)
    assert torch.equal(result.commitment_loss, torch.zeros(3))
    assert torch.equal(result.codebook_loss, torch.zeros(3))
    assert x.grad.shape == x.shape
    assert torch.equal(codebooks.grad, torch.zeros(3, 16, 8))


def test_float64_runs_in_the_reference_by_default() -> None:
    x, codebooks = rq.random_inputs(5, dtype=torch.float64)
    result = residual_quantize(x, codebooks)
    assert result.quantized.dtype == result.commitment_loss.dtype == torch.float64
    assert torch.equal(result.codes, residual_quantize(x, codebooks, impl="reference").codes)


@pytest.mark.parametrize(("dtype", "value", "row"), BAD_ROWS)
def test_bad_row_leaves_the_others_alone(impl: str, dtype: torch.dtype, value: float, row: int) -> None:
    x, codebooks = rq.random_inputs(67, width=9, size=18, dtype=dtype)
    clean = residual_quantize(x, codebooks, impl=impl)
    x[row, 4] = value  # in float16, 1e30 is infinite
    bad = torch.arange(67) == row
    check(impl, x.requires_grad_(), codebooks.requires_grad_(), bad=bad)
    result = residual_quantize(x, codebooks, impl=impl)
    assert torch.equal(result.codes[~bad], clean.codes[~bad])
    assert torch.equal(result.quantized[~bad], clean.quantized[~bad])
    assert (result.codes[row] == -1).all()
    assert result.quantized[row].isnan().all()
    assert result.commitment_loss.isnan().all()
    assert result.codebook_loss.isnan().all()

    outputs = (result.quantized, result.commitment_loss, result.codebook_loss)
    grad_x, grad_codebooks = torch.autograd.grad(outputs, (x, codebooks), [torch.ones_like(o) for o in outputs])
    assert grad_x[row].isnan().all()
    assert grad_x[~bad].isfinite().all()
    without = codebooks.detach().clone().requires_grad_()
    residual_quantize(x.detach()[~bad], without, impl=impl).codebook_loss.sum().backward()
    torch.testing.assert_close(grad_codebooks, without.grad * 66 / 67)  # the mean still counts the bad row


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("level", [0, 2])
def test_codeword_that_is_not_finite_makes_all_rows_bad(impl: str, value: float, level: int) -> None:
    x, codebooks = rq.random_inputs((2, 34), width=9, size=18)
    codebooks[level, 17, 8] = value
    check(impl, x.requires_grad_(), codebooks.requires_grad_(), bad=torch.ones(2, 34, dtype=torch.bool))


# Rows and codewords of width 1, by level: float32 squares overflow above 1.84e19, products above 3.4e38.
@pytest.mark.parametrize(
    ("row", "words", "codes"),
    [
        (1e30, [[0.0, 1e30]], [1]),  # |c|² overflows, the distance to it is zero
        (1e30, [[0.0, 1.0]], None),
        (3e19, [[0.0, 1.0, 1.5e19, 1.8e19]], [3]),  # r·c overflows, the distance does not
        (3e19, [[1.8e19, 2.9e19, 2.5e19]], [1]),
        (-3e19, [[3e19, -3e19, -3e19]], [1]),
        (2e19, [[1.0, 2.0]], None),  # the score stays finite, the distance does not
        (1e19, [[-0.8e19], [-0.5e19]], None),  # bad at the second level only
        (2e19, [[0.0], [1.9e19]], None),  # bad at the first level, though the second makes it small again
        (1e19, [[-0.8e19], [0.5e19]], [0, 0]),
        (3e38, [[3e38, 0.0], [0.0, 1.0]], [0, 0]),
    ],
)
def test_overflow(impl: str, row: float, words: list[list[float]], codes: list[int] | None) -> None:
    x = torch.tensor([[0.5], [row], [-0.5]])
    size = max(map(len, words))
    codebooks = torch.tensor([level + level[-1:] * (size - len(level)) for level in words])[..., None]
    result = residual_quantize(x, codebooks, impl=impl)
    assert result.codes[1].tolist() == (codes or [-1] * len(words))
    assert bool(result.quantized[1].isnan().all()) == (codes is None)
    alone = residual_quantize(x[::2], codebooks, impl=impl)
    assert torch.equal(result.codes[::2], alone.codes)


EXTREMES = st.sampled_from([0.0, 1.0, -1.0, 1e-30, -1e10, 1e19, -1.8e19, 2e19, 3e19, 1e30, -3e38, INF, NAN])


@settings(max_examples=300, deadline=None, suppress_health_check=FOR_EACH_IMPL)
@given(row=st.lists(EXTREMES, min_size=2, max_size=2), words=st.lists(EXTREMES, min_size=6, max_size=6))
def test_extreme_values(impl: str, row: list[float], words: list[float]) -> None:
    """Every implementation finds the same rows bad, and the right codes for the others."""
    x, codebooks = torch.tensor([row]), torch.tensor(words).reshape(1, 3, 2)
    distances = (x[:, None].double() - codebooks[0].double()).square().sum(-1)
    bad = bool(~codebooks.isfinite().all() | ~distances.min(-1).values.float().isfinite())
    codes = residual_quantize(x, codebooks, impl=impl).codes
    assert bool(codes == -1) == bad
    if not bad:
        rq.assert_codes(codes, x, codebooks)


def test_many_bad_rows(impl: str) -> None:
    x, codebooks = rq.random_inputs(500, width=16, size=32)
    bad = torch.arange(500) % 7 == 3
    x[bad, 3] = NAN
    check(impl, x.requires_grad_(), codebooks.requires_grad_(), bad=bad)
