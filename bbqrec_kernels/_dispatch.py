"""Chooses the implementation of an operator: `impl="auto"` takes the first that can run, a named one never falls back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton", "cuda")

NO_SUCH_KERNEL = "this version has no such kernel for it"

_warned: set[tuple[str, str]] = set()


def choose(operator: str, impl: str, blockers: Mapping[str, str | None]) -> str:
    """Returns the name of the implementation that runs.

    Args:
        operator: name of the public function, for messages.
        impl: what the caller asked for, one of `IMPLEMENTATIONS`.
        blockers: for each implementation, in the order in which `auto` prefers them, `None` where it can run on
            these inputs, otherwise the reason why not. `reference` comes last.

    Raises:
        ValueError: `impl` is not a known name, or names an implementation that cannot run on these inputs.
    """
    if impl == "auto":
        for name, blocker in blockers.items():
            if blocker is None:
                if name == "reference":
                    _warn_once(operator, blockers)
                return name
        reasons = "; ".join(f"{name}: {blocker}" for name, blocker in blockers.items())
        raise ValueError(f"{operator}: no implementation can run on these inputs ({reasons})")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    blocker = blockers[impl]
    if blocker is not None:
        raise ValueError(f"impl: {operator} cannot run as {impl!r}: {blocker}; choose another or 'auto'")
    return impl


def _warn_once(operator: str, blockers: Mapping[str, str | None]) -> None:
    """Says once per operator and reason that the slow reference runs because no library could."""
    if torch.compiler.is_compiling():
        return
    reason = "; ".join(b for b in blockers.values() if b is not None and "library" in b)
    if reason and (operator, reason) not in _warned:
        _warned.add((operator, reason))
        warnings.warn(f"{operator} runs as the slow reference: {reason}", RuntimeWarning, stacklevel=4)
