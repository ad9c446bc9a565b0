"""Fixtures of the tests of similarity attention."""

from collections.abc import Iterator

import pytest

from bbqrec_kernels.testing import simd_target, simd_targets


@pytest.fixture(params=simd_targets() or ["none"])
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """CPU kernels run on each SIMD target of this machine in turn."""
    if request.param == "none":
        yield request.param
        return
    with simd_target(request.param):
        yield request.param
