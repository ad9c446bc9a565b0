"""Chooses the implementation of an operator: `impl="auto"` takes the fastest that can run, a named one never yields."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from bbqrec_kernels import _library

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton", "cuda")

_HAS_TRITON = importlib.util.find_spec("triton") is not None

_warned: set[tuple[str, str]] = set()


def choose(operator: str, impl: str, *tensors: Tensor) -> str:
    """Returns the name of the implementation that runs.

    Args:
        operator: name of the public function, for messages.
        impl: what the caller asked for, one of `IMPLEMENTATIONS`.
        tensors: the first decides by its device and dtype; the other differentiable ones are like it; of all that are
            given none may be inside a torch.func transform for a kernel to run.

    Raises:
        ValueError: `impl` is not a known name, or names an implementation that cannot run on these inputs.
    """
    wish = _wish_of_the_reference_only(tensors)
    blockers = _blockers(tensors[0]) | ({"cpu": wish, "triton": wish, "cuda": wish} if wish else {})
    if impl == "auto":
        chosen = next(name for name, blocker in blockers.items() if blocker is None)
        if chosen == "reference" and not wish:
            _warn_once(operator, _reason(tensors[0], blockers))
        return chosen
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if blockers[impl] is not None:
        raise ValueError(f"impl: {operator} cannot run as {impl!r}: {blockers[impl]}; choose another or 'auto'")
    return impl


def _blockers(tensor: Tensor) -> dict[str, str | None]:
    """For each implementation, the one that "auto" prefers first, None where it can run, otherwise the reason why not.

    What is after the reference runs by name only: Triton's interpreter is for tests.
    """
    device = tensor.device.type
    cpu = _library.CPU.blocker if device in ("cpu", "meta") else f"the tensors are on {device}"
    cuda, triton = _cuda_blocker(tensor.device), _triton_blocker(device)
    if device == "cuda":
        return {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": None}
    return {"cpu": cpu, "reference": None, "triton": triton, "cuda": cuda}


def _reason(tensor: Tensor, blockers: dict[str, str | None]) -> str:
    """Why none of those that should have run instead of the reference can."""
    if tensor.device.type == "cpu":
        return blockers["cpu"]
    return "; ".join(f"{name}: {blockers[name]}" for name in ("cuda", "triton"))


def _cuda_blocker(device: torch.device) -> str | None:
    if _library.CUDA.blocker:
        return _library.CUDA.blocker
    return _architecture_blocker(device.index) if device.type == "cuda" else f"the tensors are on {device.type}"


def _architecture_blocker(index: int | None) -> str | None:
    return _reason_of_architecture(index)


# What `torch.compiler.assume_constant_result` does, which would import all of torch._dynamo here.
_architecture_blocker._dynamo_marked_constant = True


@functools.cache
def _reason_of_architecture(index: int | None) -> str | None:
    if not torch.cuda.is_available():  # traced here, to run elsewhere
        return None
    capability = torch.cuda.get_device_capability(index)
    if _library.CUDA.has_code_for(capability):
        return None
    major, minor = capability
    built = _library.CUDA.build["architectures"]
    return f"the CUDA library was built for architectures {built}, and this GPU has compute capability {major}.{minor}"


def _triton_blocker(device: str) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if torch.version.hip:
        return "the Triton kernels are for NVIDIA GPUs"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the tensors are on {device}, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    return None if torch.compiler.is_compiling() else _triton_import_error()


@functools.cache
def _triton_import_error() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # whatever a broken installation raises
        return f"triton does not import: {error}"
    return None


def _wish_of_the_reference_only(tensors: tuple[Tensor, ...]) -> str | None:
    """What the call wants that no kernel can do, but plain torch can."""
    if tensors[0].dtype == torch.float64:
        return "float64 runs in the reference only"
    # Dynamo knows the first of these alone. It leaves torch.func.grad, and says that it cannot trace that.
    is_wrapped = is_batchedtensor if torch.compiler.is_compiling() else is_functorch_wrapped_tensor
    if any(is_wrapped(t) for t in tensors):
        return "torch.func transforms (vmap, grad, jvp) run in the reference only"
    if any(t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return "forward-mode derivatives run in the reference only"
    return None


def _warn_once(operator: str, reason: str) -> None:
    """Says once per operator and reason that the slow reference runs because no kernel could."""
    if torch.compiler.is_compiling():
        return
    if (operator, reason) not in _warned:
        _warned.add((operator, reason))
        warnings.warn(f"{operator} runs as the slow reference: {reason}", RuntimeWarning, stacklevel=4)
