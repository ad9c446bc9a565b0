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


def register_autograd(
    operator: torch._ops.OpOverload, backward: Callable, setup_context: Callable, differentiable: int
) -> None:
    """What `torch.library.register_autograd` does, for an operator whose first arguments alone have gradients.

    That function sorts lists of tensors anew in every call, forward and backward, which takes longer than a kernel
    does on a small batch.

    Args:
        backward: of the context and the outputs' gradients; returns those of the first arguments.
        setup_context: of the context, all arguments and the output.
        differentiable: how many arguments have gradients; they are tensors or None.
    """

    def below_autograd(keyset, arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            *tensors, others, keyset = arguments
            arguments = (*tensors, *others)
            output = below_autograd(keyset, arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None, None

    # What tensors show as their grad_fn: ResidualQuantizeBackward, as torch's own have MmBackward.
    named = type(operator._opname.title().replace("_", ""), (Function,), {})

    def autograd(keyset, *arguments):
        tensors, others = arguments[:differentiable], arguments[differentiable:]
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return named.apply(*tensors, others, keyset)
        return below_autograd(keyset, arguments)

    LIBRARY.impl(operator, autograd, "Autograd", with_keyset=True)


def forbid_batched_backward(operator: torch._ops.OpOverload, name: str) -> None:
    """Makes `torch.autograd.grad` with `is_grads_batched` say what to do: PyTorch cannot loop over lists of tensors."""

    def refuse(*_arguments):
        raise ValueError(f"{name}: gradients were asked for in batches, they exist one by one; use impl='reference'")

    LIBRARY.impl(operator, refuse, "Batched")


def forbid_double_backward(operator: torch._ops.OpOverload, name: str, differentiable: int) -> None:
    """Makes differentiating a backward operator raise a sentence instead of giving nothing."""

    def setup_context(ctx, arguments, output) -> None:
        pass

    def backward(ctx, *grads):
        raise ValueError(f"{name}: double backward was asked for, only first derivatives exist; use impl='reference'")

    register_autograd(operator, backward, setup_context, differentiable)
