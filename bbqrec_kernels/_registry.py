"""The `torch.library` namespace of all operators. Each operator's `ops.py` defines its schemas here, once.

The compiled libraries register their kernels on these schemas; loading them before or after makes no difference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

NAMESPACE = "bbqrec_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str) -> torch._ops.OpOverload:
    """Defines an operator and returns it. All operators here are functional and safe to reorder and export."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(getattr(torch.ops, NAMESPACE), schema.partition("(")[0]).default


def register_fake(operator: torch._ops.OpOverload, fake: Callable) -> None:
    torch.library.register_fake(operator, fake, lib=LIBRARY)


def register_on_first_call(operator: torch._ops.OpOverload, module: str, function: str) -> None:
    """Registers a Python function as kernel of every device; the first call imports its module."""

    def kernel(*arguments):
        return getattr(importlib.import_module(module), function)(*arguments)

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(operator, kernel, device)


def register_autograd(operator: torch._ops.OpOverload, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=LIBRARY)


def forbid_double_backward(operator: torch._ops.OpOverload, name: str) -> None:
    """Makes differentiating a backward operator raise a sentence instead of giving nothing."""

    def setup_context(ctx, inputs, output) -> None:
        pass

    def backward(ctx, *grads):
        raise ValueError(f"{name}: double backward was asked for, only first derivatives exist; use impl='reference'")

    register_autograd(operator, backward, setup_context)
