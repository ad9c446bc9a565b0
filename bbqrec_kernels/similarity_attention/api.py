"""Similarity-reweighted attention: checks arguments, chooses an implementation. Semantics are in the docstrings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor

from bbqrec_kernels._checks import (
    FLOATS,
    INTEGERS,
    check_bool,
    check_device,
    check_dim,
    check_dtype,
    check_int,
    check_size,
    check_tensor,
    is_on_cpu_to_look_at,
    short,
)
from bbqrec_kernels._dispatch import choose
from bbqrec_kernels.similarity_attention import ops, reference
from bbqrec_kernels.similarity_attention.terms import KINDS, MAX_CHANNELS, Term

MAX_HEAD_SIZE = 256
NO_AUTOCAST = "meta"  # the device without; torch 2.10 cannot compile a call of `torch.amp.is_autocast_available`


def similarity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Term | Sequence[Term] | None = None,
    *,
    is_causal: bool = False,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention with scores `scale·q·k + Σ_terms Σ_m bias[m, h, bucket_m(i, j)]`.

    Adding `b` to a score multiplies its weight by `exp(b)` before the softmax normalizes: tables hold log-weights, and
    a zero table is plain attention. No tensor of Sq·Sk elements exists, forward or backward (but in the reference).

    A row with nothing to attend to gives zeros and zero gradients: `-inf` in a table forbids a bucket. NaN stays NaN.

    Args:
        query: `(B, H, Sq, D)` float32, bfloat16 or float16, any strides, D at most 256: the layout of
            `torch.nn.functional.scaled_dot_product_attention`. All-float64 arguments run in the reference.
        key, value: `(B, H, Sk, D)`, as query.
        terms: what `prefix`, `matches`, `cosine` and `gap` return, one or several, up to 8 channels together; their
            tensors are `(B, Sq, M, ·)` on the query side and `(B, Sk, M, ·)` on the key side.
        is_causal: key `j` is seen by query `i` if `j ≤ i + Sk - Sq`: aligned to the bottom right of the padded shape.
        query_lengths: `(B,)` integers; queries at or past the length give zeros and are not read.
        key_lengths: `(B,)` integers; keys at or past the length are masked and not read.
        scale: of the products; `1/√D` by default.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.

    Returns:
        `(B, H, Sq, D)`, dtype of query. Differentiable in query, key, value and every bias, once.

    Raises:
        TypeError: a dtype is not supported or differs from the others, or an argument is no tensor.
        ValueError: shapes or devices do not fit, a limit is exceeded, or `impl` cannot run.

    Source: the reweighting of BBQRec (Li et al. 2025, arXiv 2504.06636), with the table as log-weights.
    """
    query, key, value = _autocast(query, key, value)
    _check_heads(query, key, value, "(B, H, S, D)", batch_dim=0)
    terms = _as_tuple(terms)
    _check_terms(terms, query, (query.shape[0], query.shape[2]), (key.shape[0], key.shape[2]), query.shape[1])
    for name, lengths in (("query_lengths", query_lengths), ("key_lengths", key_lengths)):
        if lengths is not None:
            check_tensor(name, lengths)
            check_dtype(name, lengths, INTEGERS)
            check_dim(name, lengths, 1, "(B,)")
            check_size(name, lengths, 0, query.shape[0], "batch of query")
            check_device(name, lengths, "query", query)
    check_bool("is_causal", is_causal)
    scale = _scale(scale, query)
    lengths = [each for each in (query_lengths, key_lengths) if each is not None]
    chosen = choose("similarity_attention", impl, query, key, value, *_tensors(terms), *lengths)
    if chosen == "reference":
        with _without_autocast(query.device.type):
            return reference.similarity_attention(
                query,
                key,
                value,
                terms,
                is_causal=is_causal,
                query_lengths=query_lengths,
                key_lengths=key_lengths,
                scale=scale,
            )
    lengths = [None if lengths is None else lengths.long() for lengths in (query_lengths, key_lengths)]
    attend = _operators(chosen).similarity_attention
    return attend(query, key, value, *_flatten(terms, query), *lengths, is_causal, scale)[0]


def similarity_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Term | Sequence[Term] | None = None,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    is_causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`similarity_attention` of each sequence with itself, for sequences packed one after the other: no padding.

    Args:
        query, key, value: `(T, H, D)`; all else as in `similarity_attention`.
        terms: as in `similarity_attention`, with tensors `(T, M, ·)`.
        cu_seqlens: `(B+1,)` int32: where each sequence starts, and T. On CUDA, tokens that it does not cover give
            zeros.
        max_seqlen: length of the longest sequence, or more.
        is_causal: key `j` is seen by query `i` of the same sequence if `j ≤ i`.
        scale, impl: as in `similarity_attention`.

    Returns:
        `(T, H, D)`, dtype of query.

    Raises:
        TypeError: as in `similarity_attention`; `cu_seqlens` is not int32, or `max_seqlen` no int.
        ValueError: as in `similarity_attention`; on CPU also a `cu_seqlens` that does not start at 0, decreases, does
            not end at T, or holds a sequence longer than `max_seqlen`.
    """
    query, key, value = _autocast(query, key, value)
    _check_heads(query, key, value, "(T, H, D)", batch_dim=None)
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key: got {key.shape[0]} tokens, expected {query.shape[0]} like query")
    terms = _as_tuple(terms)
    _check_terms(terms, query, (query.shape[0],), (query.shape[0],), query.shape[1])
    check_tensor("cu_seqlens", cu_seqlens)
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32,))
    check_dim("cu_seqlens", cu_seqlens, 1, "(B+1,)")
    check_device("cu_seqlens", cu_seqlens, "query", query)
    check_int("max_seqlen", max_seqlen)
    if not torch.compiler.is_compiling() and isinstance(max_seqlen, int) and not 0 <= max_seqlen < 2**31:
        raise ValueError(f"max_seqlen: got {max_seqlen}, expected 0 to 2**31 - 1")
    if is_on_cpu_to_look_at(cu_seqlens):
        _check_sequences(cu_seqlens, max_seqlen, query.shape[0])
    check_bool("is_causal", is_causal)
    scale = _scale(scale, query)
    chosen = choose("similarity_attention_varlen", impl, query, key, value, *_tensors(terms), cu_seqlens)
    if chosen == "reference":
        with _without_autocast(query.device.type):
            return reference.similarity_attention_varlen(
                query, key, value, terms, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, is_causal=is_causal, scale=scale
            )
    attend = _operators(chosen).similarity_attention_varlen
    return attend(query, key, value, *_flatten(terms, query), cu_seqlens, max_seqlen, is_causal, scale)[0]


def _tensors(terms: Sequence[Term]) -> list[Tensor]:
    return [field for term in terms for field in term if isinstance(field, Tensor)]


def _operators(chosen: str) -> ops.Operators:
    return ops.triton if chosen == "triton" else ops.native


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, what its other attention functions do to query, key and value; tables stay in float32."""
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        check_tensor(name, tensor)
    device = tensors[0].device.type
    if device == NO_AUTOCAST or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in FLOATS else t for t in tensors)


def _without_autocast(device: str) -> AbstractContextManager:
    return nullcontext() if device == NO_AUTOCAST else torch.autocast(device, enabled=False)


def _check_heads(query: Tensor, key: Tensor, value: Tensor, layout: str, batch_dim: int | None) -> None:
    check_dtype("query", query, (*FLOATS, torch.float64))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name}: got dtype {short(tensor.dtype)}, expected {short(query.dtype)} like query; "
                "mixed dtypes are not supported"
            )
        check_dim(name, tensor, len(layout.split(",")), layout)
        check_device(name, tensor, "query", query)
        if tensor.shape[1] != query.shape[1]:
            raise ValueError(
                f"{name}: got {tensor.shape[1]} heads, expected {query.shape[1]} like query; "
                "grouped heads are not supported: repeat key and value"
            )
        check_size(name, tensor, -1, query.shape[-1], "head size of query")
        if batch_dim is not None:
            check_size(name, tensor, batch_dim, query.shape[batch_dim], "batch of query")
    if not 1 <= query.shape[-1] <= MAX_HEAD_SIZE:
        raise ValueError(f"query: got head size {query.shape[-1]}, expected 1 to {MAX_HEAD_SIZE}")
    if value.shape != key.shape:
        raise ValueError(f"value: got shape {tuple(value.shape)}, expected {tuple(key.shape)} like key")


def _as_tuple(terms: Term | Sequence[Term] | None) -> tuple[Term, ...]:
    if terms is None:
        return ()
    if isinstance(terms, Term):
        return (terms,)
    if not isinstance(terms, Sequence):
        raise TypeError(f"terms: got {type(terms).__name__}, expected what {', '.join(KINDS)} return, or a list of it")
    for term in terms:
        if not isinstance(term, Term):
            raise TypeError(f"terms: got a {type(term).__name__}, expected what {', '.join(KINDS)} return")
    return tuple(terms)


def _check_terms(
    terms: tuple[Term, ...], query: Tensor, query_shape: tuple[int, ...], key_shape: tuple[int, ...], heads: int
) -> None:
    """Checks terms against the attention that they go into: `*_shape` is `(B, S)` or `(T,)`."""
    width = torch.promote_types(query.dtype, torch.float32)
    for term in terms:
        if term.bias.dtype != width:
            raise TypeError(
                f"bias: got dtype {short(term.bias.dtype)}, expected {short(width)} for query of {short(query.dtype)}"
            )
        if term.bias.shape[1] != heads:
            raise ValueError(f"bias: got {term.bias.shape[1]} heads, expected {heads} like query")
        check_device("bias", term.bias, "query", query)
        for side, compared, expected in (("query", term.query, query_shape), ("key", term.key, key_shape)):
            dims = compared.dim() - (1 if term.kind == "gap" else 2)
            if compared.shape[:dims] != expected:
                raise ValueError(
                    f"terms: {term.kind} got {side} tensors of shape {tuple(compared.shape)}, expected "
                    f"({', '.join(map(str, expected))}, M, ·) to go with {side}"
                )
    if (channels := sum(len(term.bias) for term in terms)) > MAX_CHANNELS:
        raise ValueError(f"terms: got {channels} channels together, expected at most {MAX_CHANNELS}")


def _check_sequences(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> None:
    values = cu_seqlens.tolist()
    if not values or values[0] != 0:
        raise ValueError(f"cu_seqlens: got {values[:1]} at the start, expected 0")
    longest = 0
    for i, (start, end) in enumerate(pairwise(values)):
        if end < start:
            raise ValueError(
                f"cu_seqlens: got {end} after {start} at index {i + 1}, expected values that never decrease"
            )
        longest = max(longest, end - start)
    if values[-1] != tokens:
        raise ValueError(f"cu_seqlens: got {values[-1]} at the end, expected {tokens}, the number of tokens of query")
    if longest > max_seqlen:
        raise ValueError(
            f"max_seqlen: got {max_seqlen}, expected at least {longest}, the longest sequence of cu_seqlens"
        )


def _scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return query.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}, expected a float")
    return float(scale)


def _flatten(terms: tuple[Term, ...], query: Tensor) -> tuple:
    """Arguments of the operators that describe the terms (see `ops`). One table goes in without a copy."""
    flat = [term.bias.reshape(-1) for term in terms]
    if not flat:
        biases = query.new_empty(0, dtype=torch.float32)
    else:
        biases = flat[0] if len(flat) == 1 else torch.cat(flat)
    packed = [term.query_words is not None and term.key_words is not None for term in terms]
    none = biases.new_empty(0)
    return (
        biases,
        [term.query_words if words else term.query for term, words in zip(terms, packed, strict=True)],
        [term.key_words if words else term.key for term, words in zip(terms, packed, strict=True)],
        [none if term.boundaries is None else term.boundaries for term in terms],
        [KINDS.index(term.kind) for term in terms],
        [term.bits if words else 0 for term, words in zip(terms, packed, strict=True)],
        [term.bias.shape[2] for term in terms],
    )
