"""Fixtures of all tests: fixed seeds, threads that fit the workers, real data, CUDA kernels on the host."""

import fcntl
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Shares the cores among the workers of pytest-xdist; a test of threading sets its own number."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    hypothesis.settings.register_profile("repeatable", derandomize=True)  # what passes once passes always
    hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global state
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: BBQREC_SHARED_DATA, or shared/data beside the project."""
    folder = Path(os.environ.get("BBQREC_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; BBQREC_SHARED_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def simt() -> ModuleType:
    """The module that runs the bodies of CUDA kernels on the host, built from csrc/simt where it changed."""
    if not importlib.util.find_spec("pybind11"):
        pytest.skip("no pybind11, which csrc/simt needs: pip install pybind11")
    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    # The scripts beside this Python come first: the machine's own CMake may be too old.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not shutil.which("cmake", path=path):
        pytest.skip("no CMake, which builds csrc/simt: pip install cmake ninja")
    defines = {
        "BBQ_TORCH_DIR": Path(torch.__file__).parent,
        "BBQ_SIMT": "ON",
        "BBQ_WERROR": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    options = [f"-D{name}={value}" for name, value in defines.items()]
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist build it once
        for command in (
            ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options],
            ["cmake", "--build", folder, "--target", "_simt"],
        ):
            done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"csrc/simt does not compile:\n{done.stdout}{done.stderr}", pytrace=False)
    spec = importlib.util.spec_from_file_location("_simt", folder / "_simt.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def attention_on_simt(simt: ModuleType, standing_in_for_cpu: Callable) -> Iterator[None]:
    """While it lasts, impl="cpu" of the attention functions is csrc/simt."""
    with standing_in_for_cpu(_kernels(simt)):
        yield


@pytest.fixture
def standing_in_for_cpu() -> Callable[[dict[str, Callable]], AbstractContextManager[None]]:
    """Within what it returns, these kernels, by name of the operator, stand where the CPU kernels are registered."""
    return _standing_in_for_cpu


@contextmanager
def _standing_in_for_cpu(kernels: dict[str, Callable]) -> Iterator[None]:
    library = torch.library.Library("bbqrec_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is another kernel is the point
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _kernels(simt: ModuleType) -> dict:
    def forward(
        query, key, value, biases, queries, keys, boundaries, kinds, bits, buckets, masks
    ) -> tuple[Tensor, ...]:
        output, logsumexp = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float64)
        dense = _with_dense_rows(output)
        terms = _arrays(queries), _arrays(keys), _arrays(boundaries), kinds, bits, buckets
        simt.similarity_attention(
            *map(_rows, (query, key, value)), _array(biases), *terms, *masks, _rows(dense), logsumexp.numpy()
        )
        return output.copy_(dense), logsumexp

    def backward(
        grad,
        output,
        logsumexp,
        query,
        key,
        value,
        biases,
        queries,
        keys,
        boundaries,
        kinds,
        bits,
        buckets,
        masks,
        needs,
    ):
        wanted = [
            torch.empty_like(t) if need else None for t, need in zip((query, key, value, biases), needs, strict=True)
        ]
        dense = [None if t is None else _with_dense_rows(t) for t in wanted]
        arrays = [None if t is None else _rows(t) for t in dense]
        terms = _arrays(queries), _arrays(keys), _arrays(boundaries), kinds, bits, buckets
        simt.similarity_attention_backward(
            _rows(grad),
            _rows(output),
            _array(logsumexp),
            *map(_rows, (query, key, value)),
            _array(biases),
            *terms,
            *masks,
            *arrays,
        )
        return tuple(
            query.new_empty(0) if out is None else out.copy_(rows) for out, rows in zip(wanted, dense, strict=True)
        )

    def padded_masks(query_lengths, key_lengths, is_causal, scale):
        lengths = (None if t is None else _array(t) for t in (query_lengths, key_lengths))
        return *lengths, None, 0, is_causal, scale

    def packed_masks(cu_seqlens, max_seqlen, is_causal, scale):
        return None, None, _array(cu_seqlens), max_seqlen, is_causal, scale

    def with_masks(masks):
        return (
            lambda *a: forward(*a[:10], masks(*a[10:])),
            lambda *a: backward(*a[:13], masks(*a[13:17]), a[17:]),
        )

    kernels = {}
    for name, masks in (("similarity_attention", padded_masks), ("similarity_attention_varlen", packed_masks)):
        kernels[name], kernels[f"{name}_backward"] = with_masks(masks)
    return kernels


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, or where its last dimension is not dense, a contiguous one of its shape: what the launches do."""
    return (
        tensor
        if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
        else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    )


def _rows(tensor: Tensor) -> np.ndarray:
    """A view of the tensor's memory; bfloat16, which NumPy lacks, as its bits."""
    tensor = tensor.detach()
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _arrays(tensors: list[Tensor]) -> list[np.ndarray]:
    return [_array(tensor) for tensor in tensors]
