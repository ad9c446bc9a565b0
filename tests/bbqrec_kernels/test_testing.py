"""The apparatus itself: every gate lets the right thing pass and stops the wrong one."""

import subprocess
import sys

import pytest
import torch

from bbqrec_kernels import residual_quantize, testing
from bbqrec_kernels.testing import residual_quantization as rq

ORACLE = torch.linspace(-2, 2, 101, dtype=torch.float64)


def test_budget_is_a_factor_of_the_error_of_plain_torch() -> None:
    low = ORACLE + 0.01
    testing.assert_within_budget("out", (ORACLE + 0.0199).float(), low, ORACLE)
    with pytest.raises(AssertionError, match=r"out: error 0.0201 at \(\d+,\).* allowed 2 times the 0.01 "):
        testing.assert_within_budget("out", (ORACLE + 0.0201).float(), low, ORACLE)
    testing.assert_within_budget("out", (ORACLE + 0.0201).float(), low, ORACLE, factor=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budget_adds_one_rounding_step(dtype: torch.dtype) -> None:
    oracle = torch.tensor([1.0, 0.0], dtype=torch.float64)
    step = torch.finfo(dtype).eps
    testing.assert_within_budget("out", torch.tensor([1 + step, 0]).to(dtype), oracle, oracle)
    with pytest.raises(AssertionError, match="one rounding step"):
        testing.assert_within_budget("out", torch.tensor([1 + 2 * step, 0]).to(dtype), oracle, oracle)
    with pytest.raises(AssertionError, match=r"at \(1,\)"):  # the step is that of the element, not of the largest
        testing.assert_within_budget("out", torch.tensor([1, step]).to(dtype), oracle, oracle)


def test_budget_wants_nan_and_infinity_exactly_where_the_oracle_has_them() -> None:
    nan, inf = torch.nan, torch.inf
    oracle = torch.tensor([1.0, nan, inf, -inf], dtype=torch.float64)
    testing.assert_within_budget("out", oracle.float(), oracle, oracle)
    for wrong in (
        [nan, nan, inf, -inf],
        [inf, nan, inf, -inf],
        [1, 0, inf, -inf],
        [1, nan, -inf, -inf],
        [1, nan, inf, 9],
    ):
        with pytest.raises(AssertionError, match="out: got"):
            testing.assert_within_budget("out", torch.tensor(wrong, dtype=torch.float32), oracle, oracle)


def test_budget_refuses_a_yardstick_that_lets_everything_pass() -> None:
    with pytest.raises(AssertionError, match="low precision formula is not finite"):
        testing.assert_within_budget("out", ORACLE.float(), ORACLE * torch.inf, ORACLE)
    with pytest.raises(TypeError, match=r"oracle: got dtype torch.float32, expected torch.float64"):
        testing.assert_within_budget("out", ORACLE.float(), ORACLE, ORACLE.float())
    with pytest.raises(AssertionError, match=r"out: got shape \(1, 101\), expected \(101,\)"):
        testing.assert_within_budget("out", ORACLE[None], ORACLE, ORACLE)
    with pytest.raises(AssertionError, match="formula gave shape"):
        testing.assert_within_budget("out", ORACLE, ORACLE[:1], ORACLE)
    testing.assert_within_budget("out", ORACLE[:0], ORACLE[:0], ORACLE[:0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_gates_find_a_small_missing_term_that_a_loose_budget_hides(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    oracle, term = torch.randn(2, 4096, dtype=torch.float64)
    testing.assert_gradient("grad", oracle.to(dtype), oracle + 0.5, oracle)
    l2 = testing.budgets.GRADIENT_GATES[dtype].relative_l2
    with pytest.raises(AssertionError, match="grad: relative L2"):
        testing.assert_gradient("grad", (oracle + 2 * l2 * term).to(dtype), oracle + 0.5, oracle)
    direction_only = testing.budgets.GradientGate(relative_l2=1.0, cosine=testing.budgets.GRADIENT_GATES[dtype].cosine)
    testing.assert_gradient("grad", (oracle * 0.9).to(dtype), oracle + 0.5, oracle, gate=direction_only)
    with pytest.raises(AssertionError, match="grad: 1 - cosine"):
        testing.assert_gradient("grad", (oracle + 2 * l2 * term).to(dtype), oracle + 0.5, oracle, gate=direction_only)
    with pytest.raises(AssertionError, match="allowed 3 times"):
        testing.assert_gradient("grad", oracle.to(dtype) + 1, oracle, oracle)


def test_gradient_that_should_be_zero_is_held_to_the_budget() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    testing.assert_gradient("grad", zero.float(), zero, zero)
    with pytest.raises(AssertionError, match="grad: error 1e-06"):
        testing.assert_gradient("grad", zero.float() + 1e-6, zero, zero)


def test_poisoned_outputs_fill_fresh_memory_and_restore_the_settings() -> None:
    settings = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    with testing.poisoned_outputs():
        for fresh in (torch.empty(9), torch.empty_like(torch.ones(9)), torch.ones(1).new_empty(9).half()):
            assert fresh.isnan().all()
        assert (torch.empty(9, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert settings == (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_layouts_keep_the_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (torch.randn(shape) * 10).to(dtype)
    for layout in testing.LAYOUTS:
        copy = testing.with_layout(tensor, layout)
        assert torch.equal(copy, tensor)
        assert copy.dtype == dtype
    if len(shape) > 1 and tensor.numel():
        assert testing.with_layout(tensor, "contiguous").is_contiguous()
        assert testing.with_layout(tensor, "permuted").mT.flatten(-2).is_contiguous() or len(shape) > 2
        assert not testing.with_layout(tensor, "permuted").is_contiguous()
        assert testing.with_layout(tensor, "sliced").stride()[-2:] == (2 * (2 * shape[-1] + 1), 2)


def test_layouts_are_leaves_that_ask_for_gradients_as_the_original_did() -> None:
    for layout in testing.LAYOUTS:
        copy = testing.with_layout(torch.ones(3, 5, requires_grad=True), layout)
        assert copy.is_leaf
        assert copy.requires_grad
        assert not testing.with_layout(torch.ones(3, 5), layout).requires_grad
    with pytest.raises(ValueError, match="layout: got 'diagonal', expected one of 'contiguous', 'permuted', 'sliced'"):
        testing.with_layout(torch.ones(3), "diagonal")


def test_subsets() -> None:
    assert testing.requires_grad_subsets(["a", "b"]) == [("a",), ("b",), ("a", "b")]
    assert len(testing.requires_grad_subsets("abcd")) == 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("width", "levels", "size"), [(1, 1, 1), (1, 4, 2), (8, 4, 256), (60, 3, 17)])
def test_separated_inputs_are_exact_and_far_apart(dtype: torch.dtype, width: int, levels: int, size: int) -> None:
    x, codebooks, codes = rq.separated_inputs((4, 5), width=width, levels=levels, size=size, dtype=dtype)
    assert x.dtype == dtype
    assert codes.shape == (4, 5, levels)
    assert torch.equal(codebooks[torch.arange(levels), codes].sum(-2).double(), x.double())
    rq.assert_codes(codes, x, codebooks)
    if size > 1:
        for level in range(levels):
            wrong = codes.clone()
            wrong[3, 4, level] = (wrong[3, 4, level] + 1) % size
            with pytest.raises(AssertionError, match=rf"codes: row 19, level {level}: got \d+, but \d+ is closer by"):
                rq.assert_codes(wrong, x, codebooks)


def test_separated_inputs_refuse_what_cannot_be_separated() -> None:
    with pytest.raises(ValueError, match="got 257 and 3, expected at most"):
        rq.separated_inputs(4, width=8, size=257)


def test_code_rule_checks_shape_and_range() -> None:
    x, codebooks, codes = rq.separated_inputs(4)
    with pytest.raises(AssertionError, match=r"got shape \(4, 2\), expected \(4, 3\)"):
        rq.assert_codes(codes[:, :2], x, codebooks)
    for wrong in (-1, 256):
        with pytest.raises(AssertionError, match="expected 0 to 255"):
            rq.assert_codes(codes.masked_fill(codes == codes[0, 0], wrong), x, codebooks)


@pytest.mark.parametrize("size", [1, 2, 15, 256])
def test_tied_inputs_hold_every_codeword_twice(size: int) -> None:
    x, codebooks = rq.tied_inputs(50, size=size, width=8)
    half = (size + 1) // 2
    assert torch.equal(codebooks[:, half:], codebooks[:, : size - half])
    assert (residual_quantize(x, codebooks).codes < half).all()


def test_package_does_not_need_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import bbqrec_kernels.testing.residual_quantization"
    subprocess.run([sys.executable, "-c", code], check=True)
