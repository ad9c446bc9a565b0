"""Every test of csrc/simt leaves it as it found it."""

from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(autouse=True)
def _defaults(simt: ModuleType) -> Iterator[None]:
    yield
    simt.set_order("forward")
    simt.set_limits(3, 227 * 1024)
    simt.leave_out("", 0)
