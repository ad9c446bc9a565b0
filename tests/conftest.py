"""Fixtures of all tests: fixed seeds, threads that fit the workers, real data, CUDA kernels on the host."""

import fcntl
import importlib.util
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import hypothesis
import numpy as np
import pytest
import torch

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
