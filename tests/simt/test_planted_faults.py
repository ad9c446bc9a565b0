"""Every fault that csrc/simt promises to catch is planted in a small kernel, and caught."""

from types import ModuleType

import numpy as np
import pytest

# Faults that csrc/simt itself sees, and what it says.
SEEN = {
    "missing barrier": r"read (before any write|without a barrier after the write of thread \d+) of shared memory",
    "missing warp barrier": r"read (before any write|without a barrier after the write of thread \d+) of shared memory",
    "divergent barrier": r"divergent barrier in block 0: .*wait for the barrier at selftest.cpp:\d+; .* ended",
    "divergent shuffle": r"divergent barrier in block 1: .*wait for a shuffle at selftest.cpp:\d+|divergent warp: ",
    "missed wait": r"use before the end of an asynchronous copy to it, without a wait",
    "out of bounds": r"read out of bounds: 4 bytes at byte \d+ of rows, which has 1600",
    "never written": r"read before any write of shared memory",
}
# Faults that only show in the result.
WRONG = ("wrong mask", "wrong lanes")
ROWS, WORDS = 50, 7  # both ragged: of 32 and of 8


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, codewords, and the largest products, all of them below zero."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((ROWS, 16)).astype(np.float16)
    words = generator.standard_normal((WORDS, 16)).astype(np.float16)
    rows[:, 0], words[:, 0] = 16, -16
    return rows, words, (rows.astype(np.float64) @ words.astype(np.float64).T).max(-1)


def run(simt: ModuleType, planted: str, order: str) -> np.ndarray:
    rows, words, _ = inputs()
    simt.set_order(order)
    try:
        return simt.largest_product(rows.view(np.uint16), words.view(np.uint16), planted)
    finally:
        simt.set_order("forward")


ORDERS = pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])


@ORDERS
def test_without_a_fault_the_result_is_right(simt: ModuleType, order: str) -> None:
    np.testing.assert_allclose(run(simt, "", order), inputs()[2], rtol=1e-6)


@ORDERS
@pytest.mark.parametrize("planted", SEEN)
def test_fault_is_seen_in_every_order(simt: ModuleType, planted: str, order: str) -> None:
    with pytest.raises(simt.Fault, match=SEEN[planted]):
        run(simt, planted, order)


@pytest.mark.parametrize("planted", WRONG)
def test_fault_shows_in_the_result(simt: ModuleType, planted: str) -> None:
    wrong = ~np.isclose(run(simt, planted, "forward"), inputs()[2], rtol=1e-3)
    assert wrong.sum() > ROWS / 2


def test_a_fault_leaves_the_machine_usable(simt: ModuleType) -> None:
    for planted in SEEN:
        with pytest.raises(simt.Fault):
            run(simt, planted, "forward")
        np.testing.assert_allclose(run(simt, "", "forward"), inputs()[2], rtol=1e-6)
