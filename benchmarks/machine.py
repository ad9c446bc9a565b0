"""What a measurement was made on, and how much memory it took."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "faiss-cpu", "vector-quantize-pytorch")


def describe(device: torch.device) -> str:
    """The device in words, without names of hosts."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, CUDA {torch.version.cuda}"
    simd = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    return f"cpu {platform.machine()} {simd}, {torch.get_num_threads()} threads"


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return "; ".join(found)


@functools.cache
def commit() -> str:
    """The commit of this tree when first asked, with a + where files other than results differed from it."""
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
        status = ["git", "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"]
        changed = subprocess.check_output(status, cwd=ROOT, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises during a call above what was used before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would be used again unseen
    clear.write_text("5")  # the peak starts from here
    before = _kilobytes(status, "VmRSS")
    result = call()
    peak = _kilobytes(status, "VmHWM")
    del result
    return max(0, peak - before) * 1024


def _kilobytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
