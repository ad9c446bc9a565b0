"""Fixtures of the tests of residual quantization.

In a process that runs Triton's interpreter (TRITON_INTERPRET=1, see tests/interpret) they test the Triton kernels.
"""

import os

import pytest

KERNELS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["cpu"]


@pytest.fixture(params=["reference", *KERNELS])
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation that runs on this machine."""
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Those that are not the formula itself."""
    return request.param
