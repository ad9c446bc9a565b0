"""BBQRec's sequence model. Without semantic IDs it is SASRec: item vectors are IDs only, and attention has no terms."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbqrec.config import ModelConfig
from bbqrec.data.batches import PackedBatch
from bbqrec.models.losses import catalogue_cross_entropy
from bbqrec.models.transformer import CausalTransformer
from bbqrec.tokenizer.semantic_ids import SemanticIDs, decode
from bbqrec_kernels import pack, prefix

MAX_CHANNELS = 8  # prefix terms of the attention operator


class SequenceModel(nn.Module):
    """Scores the next item of a history: `h_t · e_j`.

    Item vectors are `e_i = W Σ_m ẑ_i^m + id_i`, with `ẑ` decoded from the item's codes by codebooks that start as the
    tokenizer's and are trained along. Attention scores get `prefix` terms: channel `(m, m')` compares the codes of
    modality `m` of the querying item with those of `m'` of the other. Tables start at zero, which is plain attention.

    Args:
        n_items: size of the catalogue.
        config: see `ModelConfig`.
        semantic_ids: codes and codebooks, or None for SASRec.

    Raises `ValueError` where the options leave items without a vector, or for more modalities than attention compares.
    """

    def __init__(self, n_items: int, config: ModelConfig, semantic_ids: SemanticIDs | None = None):
        super().__init__()
        has_content = semantic_ids is not None and config.content
        if not (has_content or config.item_id):
            raise ValueError("model.item_id: got false without content, so items have no vector; set it to true")
        self.config = config
        self.item_id = nn.Parameter(torch.randn(n_items, config.dim) * config.dim**-0.5) if config.item_id else None
        self.transformer = CausalTransformer(config.dim, config.layers, config.heads, config.dropout, config.max_length)
        self.has_semantic_ids, self.has_content = semantic_ids is not None, has_content
        self.tables = None
        if semantic_ids is not None:
            self.register_buffer("codes", semantic_ids.codes.clone())
            self.codebooks = nn.Parameter(semantic_ids.codebooks.clone())
            self.codebooks.requires_grad_(has_content)
            self.content = nn.Linear(semantic_ids.codebooks.shape[-1], config.dim, bias=False) if has_content else None
            if config.reweighting:
                self.channels = attention_channels(self.codes.shape[1], config.cross_modal)
                buckets = self.codes.shape[2] + 1
                self.tables = nn.Parameter(torch.zeros(config.layers, len(self.channels), config.heads, buckets))

    def item_vectors(self) -> Tensor:
        """`(n_items, dim)`."""
        if not self.has_content:
            return self.item_id
        content = self.content(decode(self.codes, self.codebooks))
        return content if self.item_id is None else content + self.item_id

    def forward(self, batch: PackedBatch, vectors: Tensor | None = None) -> Tensor:
        """Hidden states `(T, dim)` of packed histories; `vectors` are `item_vectors()`, if at hand."""
        vectors = self.item_vectors() if vectors is None else vectors
        return self.transformer(F.embedding(batch.items, vectors), batch, self._terms(batch))

    def loss(self, batch: PackedBatch) -> Tensor:
        """Mean cross-entropy of the next item over the whole catalogue, at every position of the batch."""
        vectors = self.item_vectors()
        return catalogue_cross_entropy(self(batch, vectors), vectors, batch.targets)

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Tensor:
        """Scores `(B, n_items)` of the item that follows each history."""
        vectors = self.item_vectors()
        return self(batch, vectors)[batch.last] @ vectors.T

    def _terms(self, batch: PackedBatch) -> list[list] | None:
        if self.tables is None:
            return None
        left, right = zip(*self.channels, strict=True)
        codes = self.codes[batch.items]  # (T, M, L)
        size = self.codebooks.shape[2]
        query, key = pack(codes[:, left], size), pack(codes[:, right], size)
        return [[prefix(query, table, key_codes=key)] for table in self.tables]


def attention_channels(modalities: int, cross_modal: bool) -> list[tuple[int, int]]:
    """Pairs of modality indices that attention compares: each with itself, and with the others where they fit.

    Raises `ValueError` for more than `MAX_CHANNELS` modalities.
    """
    if modalities > MAX_CHANNELS:
        raise ValueError(
            f"tokenizer.modalities: got {modalities}, expected at most {MAX_CHANNELS} to reweight attention by; "
            "choose fewer, or set model.reweighting=false"
        )
    pairs = list(product(range(modalities), repeat=2))
    if cross_modal and len(pairs) <= MAX_CHANNELS:
        return pairs
    return [(m, m) for m in range(modalities)]
