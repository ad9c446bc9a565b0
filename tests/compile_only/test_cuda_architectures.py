"""The CUDA sources compile without spills for every architecture that the package promises, and link; no GPU needed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.check

SPEC = importlib.util.spec_from_file_location("cuda_cubins", ROOT / "tools" / "cuda_cubins.py")
cuda_cubins = importlib.util.module_from_spec(SPEC)
sys.modules["cuda_cubins"] = cuda_cubins
SPEC.loader.exec_module(cuda_cubins)

TORCH = Path(torch.__file__).parent
# Threads of a block times blocks that should fit a multiprocessor of 65536 registers, where that is the design.
RESIDENT_THREADS = {
    "Encode<32>": 512,
    "Encode<64>": 512,
    "Encode<128>": 256,
    "Encode<256>": 128,
    # A block of four warps is a long sequence's: two of them, so that one copies while the other computes.
    **{
        f"attention::Attention{k}<bbq::{t}, 64>": 256
        for k in ("Forward", "Queries", "Keys")
        for t in ("Half", "BFloat16")
    },
}


@pytest.fixture(autouse=True)
def _tools() -> None:
    if missing := cuda_cubins.missing_tool():
        pytest.skip(missing)


@pytest.mark.parametrize("architecture", cuda_cubins.ARCHITECTURES)
def test_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    cubins = cuda_cubins.compile_cubins(architecture, tmp_path, TORCH)
    assert {cubin.source.stem for cubin in cubins} == {"residual_quantization", "similarity_attention"}
    kernels = {name: usage for cubin in cubins for name, usage in cubin.kernels.items()}
    assert RESIDENT_THREADS.keys() <= kernels.keys(), list(kernels)
    for name, usage in kernels.items():
        assert usage.spill_store_bytes == usage.spill_load_bytes == usage.stack_bytes == 0, (name, usage)
        # An older GPU's shared memory holds one block of Encode<64>.
        of_attention = name.startswith("attention::Attention")  # at most 8 warps, of up to 255 registers
        threads = (
            256 if of_attention or (architecture, name) == ("80", "Encode<64>") else RESIDENT_THREADS.get(name, 512)
        )
        assert usage.registers * threads <= 65536, (name, usage)


def test_library_links_and_names_what_it_needs(tmp_path: Path) -> None:
    """Against a CPU build of torch too: the libraries that it needs are those of a CUDA build."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    defines = {"BBQ_CUDA": "ON", "BBQ_CUDA_ARCHITECTURES": "90a-real", "BBQ_TORCH_DIR": TORCH}
    options = [f"-D{name}={value}" for name, value in defines.items()]
    for command in (
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options],
        ["cmake", "--build", tmp_path, "--target", "_C_cuda"],
    ):
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    dynamic = subprocess.check_output(["readelf", "-d", tmp_path / "_C_cuda.so"], text=True)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
    assert not {name for name in needed if "python" in name or "cudart" in name or "c10" in name}
