"""Fixtures of the tests of residual quantization."""

from collections.abc import Iterator

import pytest

from bbqrec_kernels.testing import simd_target, simd_targets

# The CPU kernels once for each SIMD target of this machine.
CPU = [f"cpu-{name}" for name in simd_targets()] or ["cpu"]


@pytest.fixture(params=["reference", *CPU])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation that runs on this machine."""
    yield from running(request.param)


@pytest.fixture(params=CPU)
def cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels alone."""
    yield from running(request.param)


def running(name: str) -> Iterator[str]:
    impl, _, target = name.partition("-")
    if not target:
        yield impl
        return
    with simd_target(target):
        yield impl
