"""Operators of `torch.library`: schemas, fake kernels and autograd.

Each exists twice: the compiled libraries register the kernels of `native`; those of `triton`, whose names end in
`_triton`, are in triton_kernels.py, which the first call imports.

Terms arrive flattened (see `api._flatten`): one `biases` of all tables, and for each term a number for its kind, the
bits of a level in packed words (0: not packed), its number of buckets, what is compared on the query and on the key
side, and boundaries (empty but for cosine). `logsumexp` is float64: it is subtracted from scores that may be as large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from bbqrec_kernels._registry import (
    define,
    forbid_batched_backward,
    forbid_double_backward,
    register_autograd,
    register_fake,
    register_on_first_call,
)


class Operators(NamedTuple):
    """The operators of one kind of kernels."""

    similarity_attention: OpOverload
    similarity_attention_backward: OpOverload
    similarity_attention_varlen: OpOverload
    similarity_attention_varlen_backward: OpOverload


_TERMS = (
    "Tensor biases, Tensor[] term_queries, Tensor[] term_keys, Tensor[] boundaries, int[] kinds, int[] bits,"
    " int[] buckets"
)
_NEEDS = "bool need_query, bool need_key, bool need_value, bool need_biases"
_GRADIENTS = "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_biases)"

_LENGTHS = "Tensor? query_lengths, Tensor? key_lengths, bool is_causal, float scale"
_SEQUENCES = "Tensor cu_seqlens, SymInt max_seqlen, bool is_causal, float scale"
_HEADS = "Tensor query, Tensor key, Tensor value"
_SAVED = "Tensor grad, Tensor output, Tensor logsumexp"
_SCHEMAS = Operators(
    f"({_HEADS}, {_TERMS}, {_LENGTHS}) -> (Tensor output, Tensor logsumexp)",
    f"({_SAVED}, {_HEADS}, {_TERMS}, {_LENGTHS}, {_NEEDS}) -> {_GRADIENTS}",
    f"({_HEADS}, {_TERMS}, {_SEQUENCES}) -> (Tensor output, Tensor logsumexp)",
    f"({_SAVED}, {_HEADS}, {_TERMS}, {_SEQUENCES}, {_NEEDS}) -> {_GRADIENTS}",
)


def _forward_fake(query, key, value, *_) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float64)


def _backward_fake(grad, output, logsumexp, query, key, value, biases, *rest) -> tuple[Tensor, ...]:
    tensors, needs = (query, key, value, biases), rest[-4:]
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(tensors, needs, strict=True))


def _setup_context(ctx, arguments, output) -> None:
    tensors, lists, integers, masks = arguments[:4], arguments[4:7], arguments[7:10], arguments[10:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.integers = integers
    ctx.masks = [None if isinstance(m, Tensor) else m for m in masks]
    kept = [m if isinstance(m, Tensor) else None for m in masks]
    ctx.save_for_backward(*output, *tensors, *(t for each in lists for t in each), *kept)


def _backward_of(backward_operator: OpOverload):
    def backward(ctx, grad, _grad_logsumexp):
        needs = ctx.needs_input_grad[:4]
        terms, masks = len(ctx.integers[0]), len(ctx.masks)
        if grad is None or not any(needs):
            return (None,) * 4
        saved = ctx.saved_tensors
        flat, kept = saved[6:-masks], saved[-masks:]
        gradients = backward_operator(
            grad,
            *saved[:6],
            *(flat[i * terms : (i + 1) * terms] for i in range(3)),
            *ctx.integers,
            *(other if tensor is None else tensor for tensor, other in zip(kept, ctx.masks, strict=True)),
            *needs,
        )
        return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))

    return backward


def _define_operators(suffix: str) -> Operators:
    operators = Operators(*(define(n + suffix + schema) for n, schema in zip(Operators._fields, _SCHEMAS, strict=True)))
    padded, padded_backward, packed, packed_backward = operators
    for name, forward, backward in (
        ("similarity_attention", padded, padded_backward),
        ("similarity_attention_varlen", packed, packed_backward),
    ):
        register_fake(forward, _forward_fake)
        register_fake(backward, _backward_fake)
        register_autograd(forward, _backward_of(backward), _setup_context, differentiable=4)
        forbid_double_backward(backward, name, differentiable=7)
        forbid_batched_backward(backward, name)
    return operators


native = _define_operators("")
triton = _define_operators("_triton")
for _name, _operator in zip(Operators._fields, triton, strict=True):
    register_on_first_call(_operator, "bbqrec_kernels.similarity_attention.triton_kernels", _name)
