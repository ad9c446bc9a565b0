"""Tiles of Triton kernels: pinned ones, or, with BBQ_AUTOTUNE=1, the fastest of their neighbours as measured here.

Pinned tiles come from counting instructions and spills (`python -m benchmarks.static`); a measurement on the machine at
hand knows better, but costs some compilations for each kind of call, and another tile rounds sums differently: results
then depend on a measurement. So it is off by default, and off under `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable

import torch

Constants = dict[str, object]

SMALLEST, LARGEST = 16, 128  # rows or keys of a tile
_WARPS, _STAGES = (4, 8), (1, 2, 3)

_log = logging.getLogger("bbqrec_kernels")
_fastest: dict[Hashable, Constants] = {}


def neighbours(pinned: Constants) -> list[Constants]:
    """Constants that differ from `pinned` in one thing: rows or keys of a tile, warps, or tiles in flight."""
    found = [
        pinned | {name: size}
        for name in ("BLOCK_ROWS", "BLOCK_KEYS")
        for size in (pinned[name] // 2, pinned[name] * 2)
        if SMALLEST <= size <= LARGEST
    ]
    found += [pinned | {"num_warps": warps} for warps in _WARPS if warps != pinned["num_warps"]]
    return found + [pinned | {"num_stages": n} for n in _STAGES if n != pinned["num_stages"]]


def tuned(kind: Hashable, pinned: Constants, run: Callable[[Constants], object]) -> Constants:
    """Constants to run a kernel with.

    Args:
        kind: what they may depend on: the kernel, and of its call what changes the time of a tile.
        pinned: those to take where nothing is measured, and to measure first.
        run: launches the kernel with other constants; it may be called often, so it must add to nothing.

    Returns:
        `pinned`, or with BBQ_AUTOTUNE=1 the fastest of it and its neighbours on the current GPU.
    """
    if not _is_on():
        return pinned
    key = (_device_name(), kind)
    if key not in _fastest:
        times = [(_milliseconds(lambda c=c: run(c)), c) for c in (pinned, *neighbours(pinned))]
        time, _fastest[key] = min(times, key=lambda timed: timed[0])
        changed = {name: value for name, value in _fastest[key].items() if value != pinned[name]}
        _log.info("%s: %.3f ms pinned, %.3f ms with %s", kind, times[0][0], time, changed or "nothing changed")
    return _fastest[key]


def _is_on() -> bool:
    """Whether it is wished for, and nothing forbids to measure."""
    if os.environ.get("BBQ_AUTOTUNE", "0") != "1" or torch.are_deterministic_algorithms_enabled():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


def _milliseconds(run: Callable[[], object]) -> float:
    """Infinite where a tile needs more registers or shared memory than there are."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(run, warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return float("inf")
