"""The Transformer that every sequence model here uses, on packed sequences: no padding is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbqrec.data.batches import PackedBatch
from bbqrec_kernels import SimilarityAttention


class Dropout(nn.Dropout):
    """`nn.Dropout`, whose masks would take a CPU a tenth to a fourth of a training step: there, 16 bits of a random
    word decide on an element, not a draw of its own. The share dropped is `p` to within 1/65536.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or not self.training or not self.p:
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        numbers = words.view(torch.int16)[: input.numel()].view(input.shape)
        kept = min(max(round((1 - self.p) * 2**16), 1), 2**16 - 1)  # of all 2**16 numbers, the lowest
        return input * (numbers < kept - 2**15).to(input.dtype).mul_(2**16 / kept)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, dim: int, heads: int, dropout: float, *, is_causal: bool = True):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SimilarityAttention(dim, heads, is_causal=is_causal)
        self.feed_forward = feed_forward(dim, dropout)
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Tensor, batch: PackedBatch, terms: Sequence = ()) -> Tensor:
        attended = self.attention(
            self.attention_norm(hidden), terms=terms, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen
        )
        hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.feed_forward(hidden))


class CausalTransformer(nn.Module):
    """Item vectors of packed histories `(T, dim)` to hidden states `(T, dim)`.

    Args:
        dim, layers, heads, dropout: the usual.
        max_length: longest sequence; positions count from the start of a sequence.
    """

    def __init__(self, dim: int, layers: int, heads: int, dropout: float, max_length: int):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(max_length, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, vectors: Tensor, batch: PackedBatch, terms: Sequence[Sequence] | None = None) -> Tensor:
        """`terms`: for each block the terms of its attention scores (see `bbqrec_kernels.prefix`)."""
        hidden = self.dropout(vectors + F.embedding(batch.positions, self.positions))
        for depth, block in enumerate(self.blocks):
            hidden = block(hidden, batch, terms[depth] if terms else ())
        return self.norm(hidden)


def feed_forward(dim: int, dropout: float) -> nn.Sequential:
    """With the norm before it."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), Dropout(dropout), nn.Linear(4 * dim, dim)
    )
