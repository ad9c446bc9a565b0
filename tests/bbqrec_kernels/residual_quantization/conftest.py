"""Fixtures of the tests of residual quantization."""

import pytest


@pytest.fixture(params=["reference", "cpu"])
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation that runs on this machine."""
    return request.param
