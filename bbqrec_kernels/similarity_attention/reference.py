"""The formulas in plain torch: the oracle in float64, and what runs where no compiled library could be built.

Scores of all pairs are held in memory: `(B, H, Sq, Sk)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bbqrec_kernels._checks import is_concrete, is_on_cpu_to_look_at
from bbqrec_kernels.similarity_attention.terms import Term


def similarity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Sequence[Term],
    *,
    is_causal: bool,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """See `api.similarity_attention`. Differentiable in query, key, value and every bias."""
    dtype = query.dtype
    width = torch.promote_types(dtype, torch.float32)
    rows, columns = query.shape[2], key.shape[2]
    query_valid = _before(query_lengths, rows, query)  # (B or 1, Sq)
    key_valid = _before(key_lengths, columns, query)
    # What lies past the lengths is never read, not even to be multiplied by zero.
    query = torch.where(query_valid[:, None, :, None], query, 0).to(width)
    key = torch.where(key_valid[:, None, :, None], key, 0).to(width)
    value = torch.where(key_valid[:, None, :, None], value, 0).to(width)

    visible = key_valid[:, None, None, :]
    if is_causal:
        i = torch.arange(rows, device=query.device)[:, None]
        j = torch.arange(columns, device=query.device)
        visible = visible & (j <= i + columns - rows)

    scores = scale * _products(query, key, visible)
    for term in terms:
        for channel, bias in enumerate(term.bias.to(width)):
            bucket, missing = buckets(term, channel)
            looked_up = F.embedding(bucket, bias.T).movedim(-1, 1)  # (B, H, Sq, Sk)
            scores = scores + (looked_up if missing is None else looked_up.masked_fill(missing[:, None], torch.nan))
    scores = scores.masked_fill(~visible, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True) if columns else scores.new_zeros(*scores.shape[:3], 1)
    weights = torch.exp(scores - highest.masked_fill(highest == -torch.inf, 0))
    total = weights.sum(-1, keepdim=True)
    output = _weighted_sums(weights, value, visible) / torch.where(total == 0, 1, total)
    return torch.where(query_valid[:, None, :, None] & (total != 0), output, 0).to(dtype)  # nothing to attend to: zeros


def similarity_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Sequence[Term],
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See `api.similarity_attention_varlen`. Pads to `(B, max_seqlen)` and back: to the longest where that is known."""
    tokens, sequences = len(query), len(cu_seqlens) - 1
    if tokens == 0 or sequences == 0 or max_seqlen == 0:
        return torch.zeros_like(query) + (query[:0] + key[:0] + value[:0]).sum()
    starts = cu_seqlens.long()
    if is_on_cpu_to_look_at(starts):
        max_seqlen = max(1, int(starts.diff().max()))
    token = torch.arange(tokens, device=query.device)
    sequence = torch.searchsorted(starts, token, right=True) - 1
    covered = (sequence >= 0) & (sequence < sequences)
    sequence = sequence.clamp(0, sequences - 1)
    slot = sequence * max_seqlen + token - starts[sequence]
    spare = sequences * max_seqlen  # where tokens that no sequence covers go
    slot = torch.where(covered, slot, spare)

    def pad(tensor: Tensor) -> Tensor:  # (T, ...) → (B, max_seqlen, ...)
        padded = tensor.new_zeros(spare + 1, *tensor.shape[1:]).index_copy(0, slot, tensor)
        return padded[:spare].unflatten(0, (sequences, max_seqlen))

    lengths = starts.diff()
    output = similarity_attention(
        *(pad(tensor).transpose(1, 2) for tensor in (query, key, value)),
        [term._replace(query=pad(term.query), key=pad(term.key)) for term in terms],
        is_causal=is_causal,
        query_lengths=lengths,
        key_lengths=lengths,
        scale=scale,
    )
    packed = output.transpose(1, 2).flatten(0, 1)[slot.clamp_max(spare - 1)]
    return torch.where(covered[:, None, None], packed, 0)


def buckets(term: Term, channel: int) -> tuple[Tensor, Tensor | None]:
    """Bucket of every pair in one channel, `(B, Sq, Sk)` int64, and which pairs have none because they compare NaN."""
    if term.kind == "gap":
        a, b = term.query[:, :, None, channel], term.key[:, None, :, channel]
        distance = torch.where(a >= b, a - b, b - a)
        distance = torch.where(distance < 0, torch.iinfo(torch.int64).max, distance)  # it did not fit in 63 bits
        powers = 2 ** torch.arange(term.bias.shape[2] - 1, device=a.device)
        return torch.searchsorted(powers, distance, right=True), None
    query, key = term.query[:, :, channel], term.key[:, :, channel]  # (B, S, L or C)
    if term.kind == "cosine":
        similarity = query @ key.transpose(-1, -2)
        return torch.searchsorted(term.boundaries, similarity, right=True), similarity.isnan()
    agree = (query[:, :, None] == key[:, None]) & (query[:, :, None] >= 0)  # (B, Sq, Sk, L)
    if term.kind == "prefix":
        agree = agree.long().cumprod(-1)
    return agree.sum(-1), None


def _products(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """`query·key` of visible pairs: NaN and infinities of a key stay out of rows (and gradients) that do not see it."""
    if _is_finite(query, key):
        return query @ key.transpose(-1, -2)
    return (query[..., :, None, :] * torch.where(visible[..., None], key[..., None, :, :], 0)).sum(-1)


def _weighted_sums(weights: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """`weights @ value` over visible pairs, in the same sense."""
    if _is_finite(weights, value):
        return weights @ value
    return (weights[..., None] * torch.where(visible[..., None], value[..., None, :, :], 0)).sum(-2)


def _is_finite(*tensors: Tensor) -> bool:
    """While tracing, all values count as finite: the plain products are taken."""
    return not all(map(is_concrete, tensors)) or all(bool(t.isfinite().all()) for t in tensors)


def _before(lengths: Tensor | None, size: int, like: Tensor) -> Tensor:
    """`(B, size)` whether a token lies before its sequence's length; `(1, size)` all true without lengths."""
    positions = torch.arange(size, device=like.device)
    if lengths is None:
        return torch.ones_like(positions, dtype=torch.bool)[None]
    return positions < lengths[:, None]
