"""Error budgets: a kernel may be a small factor worse than the same formula in plain torch, both against float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GradientGate(NamedTuple):
    """What a gradient must keep to as a whole, whatever the budget of its worst element allows."""

    relative_l2: float
    """The most that `‖actual - oracle‖ / ‖oracle‖` may be."""
    cosine: float
    """The least that the cosine of the angle between actual and oracle may be."""


GRADIENT_GATES = {
    torch.float32: GradientGate(1e-5, 1 - 1e-10),
    torch.bfloat16: GradientGate(2e-2, 1 - 1e-4),
    torch.float16: GradientGate(3e-3, 1 - 3e-6),
    torch.float64: GradientGate(1e-12, 1 - 1e-14),
}


def assert_within_budget(name: str, actual: Tensor, low_precision: Tensor, oracle: Tensor, factor: float = 2.0) -> None:
    """Checks `|actual - oracle| <= factor * max|low_precision - oracle| + one rounding step`, element by element.

    One rounding step is the spacing of the dtype of `actual` at the value of `oracle`. NaN must be where the oracle
    has NaN and nowhere else, and infinities must be equal.

    Args:
        name: of the output, for the message.
        actual: what the kernel gave, any floating dtype.
        low_precision: the same formula, computed by plain torch in the dtypes that the kernel was given.
        oracle: the same formula in float64, from the same inputs.
        factor: 2 for outputs, 3 for gradients (see `assert_gradient`).

    Raises:
        AssertionError: the budget is not kept, shapes differ, or `low_precision` is not finite where `oracle` is
            (an infinite budget would let everything pass).
        TypeError: `oracle` is not float64.
    """
    if oracle.dtype != torch.float64:
        raise TypeError(f"oracle: got dtype {oracle.dtype}, expected torch.float64")
    for which, tensor in (("got", actual), ("the low precision formula gave", low_precision)):
        if tensor.shape != oracle.shape:
            raise AssertionError(f"{name}: {which} shape {tuple(tensor.shape)}, expected {tuple(oracle.shape)}")
    value, low, oracle = (t.detach().double().flatten() for t in (actual, low_precision, oracle))
    finite = oracle.isfinite()
    _assert_none(name, ~finite & ~((value == oracle) | (value.isnan() & oracle.isnan())), value, oracle, actual.shape)
    _assert_none(name, finite & ~value.isfinite(), value, oracle, actual.shape)
    if not low[finite].isfinite().all():
        raise AssertionError(f"{name}: the low precision formula is not finite where the oracle is; use other inputs")
    if not finite.any():
        return

    error = torch.where(finite, value - oracle, 0).abs()
    low_error = (low - oracle)[finite].abs().max().item()
    limits = torch.finfo(actual.dtype)
    step = torch.where(finite, oracle, 0).abs() * limits.eps + limits.smallest_normal * limits.eps
    excess = error - factor * low_error - step
    worst = excess.argmax()
    if excess[worst] > 0:
        raise AssertionError(
            f"{name}: error {error[worst]:.3g} at {_index(worst, actual.shape)} (got {value[worst]:.6g}, expected "
            f"{oracle[worst]:.6g}), allowed {factor:g} times the {low_error:.3g} of the same formula in plain torch "
            f"plus one rounding step of {step[worst]:.3g}"
        )


def assert_gradient(
    name: str,
    actual: Tensor,
    low_precision: Tensor,
    oracle: Tensor,
    factor: float = 3.0,
    gate: GradientGate | None = None,
) -> None:
    """Checks a gradient: `assert_within_budget`, then the whole of it, so that a small missing term cannot hide.

    Args:
        name, actual, low_precision, oracle, factor: as in `assert_within_budget`.
        gate: limits of the relative L2 error and the cosine over all finite elements of the oracle; by default
            `GRADIENT_GATES` of the dtype of `actual`. They say nothing of a gradient that cancels to zero: where the
            oracle is smaller than the error of `low_precision`.

    Raises:
        AssertionError, TypeError: as in `assert_within_budget`.
    """
    assert_within_budget(name, actual, low_precision, oracle, factor)
    gate = gate or GRADIENT_GATES[actual.dtype]
    finite = oracle.isfinite()
    expected = oracle[finite]
    value, low = (tensor.detach().double()[finite] for tensor in (actual, low_precision))
    if expected.norm() <= (low - expected).norm():
        return
    relative = ((value - expected).norm() / expected.norm()).item()
    if relative > gate.relative_l2:
        raise AssertionError(f"{name}: relative L2 error {relative:.3g}, allowed {gate.relative_l2:.3g}")
    cosine = (torch.dot(value, expected) / (value.norm() * expected.norm())).item()
    if not cosine >= gate.cosine:
        raise AssertionError(f"{name}: 1 - cosine is {1 - cosine:.3g}, allowed {1 - gate.cosine:.3g}")


def _assert_none(name: str, wrong: Tensor, value: Tensor, oracle: Tensor, shape: torch.Size) -> None:
    if wrong.any():
        first = wrong.nonzero()[0, 0]
        raise AssertionError(
            f"{name}: got {value[first]:.6g} at {_index(first, shape)}, expected {oracle[first]:.6g} "
            f"({int(wrong.sum())} of {len(wrong)} elements)"
        )


def _index(flat: Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, shape))
