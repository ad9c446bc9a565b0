"""Which implementation is chosen, and when it is said that it is the slow one."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bbqrec_kernels import _dispatch


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_warned", set())


def test_tensors_on_a_gpu_without_a_kernel_run_in_the_reference_and_say_so_once() -> None:
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [_dispatch.choose("op", "auto", tensor) for _ in range(2)] == ["reference"] * 2
    assert [str(w.message) for w in caught] == ["op runs as the slow reference: this version has no such kernel for it"]
    with pytest.raises(ValueError, match="op cannot run as 'cpu': the tensors are on cuda; choose another or 'auto'"):
        _dispatch.choose("op", "cpu", tensor)


@pytest.mark.filterwarnings("error")
def test_what_only_the_reference_can_do_runs_there_without_a_word() -> None:
    assert _dispatch.choose("op", "auto", torch.empty(2, dtype=torch.float64)) == "reference"
    assert _dispatch.choose("op", "auto", torch.empty(2)) == "cpu"
