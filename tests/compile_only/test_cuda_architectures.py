"""The CUDA sources compile without spills for every architecture that the package promises, and link; no GPU needed."""

import subprocess

import pytest

from benchmarks import static

pytestmark = pytest.mark.check

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
    if missing := static.missing_tool():
        pytest.skip(missing)


@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
def test_compiles_without_spills(architecture: int) -> None:
    rows = {row.kernel: row for row in static.measure_cuda(architecture)}
    assert {row.shape for row in rows.values()} == {"residual_quantization", "similarity_attention"}
    assert RESIDENT_THREADS.keys() <= rows.keys(), list(rows)
    for name, row in rows.items():
        assert row.stack_bytes == 0, row  # where registers would be spilled to
        # An older GPU's shared memory holds one block of Encode<64>.
        of_attention = name.startswith("attention::Attention")  # at most 8 warps, of up to 255 registers
        threads = 256 if of_attention or (architecture, name) == (80, "Encode<64>") else RESIDENT_THREADS.get(name, 512)
        assert row.registers * threads <= 65536, row


def test_library_links_and_names_what_it_needs() -> None:
    """Against a CPU build of torch too: the libraries that it needs are those of a CUDA build."""
    dynamic = subprocess.check_output(["readelf", "-d", static.cuda_library()], text=True)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
    assert not {name for name in needed if "python" in name or "cudart" in name or "c10" in name}
