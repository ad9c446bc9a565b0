"""Fixtures of the tests of similarity attention."""

from collections.abc import Iterator

import pytest

from bbqrec_kernels.testing import simd_target, simd_targets

CPU = simd_targets() or ["none"]


@pytest.fixture(params=[*CPU, "simt"])
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """What impl="cpu" runs: the CPU kernels on each SIMD target of this machine in turn, then the CUDA kernels on the
    host, which stand where the CPU kernels are registered while "simt" lasts."""
    if request.param == "simt":
        request.getfixturevalue("attention_on_simt")
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
