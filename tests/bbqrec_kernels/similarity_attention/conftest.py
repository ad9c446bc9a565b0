"""Fixtures of the tests of similarity attention.

In a process that runs Triton's interpreter (TRITON_INTERPRET=1, see tests/interpret) they test the Triton kernels.
"""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bbqrec_kernels.similarity_attention import ops
from bbqrec_kernels.testing import simd_target, simd_targets

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = "triton" if INTERPRETS else "cpu"
CPU = simd_targets() or ["none"]


@pytest.fixture(autouse=INTERPRETS)
def _products_of_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter adds products up one by one in float32, with larger errors than any GPU."""
    from triton.runtime import interpreter

    def create_dot(_, a, b, total, *options):
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(total.data.dtype)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(params=["triton"] if INTERPRETS else [*CPU, "simt"])
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """What impl=KERNEL runs: the CPU kernels on each SIMD target of this machine in turn, then the CUDA kernels on the
    host, which stand where the CPU kernels are registered while "simt" lasts; or the Triton kernels."""
    if request.param == "simt":
        request.getfixturevalue("attention_on_simt")
    if request.param in ("simt", "triton"):
        yield request.param
    else:
        yield from running(request.param)


@pytest.fixture(params=CPU)
def cpu_target(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels alone."""
    yield from running(request.param)


def running(name: str) -> Iterator[str]:
    """Yields the name, and holds the CPU kernels to it as SIMD target meanwhile."""
    if name == "none":
        yield name
        return
    with simd_target(name):
        yield name


@pytest.fixture(params=["reference", KERNEL])
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation that runs here."""
    return request.param


@pytest.fixture(params=[KERNEL])
def kernel(request: pytest.FixtureRequest) -> str:
    """The one that is not the formula itself."""
    return request.param


@pytest.fixture(params=[KERNEL])
def operators(request: pytest.FixtureRequest) -> ops.Operators:
    """Its operators."""
    return ops.triton if request.param == "triton" else ops.native


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of query, key and value."""
    if INTERPRETS and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrong")
    return request.param
