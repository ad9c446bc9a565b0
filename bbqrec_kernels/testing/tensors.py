"""What a kernel must not depend on: old contents of fresh memory, strides, the SIMD target, who asks for gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bbqrec_kernels import _library

LAYOUTS = ("contiguous", "permuted", "sliced")


def simd_targets() -> list[str]:
    """Returns the SIMD targets of the CPU library that this machine can run, best last; none without the library."""
    return _library.SIMD.names if _library.SIMD else []


@contextmanager
def simd_target(name: str) -> Iterator[None]:
    """CPU kernels of this SIMD target run inside, in all threads.

    Raises:
        ValueError: this machine cannot run it.
    """
    simd = _library.SIMD
    if simd is None:
        raise ValueError(f"SIMD target: got {name!r}, but {_library.CPU.blocker}")
    current = simd.current
    simd.choose(name)
    try:
        yield
    finally:
        simd.choose(current)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer, inside: what a kernel forgets to write becomes visible.

    Covers `torch.empty`, `empty_like`, `new_empty` and `empty_strided`, called from Python or from C++, on every
    device. PyTorch ties this to deterministic algorithms, which are therefore on inside, as warnings only.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """Returns a leaf with the values, dtype and `requires_grad` of `tensor`, laid out in memory as `layout` says.

    Args:
        tensor: any tensor.
        layout: "contiguous"; "permuted": dense, the dimensions in reverse order; "sliced": every second element of
            every second row of a larger buffer, which holds NaN (or the largest integer) in between.

    Raises:
        ValueError: `layout` is none of these.
    """
    source = tensor.detach()
    if layout == "contiguous":
        result = source.clone(memory_format=torch.contiguous_format)
    elif layout == "permuted":
        backwards = tuple(reversed(range(source.dim())))
        result = source.permute(backwards).clone(memory_format=torch.contiguous_format).permute(backwards)
    elif layout == "sliced":
        strided = min(source.dim(), 2)  # the last two dimensions
        sizes = [n if i < source.dim() - strided else 2 * n + 1 for i, n in enumerate(source.shape)]
        gap = torch.nan if source.is_floating_point() else _largest(source.dtype)
        buffer = torch.full(sizes, gap, dtype=source.dtype, device=source.device)
        result = buffer[(..., *[slice(1, None, 2)] * strided)].copy_(source)
    else:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    return result.requires_grad_(tensor.requires_grad)


def requires_grad_subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns every non-empty subset of the names of differentiable arguments, small ones first."""
    return [subset for size in range(1, len(names) + 1) for subset in itertools.combinations(names, size)]


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max
