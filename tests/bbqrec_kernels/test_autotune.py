"""Tiles of Triton kernels are pinned, or the fastest that was measured where BBQ_AUTOTUNE=1 and nothing forbids it."""

from collections.abc import Callable, Iterator

import pytest
import torch

from bbqrec_kernels import _autotune

PINNED = {"BLOCK_ROWS": 64, "BLOCK_KEYS": 16, "num_warps": 4, "num_stages": 1, "EXACT": True}


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBQ_AUTOTUNE", "1")
    monkeypatch.setattr(_autotune, "_fastest", {})
    monkeypatch.setattr(_autotune, "_device_name", lambda: "a GPU")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What was measured; eight warps and wider tiles of keys are faster, and larger tiles of rows do not fit."""
    seen = []

    def milliseconds(run: Callable[[], dict]) -> float:
        constants = run()
        seen.append(constants)
        return float("inf") if constants["BLOCK_ROWS"] > 64 else 10 / (constants["num_warps"] * constants["BLOCK_KEYS"])

    monkeypatch.setattr(_autotune, "_milliseconds", milliseconds)
    return seen


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tuned(kind: str = "forward") -> dict:
    return _autotune.tuned(kind, PINNED, lambda constants: constants)


def test_the_fastest_is_taken_and_measured_once(runs: list[dict]) -> None:
    fastest = tuned()
    assert fastest in (PINNED | {"num_warps": 8}, PINNED | {"BLOCK_KEYS": 32})
    assert runs[0] == PINNED
    assert runs[1:] == _autotune.neighbours(PINNED)
    count = len(runs)
    assert tuned() == fastest
    assert len(runs) == count
    tuned("backward")
    assert len(runs) == 2 * count


def test_neighbours_differ_in_one_thing_and_are_tiles() -> None:
    found = _autotune.neighbours(PINNED)
    assert len(found) == 6  # rows 32 and 128, keys 32, 8 warps, 2 and 3 stages
    for constants in found:
        assert sum(constants[name] != PINNED[name] for name in PINNED) == 1
        assert all(16 <= constants[name] <= 128 for name in ("BLOCK_ROWS", "BLOCK_KEYS"))


@pytest.mark.parametrize("value", ["", "0"])
def test_pinned_tiles_without_the_wish(monkeypatch: pytest.MonkeyPatch, runs: list[dict], value: str) -> None:
    monkeypatch.setenv("BBQ_AUTOTUNE", value)
    assert tuned() is PINNED
    assert not runs


@pytest.mark.usefixtures("deterministic")
def test_pinned_tiles_where_results_must_not_depend_on_a_measurement(runs: list[dict]) -> None:
    assert tuned() is PINNED
    assert not runs


def test_what_does_not_fit_the_gpu_is_infinitely_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    errors = pytest.importorskip("triton.runtime.errors")

    def do_bench(run: Callable[[], object], **_: object) -> float:
        raise errors.OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert _autotune._milliseconds(lambda: None) == float("inf")
