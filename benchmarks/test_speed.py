"""Entry points for pytest-benchmark: `pytest benchmarks --benchmark-only`. Quick cases, ours alone, no verdict."""

import pytest
import torch

from benchmarks.registry import DIRECTIONS, OURS, operators
from benchmarks.runner import refused

pytest.importorskip("pytest_benchmark")
CASES = [
    pytest.param(operator, case, direction, id=f"{operator.name}-{case.shape}-{direction}")
    for operator in operators()
    for case in operator.quick_cases
    for direction in DIRECTIONS[: 2 if operator.backward else 1]
]


@pytest.mark.parametrize(("operator", "case", "direction"), CASES)
def test_speed(benchmark, operator, case, direction) -> None:
    device = torch.device("cpu")
    assert refused(operator, device) is None
    provider = next(provider for provider in operator.providers if provider.name == OURS)
    benchmark(provider.prepare(operator.make_inputs(case, device), direction == DIRECTIONS[1]))
