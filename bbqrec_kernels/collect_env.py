"""What this installation can do: `python -m bbqrec_kernels.collect_env`, or `collect()` for programs.

An implementation is listed as able to run because it ran: each operator is called by name on a tiny input.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy
import torch

import bbqrec_kernels
from bbqrec_kernels import _library
from bbqrec_kernels._dispatch import IMPLEMENTATIONS


def collect() -> dict[str, Any]:
    """Returns what is installed and what runs, ready for `json.dumps`.

    Keys: `versions` (package to version, None where absent), `machine` (system, SIMD, threads, GPUs), `libraries` (for
    `cpu` and `cuda`: `loaded`, `reason` if not, how it was built, the SIMD target that runs) and `operators` (public
    function to implementation to None where it runs, otherwise the reason why not).
    """
    return {
        "versions": _versions(),
        "machine": _machine(),
        "libraries": {"cpu": {**_describe(_library.CPU), **_simd()}, "cuda": _describe(_library.CUDA)},
        "operators": {name: _blockers(name) for name in public_operators()},
    }


def public_operators() -> list[str]:
    """Names of the public functions that take `impl`."""
    functions = inspect.getmembers(bbqrec_kernels, inspect.isfunction)
    return [name for name, function in functions if "impl" in inspect.signature(function).parameters]


def _versions() -> dict[str, str | None]:
    try:
        triton = metadata.version("triton")  # not imported: that takes seconds, and fails on some machines
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "bbqrec": bbqrec_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
    }


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus],
    }


def _describe(library: _library.Library) -> dict[str, Any]:
    build = {key: library.build[key] for key in ("torch", "compiler", "architectures", "flags") if key in library.build}
    return {"loaded": library.loaded, "reason": library.blocker, **build}


def _simd() -> dict[str, str]:
    simd = _library.SIMD
    return {"simd": f"{simd.current} (of {', '.join(simd.names)})"} if simd else {}


def _blockers(operator: str) -> dict[str, str | None]:
    return {impl: _blocker(operator, impl) for impl in IMPLEMENTATIONS if impl != "auto"}


def _blocker(operator: str, impl: str) -> str | None:
    device = "cuda" if impl in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    try:
        with torch.device(device):
            arguments, keywords = _EXAMPLES[operator]()
        getattr(bbqrec_kernels, operator)(*arguments, **keywords, impl=impl)
    except Exception as error:  # whatever stops an implementation is what this report is for
        reason = str(error).removeprefix(f"impl: {operator} cannot run as {impl!r}: ")
        return reason.removesuffix("; choose another or 'auto'") or type(error).__name__
    return None


# For each public function, positional and keyword arguments of a call.
_EXAMPLES: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "residual_quantize": lambda: ((torch.ones(2, 8), torch.ones(1, 2, 8)), {}),
    "residual_decode": lambda: ((torch.zeros(2, 1, dtype=torch.int64), torch.ones(1, 2, 8)), {}),
    "residual_statistics": lambda: (
        (torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(1, 2, 8)),
        {},
    ),
    "similarity_attention": lambda: ((torch.ones(1, 1, 2, 8),) * 3, {}),
    "similarity_attention_varlen": lambda: (
        (torch.ones(2, 1, 8),) * 3,
        {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32), "max_seqlen": 2},
    ),
}


def render(report: dict[str, Any]) -> str:
    lines = [f"{name:<10} {version or 'not installed'}" for name, version in report["versions"].items()]
    for name, value in report["machine"].items():
        lines.append(f"{name:<10} {', '.join(value) or 'none' if isinstance(value, list) else value}")
    for name, library in report["libraries"].items():
        lines.append(f"\n{name.upper()} library: {'loaded' if library['loaded'] else 'not loaded'}")
        lines += [f"  {key:<13} {value}" for key, value in library.items() if key != "loaded" and value]
    for name, blockers in report["operators"].items():
        lines.append(f"\n{name}")
        lines += [f"  {impl:<10} {'runs' if reason is None else reason}" for impl, reason in blockers.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bbqrec_kernels.collect_env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    as_json = parser.parse_args(arguments).json
    report = collect()
    print(json.dumps(report, indent=2) if as_json else render(report))


if __name__ == "__main__":
    main()
