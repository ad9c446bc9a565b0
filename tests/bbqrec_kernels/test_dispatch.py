"""Which implementation is chosen, and when it is said that it is the slow one."""

import os
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bbqrec_kernels import _dispatch, _library


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_warned", set())


def test_tensors_on_a_gpu_without_a_kernel_run_in_the_reference_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_library, "CUDA", _library.Library("_C_cuda", None, "not built"))
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", False)
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [_dispatch.choose("op", "auto", tensor) for _ in range(2)] == ["reference"] * 2
    assert [str(w.message) for w in caught] == [
        "op runs as the slow reference: cuda: not built; triton: triton is not installed"
    ]
    with pytest.raises(ValueError, match="op cannot run as 'cpu': the tensors are on cuda; choose another or 'auto'"):
        _dispatch.choose("op", "cpu", tensor)


@pytest.mark.filterwarnings("error")
def test_the_cuda_library_runs_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CUDA", _library.Library("_C_cuda", None, None))
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda")
    assert _dispatch.choose("op", "auto", tensor) == _dispatch.choose("op", "cuda", tensor) == "cuda"
    assert _dispatch.choose("op", "auto", torch.empty(2)) == "cpu"
    with pytest.raises(ValueError, match="cannot run as 'cuda': the tensors are on cpu; choose another or 'auto'"):
        _dispatch.choose("op", "cuda", torch.empty(2))


@pytest.mark.parametrize(
    ("architectures", "runs", "fails"),
    [
        ("80;90a-real;100a-real", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5), (7, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("80-real", [(8, 0), (8, 6)], [(7, 5), (9, 0)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("75-virtual", [(7, 5), (9, 0)], [(7, 0)]),
        ("native", [(5, 0)], []),
    ],
)
def test_the_cuda_library_runs_on_what_it_has_code_for(architectures: str, runs: list, fails: list) -> None:
    library = _library.Library("_C_cuda", None, None, {"architectures": architectures})
    for capability in runs:
        assert library.has_code_for(capability), capability
    for capability in fails:
        assert not library.has_code_for(capability), capability
    assert _library.Library("_C_cuda", None, None).has_code_for((7, 0))  # it does not say


def test_a_gpu_that_the_cuda_library_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _library.Library("_C_cuda", None, None, {"architectures": "80;90a-real"})
    monkeypatch.setattr(_library, "CUDA", library)
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda")
    for capability, chosen in (((7, 5), "triton"), ((8, 6), "cuda")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        _dispatch._reason_of_architecture.cache_clear()
        assert _dispatch.choose("op", "auto", tensor) == chosen
        if chosen == "triton":
            reason = "built for architectures 80;90a-real, and this GPU has compute capability 7.5; choose another"
            with pytest.raises(ValueError, match=reason):
                _dispatch.choose("op", "cuda", tensor)
    _dispatch._reason_of_architecture.cache_clear()


def test_compiled_code_asks_for_the_architecture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(index: int) -> str:
        return f"{index}: {os.listdir('.')}"  # nothing that torch.compile could trace

    monkeypatch.setattr(_dispatch, "_reason_of_architecture", ask)
    traced = torch.compile(lambda x: (x + 1, _dispatch._architecture_blocker(3)), fullgraph=True, backend="eager")
    assert traced(torch.ones(1))[1] == ask(3)


def test_triton_runs_on_no_gpu_of_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CUDA", _library.Library("_C_cuda", None, "not built"))
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda")
    with pytest.warns(RuntimeWarning, match="triton: the Triton kernels are for NVIDIA GPUs"):
        assert _dispatch.choose("op", "auto", tensor) == "reference"


def test_a_missing_cuda_library_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CUDA", _library.Library("_C_cuda", None, "the CUDA library was not built: no nvcc"))
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda")
    with pytest.raises(ValueError, match="cannot run as 'cuda': the CUDA library was not built: no nvcc"):
        _dispatch.choose("op", "cuda", tensor)


@pytest.mark.filterwarnings("error")
def test_what_only_the_reference_can_do_runs_there_without_a_word() -> None:
    assert _dispatch.choose("op", "auto", torch.empty(2, dtype=torch.float64)) == "reference"
    assert _dispatch.choose("op", "auto", torch.empty(2)) == "cpu"


def test_triton_runs_on_a_gpu_and_elsewhere_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", True)
    monkeypatch.setattr(_dispatch, "_triton_import_error", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda")
    assert _dispatch.choose("op", "auto", on_gpu) == "triton"
    with pytest.raises(ValueError, match=r"'triton': the tensors are on cpu, and Triton's interpreter .* is off"):
        _dispatch.choose("residual_quantize", "triton", torch.empty(2))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.choose("residual_quantize", "triton", torch.empty(2)) == "triton"
    assert _dispatch.choose("residual_quantize", "auto", torch.empty(2)) == "cpu"


@pytest.mark.parametrize(
    ("installed", "error", "reason"),
    [
        (False, None, "triton is not installed"),
        (True, "triton does not import: no libcuda", "triton does not import: no libcuda"),
    ],
)
def test_reason_why_triton_cannot_run_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, installed: bool, error: str | None, reason: str
) -> None:
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", installed)
    monkeypatch.setattr(_dispatch, "_triton_import_error", lambda: error)
    with FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda")
    with pytest.warns(
        RuntimeWarning, match=f"^residual_decode runs as the slow reference: cuda: .*; triton: {reason}$"
    ):
        assert _dispatch.choose("residual_decode", "auto", on_gpu) == "reference"
