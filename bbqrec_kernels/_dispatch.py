"""Chooses the implementation of an operator: `impl="auto"` takes the fastest that can run, a named one never yields."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bbqrec_kernels import _library

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton", "cuda")

_NO_SUCH_KERNEL = "this version has no such kernel for it"

_warned: set[tuple[str, str]] = set()


def choose(operator: str, impl: str, tensor: Tensor) -> str:
    """Returns the name of the implementation that runs.

    Args:
        operator: name of the public function, for messages.
        impl: what the caller asked for, one of `IMPLEMENTATIONS`.
        tensor: decides by its device and dtype; checked to be like the other arguments.

    Raises:
        ValueError: `impl` is not a known name, or names an implementation that cannot run on these inputs.
    """
    blockers = _blockers(tensor)
    if impl == "auto":
        chosen = next(name for name, blocker in blockers.items() if blocker is None)
        if chosen == "reference":
            _warn_once(operator, blockers)
        return chosen
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if blockers[impl] is not None:
        raise ValueError(f"impl: {operator} cannot run as {impl!r}: {blockers[impl]}; choose another or 'auto'")
    return impl


def _blockers(tensor: Tensor) -> dict[str, str | None]:
    """For each implementation, fastest first, None where it can run, otherwise the reason why not."""
    cpu = _library.CPU.blocker
    if tensor.dtype == torch.float64:
        cpu = "float64 runs in the reference only"
    elif tensor.device.type not in ("cpu", "meta"):
        cpu = f"the tensors are on {tensor.device.type}"
    return {"cuda": _NO_SUCH_KERNEL, "triton": _NO_SUCH_KERNEL, "cpu": cpu, "reference": None}


def _warn_once(operator: str, blockers: dict[str, str | None]) -> None:
    """Says once per operator and reason that the slow reference runs because no library could."""
    if torch.compiler.is_compiling():
        return
    reason = "; ".join(b for b in blockers.values() if b is not None and "library" in b)
    if reason and (operator, reason) not in _warned:
        _warned.add((operator, reason))
        warnings.warn(f"{operator} runs as the slow reference: {reason}", RuntimeWarning, stacklevel=4)
