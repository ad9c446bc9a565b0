"""Operators of `torch.library`: schemas, fake kernels, autograd.

Each exists twice: the compiled libraries register the kernels of `native`; those of `triton`, whose names end in
`_triton`, are in triton_kernels.py, which the first call imports.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from bbqrec_kernels._registry import (
    define,
    forbid_double_backward,
    register_autograd,
    register_fake,
    register_on_first_call,
)


class Operators(NamedTuple):
    """The operators of one kind of kernels."""

    residual_quantize: OpOverload
    residual_quantize_backward: OpOverload
    residual_decode: OpOverload
    residual_decode_backward: OpOverload
    residual_statistics: OpOverload


_SCHEMAS = Operators(
    "(Tensor x, Tensor codebooks) -> (Tensor quantized, Tensor codes, Tensor commitment_loss, Tensor codebook_loss)",
    "(Tensor x, Tensor codebooks, Tensor codes, Tensor? grad_quantized, Tensor? grad_commitment_loss,"
    " Tensor? grad_codebook_loss, bool need_x, bool need_codebooks) -> (Tensor grad_x, Tensor grad_codebooks)",
    "(Tensor codes, Tensor codebooks) -> Tensor",
    "(Tensor grad, Tensor codes, Tensor codebooks) -> Tensor grad_codebooks",
    "(Tensor x, Tensor codes, Tensor codebooks) -> (Tensor counts, Tensor sums)",
)


def _quantize_fake(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    levels = codebooks.shape[0]
    return (
        torch.empty_like(x),
        x.new_empty(*x.shape[:-1], levels, dtype=torch.int64),
        codebooks.new_empty(levels),
        codebooks.new_empty(levels),
    )


def _quantize_backward_fake(
    x, codebooks, codes, grad_quantized, grad_commitment_loss, grad_codebook_loss, need_x, need_codebooks
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(codebooks) if need_codebooks else codebooks.new_empty(0),
    )


def _decode_fake(codes: Tensor, codebooks: Tensor) -> Tensor:
    return codebooks.new_empty(*codes.shape[:-1], codebooks.shape[-1])


def _decode_backward_fake(grad: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    return torch.empty_like(codebooks)


def _statistics_fake(x: Tensor, codes: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    return codebooks.new_empty(codebooks.shape[:2]), codebooks.new_empty(codebooks.shape)


_FAKES = Operators(_quantize_fake, _quantize_backward_fake, _decode_fake, _decode_backward_fake, _statistics_fake)


def _define_operators(suffix: str) -> Operators:
    operators = Operators(*(define(n + suffix + schema) for n, schema in zip(Operators._fields, _SCHEMAS, strict=True)))
    for operator, fake in zip(operators, _FAKES, strict=True):
        register_fake(operator, fake)

    def quantize_setup_context(ctx, arguments, output) -> None:
        x, codebooks = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, codebooks, output[1])

    def quantize_backward(ctx, grad_quantized, _grad_codes, grad_commitment_loss, grad_codebook_loss):
        x, codebooks, codes = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0] and (grad_quantized is not None or grad_commitment_loss is not None)
        need_codebooks = ctx.needs_input_grad[1] and grad_codebook_loss is not None
        if not (need_x or need_codebooks):
            return None, None
        grad_x, grad_codebooks = operators.residual_quantize_backward(
            x, codebooks, codes, grad_quantized, grad_commitment_loss, grad_codebook_loss, need_x, need_codebooks
        )
        return grad_x if need_x else None, grad_codebooks if need_codebooks else None

    def decode_setup_context(ctx, arguments, output) -> None:
        ctx.save_for_backward(*arguments)

    def decode_backward(ctx, grad):
        codes, codebooks = ctx.saved_tensors
        return None, operators.residual_decode_backward(grad, codes, codebooks) if ctx.needs_input_grad[1] else None

    register_autograd(operators.residual_quantize, quantize_backward, quantize_setup_context, differentiable=2)
    register_autograd(operators.residual_decode, decode_backward, decode_setup_context, differentiable=2)
    forbid_double_backward(operators.residual_quantize_backward, "residual_quantize", differentiable=6)
    forbid_double_backward(operators.residual_decode_backward, "residual_decode", differentiable=3)
    return operators


native = _define_operators("")
triton = _define_operators("_triton")
for _name, _operator in zip(Operators._fields, triton, strict=True):
    register_on_first_call(_operator, "bbqrec_kernels.residual_quantization.triton_kernels", _name)
