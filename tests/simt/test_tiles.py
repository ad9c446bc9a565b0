"""Tile products and roundings of csrc/simt against NumPy and torch."""

from types import ModuleType

import numpy as np
import pytest
import torch

EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "tf32": 2.0**-11}
DEPTH = {"float16": 16, "bfloat16": 16, "tf32": 8}


def rounded(kind: str, values: np.ndarray) -> np.ndarray:
    """By torch, or for tf32 by halves of its last bit."""
    tensor = torch.from_numpy(values)
    if kind != "tf32":
        return tensor.to(getattr(torch, kind)).float().numpy()
    step = torch.exp2(torch.frexp(tensor.double()).exponent - 11.0)
    return (torch.sign(tensor) * torch.floor(tensor.double().abs() / step + 0.5) * step).float().numpy()


@pytest.mark.parametrize("kind", EPSILON)
def test_rounding(simt: ModuleType, kind: str) -> None:
    generator = np.random.default_rng(0)
    values = (generator.standard_normal(20000) * np.exp2(generator.integers(-30, 30, 20000))).astype(np.float32)
    special = np.array([0.0, -0.0, 1.0, 65504, 65519, 65520, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 6.1e-5], np.float32)
    values = np.concatenate([values, special, -special])
    np.testing.assert_array_equal(simt.round_trip(kind, values), rounded(kind, values))
    odd = simt.round_trip(kind, np.array([np.nan, np.inf, -np.inf], np.float32))
    assert np.isnan(odd[0])
    assert odd[1] == -odd[2] == np.inf


@pytest.mark.parametrize("kind", EPSILON)
def test_product_rounds_its_inputs_and_nothing_else(simt: ModuleType, kind: str) -> None:
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(s).astype(np.float32) for s in ((16, DEPTH[kind]), (8, DEPTH[kind]), (16, 8)))
    expected = rounded(kind, a).astype(np.float64) @ rounded(kind, b).astype(np.float64).T + c
    product = simt.tile_product(kind, a, b, c)
    np.testing.assert_allclose(product, expected, rtol=2.0**-22, atol=0)
    assert (np.abs(product) <= np.abs(expected)).all()  # towards zero
    exact = a.astype(np.float64) @ b.astype(np.float64).T + c
    error = np.abs(product - exact)
    limit = 2.01 * EPSILON[kind] * np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    assert (error <= limit).all()
    assert error.max() > limit.max() / 50  # the inputs were rounded


def test_product_keeps_nan_in_its_row(simt: ModuleType) -> None:
    a, b, c = np.ones((16, 16), np.float32), np.ones((8, 16), np.float32), np.zeros((16, 8), np.float32)
    a[5, 3] = np.nan
    product = simt.tile_product("float16", a, b, c)
    assert np.isnan(product[5]).all()
    assert (np.delete(product, 5, 0) == 16).all()
