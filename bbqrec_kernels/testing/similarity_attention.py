"""Inputs for similarity-reweighted attention, and the formula in plain torch that sets the error budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bbqrec_kernels.similarity_attention import (
    Term,
    cosine,
    gap,
    matches,
    prefix,
    similarity_attention,
    similarity_attention_varlen,
)
from bbqrec_kernels.similarity_attention.reference import buckets

CODEBOOK_SIZE = 4  # small, so that codes agree often


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of `similarity_attention`, or of the varlen form where `cu_seqlens` is given.

    `tensors` are query, key, value and one table for each kind (`table0`, ...), by name; `compared` holds for each
    kind what it compares on the query and on the key side.
    """

    tensors: dict[str, Tensor]
    kinds: tuple[str, ...] = ()
    compared: tuple[tuple[Tensor, Tensor], ...] = ()
    codebook_size: int | None = CODEBOOK_SIZE
    is_causal: bool = False
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def terms(self) -> list[Term]:
        """A term for each kind, of the tables in `tensors`."""
        terms = []
        for index, (kind, (left, right)) in enumerate(zip(self.kinds, self.compared, strict=True)):
            table = self.tensors[f"table{index}"]
            if kind == "prefix":
                terms.append(prefix(left, table, key_codes=right, codebook_size=self.codebook_size))
            elif kind == "matches":
                terms.append(matches(left, table, key_codes=right, codebook_size=self.codebook_size))
            elif kind == "cosine":
                terms.append(cosine(left.to(table.dtype), table, key_vectors=right.to(table.dtype)))
            else:
                terms.append(gap(left, table, key_positions=right))
        return terms

    def attend(self, impl: str = "auto") -> Tensor:
        """What the operator gives for these inputs."""
        query, key, value = (self.tensors[name] for name in ("query", "key", "value"))
        options = {"is_causal": self.is_causal, "impl": impl}
        if self.cu_seqlens is None:
            lengths = {"query_lengths": self.query_lengths, "key_lengths": self.key_lengths}
            return similarity_attention(query, key, value, self.terms(), **lengths, **options)
        packing = {"cu_seqlens": self.cu_seqlens, "max_seqlen": max(self.cu_seqlens.diff().tolist(), default=0)}
        return similarity_attention_varlen(query, key, value, self.terms(), **packing, **options)

    def attend_in_plain_torch(self) -> Tensor:
        """The same formula, every step in the dtype of query: the error that a kernel may make twice."""
        packed = self.cu_seqlens is not None
        # The packed form is one padded sequence in which sequences do not see each other.
        query, key, value = (
            self.tensors[name].transpose(0, 1)[None] if packed else self.tensors[name]
            for name in ("query", "key", "value")
        )
        rows, columns = query.shape[2], key.shape[2]
        i, j = torch.arange(rows)[:, None], torch.arange(columns)
        visible = torch.ones(1, 1, rows, columns, dtype=torch.bool)
        if self.is_causal:
            visible = visible & (j <= i + columns - rows)
        if self.query_lengths is not None:
            visible = visible & (i < self.query_lengths[:, None, None, None])
        if self.key_lengths is not None:
            visible = visible & (j < self.key_lengths[:, None, None, None])
        if packed:
            sequence = torch.searchsorted(self.cu_seqlens, torch.arange(rows), right=True)
            visible = visible & (sequence[:, None] == sequence)

        scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        for term in self.terms():
            if packed:
                term = term._replace(query=term.query[None], key=term.key[None])
            for channel, table in enumerate(term.bias.to(query.dtype)):
                scores = scores + F.embedding(buckets(term, channel)[0], table.T).movedim(-1, 1)
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        output = torch.where(visible, weights, 0) @ value
        return output[0].transpose(0, 1) if packed else output

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """Query, key and value in `dtype`, tables in float32 (float64 for float64), without gradients."""
        width = torch.promote_types(dtype, torch.float32)
        cast = {n: t.detach().to(width if n.startswith("table") else dtype) for n, t in self.tensors.items()}
        return replace(self, tensors=cast)

    def gradients(self, output: Tensor, grad: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Gradients of `output` with respect to the named tensors; zeros where there is none."""
        found = torch.autograd.grad(
            output, [self.tensors[n] for n in names], grad.to(output.dtype), materialize_grads=True
        )
        return dict(zip(names, found, strict=True))

    def require_grad(self, names: Sequence[str] | None = None) -> AttentionInputs:
        """The same with fresh leaves, of which the named ones (by default all) require gradients."""
        leaves = {n: t.detach().clone().requires_grad_(names is None or n in names) for n, t in self.tensors.items()}
        return replace(self, tensors=leaves)


def random_inputs(
    *,
    batch: int = 2,
    heads: int = 2,
    rows: int = 7,
    columns: int | None = None,
    width: int = 16,
    kinds: Sequence[str] = ("prefix",),
    channels: int = 2,
    levels: int = 3,
    n_buckets: int = 7,
    codebook_size: int | None = CODEBOOK_SIZE,
    is_causal: bool = False,
    seed: int = 0,
) -> AttentionInputs:
    """Normal query, key and value in float32, and terms of every kind asked for, with normal tables.

    Codes agree often and some are -1; similarities keep away from the boundaries of their buckets, so that every
    precision finds the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = rows if columns is None else columns

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"query": normal(batch, heads, rows, width)}
    tensors |= {name: normal(batch, heads, columns, width) for name in ("key", "value")}
    compared = []
    for index, kind in enumerate(kinds):
        sides = [_compared(kind, (batch, tokens, channels), levels, generator) for tokens in (rows, columns)]
        compared.append(tuple(sides))
        size = levels + 1 if kind in ("prefix", "matches") else n_buckets
        tensors[f"table{index}"] = normal(channels, heads, size)
    return AttentionInputs(tensors, tuple(kinds), tuple(compared), codebook_size, is_causal)


def random_packed_inputs(lengths: Sequence[int], **options) -> AttentionInputs:
    """`random_inputs` of the varlen form: sequences of the given lengths, one after the other."""
    padded = random_inputs(batch=1, rows=sum(lengths), **options)
    tensors = {n: t if n.startswith("table") else t[0].transpose(0, 1).contiguous() for n, t in padded.tensors.items()}
    compared = tuple((left[0], left[0]) for left, _ in padded.compared)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return replace(padded, tensors=tensors, compared=compared, cu_seqlens=cu_seqlens)


def _compared(kind: str, shape: tuple[int, ...], levels: int, generator: torch.Generator) -> Tensor:
    if kind in ("prefix", "matches"):
        return torch.randint(-1, CODEBOOK_SIZE, (*shape, levels), generator=generator)
    if kind == "gap":
        return torch.randint(0, 100, shape, generator=generator)
    # Multiples of 40 degrees: similarities are few, and far from the boundaries of 7 buckets.
    angles = torch.randint(0, 9, shape, generator=generator).double() * (2 * torch.pi / 9)
    return torch.stack([angles.cos(), angles.sin()], -1).float()
