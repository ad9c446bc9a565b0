"""BBQRec's sequence model. Without semantic IDs it is SASRec: item vectors are IDs, and attention has no terms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbqrec.config import ModelConfig
from bbqrec.data.batches import PackedBatch
from bbqrec.models.item_knn import history_profiles
from bbqrec.models.losses import catalogue_cross_entropy, sampled_cross_entropy
from bbqrec.models.shards import ItemShards, own_rows
from bbqrec.models.transformer import CausalTransformer
from bbqrec.processes import rank_and_world
from bbqrec.tokenizer.semantic_ids import SemanticIDs, decode
from bbqrec_kernels import Term, gap, pack, prefix, similarity_attention_varlen
from bbqrec_kernels.similarity_attention.terms import MAX_CHANNELS

TIME_BUCKETS = 48  # powers of two of a time gap: decades, even in milliseconds
TABLES_OF_ITEMS = ("codes", "item_id", "features")  # parameters and buffers with a row for each item


class SequenceModel(nn.Module):
    """Scores the next item of a history: `h_t · e_j`.

    Item vectors are `e_i = W Σ_m ẑ_i^m + V x_i + id_i`, with `ẑ` decoded from the item's codes by codebooks that start
    as the tokenizer's and are trained along, and `x` the item's features, with `config.features`. Attention scores get
    `prefix` terms: channel `(m, m')` compares the codes of modality `m` of the querying item with those of `m'` of the
    other; and `gap` terms: how far apart two items are, in places and in time. Every layer has tables of its own, which
    start at zero: that is plain attention. With `cosine_output`, logits are `output_scale · cos(h_t, e_j)`. With
    `sampled_items` fewer than there are, training compares with a sample of the catalogue.

    With `similarity_output`, scores get `similarity_weight · Σ_i similarity_decay^age(i) x_i · x_j` over the history's
    items i, the latest of age 0. Training knows nothing of it, as it would find that transitions learned by heart need
    no such help: both are 0 until they are chosen on histories that were held out.

    Args:
        n_items: size of the catalogue.
        config: see `ModelConfig`.
        semantic_ids: codes and codebooks, or None for SASRec.
        features: `(n_items, F)` of `config.features`, of about unit norm; None without.

    Raises `ValueError` where the options leave items without a vector, or for more modalities than attention compares.
    """

    def __init__(
        self,
        n_items: int,
        config: ModelConfig,
        semantic_ids: SemanticIDs | None = None,
        features: Tensor | None = None,
    ):
        super().__init__()
        has_content = semantic_ids is not None and config.content
        if not (has_content or config.features or config.item_id):
            raise ValueError("model.item_id: got false without content, so items have no vector; set it to true")
        self.config = config
        self.n_trained, self.n_added = n_items, 0  # items: see `add_items`
        self.shards: ItemShards | None = None  # see `share_items`
        self.samples = config.sampled_items is not None and config.sampled_items < n_items
        self.item_id = nn.Parameter(torch.randn(n_items, config.dim) * config.dim**-0.5) if config.item_id else None
        self.register_buffer("features", features.clone() if config.features else None)
        if config.features:
            self.of_features = nn.Linear(features.shape[1], config.dim, bias=False)
            nn.init.normal_(self.of_features.weight, std=config.dim**-0.5)  # vectors as long as those of IDs
        for name in ("similarity_weight", "similarity_decay"):
            self.register_buffer(name, torch.zeros(()) if config.features and config.similarity_output else None)
        self.transformer = CausalTransformer(config.dim, config.layers, config.heads, config.dropout, config.max_length)
        self.has_semantic_ids, self.has_content = semantic_ids is not None, has_content
        self.tables = self.position_tables = self.time_tables = None
        if config.relative_position:
            buckets = (config.max_length - 1).bit_length() + 1
            self.position_tables = nn.Parameter(torch.zeros(config.layers, 1, config.heads, buckets))
        if config.relative_time:
            self.time_tables = nn.Parameter(torch.zeros(config.layers, 1, config.heads, TIME_BUCKETS))
        if semantic_ids is not None:
            self.register_buffer("codes", semantic_ids.codes.clone())
            self.codebook_size = semantic_ids.codebook_size
            self.codebooks = nn.Parameter(semantic_ids.codebooks.clone())
            self.codebooks.requires_grad_(has_content)
            self.content = nn.Linear(semantic_ids.codebooks.shape[-1], config.dim, bias=False) if has_content else None
            if config.reweighting:
                self.channels = attention_channels(self.codes.shape[1], config, semantic_ids.is_shared)
                buckets = self.codes.shape[2] + 1
                self.tables = nn.Parameter(torch.zeros(config.layers, len(self.channels), config.heads, buckets))

    def forget_ids(self, seen: np.ndarray) -> None:
        """Zeroes `id_i` of all items but those `seen` in training and those without codes and features.

        They have learned nothing but to be unlikely: like added items, they are what their content says, if anything.
        """
        if self.item_id is None:
            return
        described = torch.zeros(self.n_trained, dtype=torch.bool, device=self.item_id.device)
        if self.has_content:
            described |= (self.codes[: self.n_trained] >= 0).flatten(1).any(1)
        if self.features is not None:
            described |= self.features[: self.n_trained].any(1)
        described[torch.from_numpy(seen)] = False
        with torch.no_grad():
            self.item_id[described] = 0

    def add_items(self, codes: Tensor | None, features: Tensor | None) -> None:
        """Appends items that training did not know. Their vectors are what their content says: `id_i` is zero.

        Args:
            codes: `(N, M, L)` int64, -1 where an item lacks the modality; None for a model without semantic IDs.
            features: `(N, F)`, as those of the catalogue; None for a model without `config.features`.
        """
        if self.has_semantic_ids:
            self.codes = torch.cat([self.codes, codes.to(self.codes.device)])
        if self.features is not None:
            self.features = torch.cat([self.features, features.to(self.features.device)])
        self.n_added += len(features if codes is None else codes)

    def share_items(self) -> None:
        """Leaves each process its rows of the tables of items, where several train together; all of them call it.

        From then on all call `loss` together, and `score` for the same histories; `item_vectors` and scores are of a
        process's own items. It is for training: `similarity` needs whole tables.

        Raises `ValueError` where a process would have no item.
        """
        if rank_and_world()[1] == 1:
            return
        self.shards = ItemShards(self.n_trained)
        for name in self.tables_of_items:
            table = self.shards.share(getattr(self, name))
            setattr(self, name, nn.Parameter(table) if name == "item_id" else table)

    @property
    def tables_of_items(self) -> list[str]:
        """Those of `TABLES_OF_ITEMS` that it has."""
        return [name for name in TABLES_OF_ITEMS if getattr(self, name, None) is not None]

    def item_vectors(self) -> Tensor:
        """`(n_items, dim)`."""
        trained, added = slice(self.n_trained), slice(self.n_trained, None)
        vectors = self._vectors(trained, None if self.item_id is None else own_rows(self.item_id))
        # Apart: in its last bits, what a matrix product makes of a row may depend on how many rows there are.
        return torch.cat([vectors, self._vectors(added)]) if self.n_added else vectors

    def _vectors(self, rows: slice | Tensor, item_id: Tensor | None = None) -> Tensor:
        """Vectors of some items, by their rows; `item_id` are theirs."""
        parts = [] if item_id is None else [item_id]
        if self.has_content:
            parts.append(decode(own_rows(self.codes)[rows], self.content(self.codebooks)))  # fewer codewords than items
        if self.features is not None:
            parts.append(self.of_features(own_rows(self.features)[rows]))
        return sum(parts[1:], parts[0])

    def _look_up(self, items: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What is made of the rows of these items, wherever they are: see `ItemShards.look_up`."""
        return make(items) if self.shards is None else self.shards.look_up(items, make)

    def forward(self, batch: PackedBatch, vectors: Tensor | None = None) -> Tensor:
        """Hidden states `(T, dim)` of packed histories; `vectors` are `item_vectors()`, if at hand."""
        vectors = self.item_vectors() if vectors is None else vectors
        inputs = self._look_up(batch.items, lambda rows: F.embedding(rows, vectors))
        return self.transformer(inputs, batch, self._terms(batch))

    def loss(self, batch: PackedBatch) -> Tensor:
        """Mean cross-entropy of the next item at every position of the batch, over the whole catalogue or a sample.

        With `loss_is_of_all` at every position of the batches of all processes.
        """
        if self.samples:
            return self._sampled_loss(batch)
        vectors = self.item_vectors()
        return catalogue_cross_entropy(*self.compared(self(batch, vectors), vectors), batch.targets, self.shards)

    def transitions(self, batch: PackedBatch) -> int:
        """How many targets `loss` is a mean over."""
        return len(batch.items)

    @property
    def loss_is_of_all(self) -> bool:
        """Whether `loss` is one for all processes, and equal in them."""
        return self.shards is not None and not self.samples

    def _sampled_loss(self, batch: PackedBatch) -> Tensor:
        """Makes the vectors of the items in question only; all positions have the same sample."""
        sampled = torch.randint(self.n_trained, (self.config.sampled_items,), device=batch.items.device)
        parts = batch.items, batch.targets, sampled
        items, rows = torch.cat(parts).unique(return_inverse=True)
        inputs, targets, others = rows.split([len(part) for part in parts])
        vectors = self._look_up(items, self._vectors_of)
        hidden = self.transformer(F.embedding(inputs, vectors), batch, self._terms(batch))
        return sampled_cross_entropy(*self.compared(hidden, vectors), targets, others, self.n_trained)

    def _vectors_of(self, rows: Tensor) -> Tensor:
        item_id = None
        if self.item_id is not None:  # dense with several processes: not every backend sums up sparse gradients
            item_id = F.embedding(rows, own_rows(self.item_id), sparse=rank_and_world()[1] == 1)
        return self._vectors(rows, item_id)

    @torch.no_grad()
    def score(self, batch: PackedBatch, vectors: Tensor | None = None) -> Tensor:
        """Scores `(B, n_items)` of the item that follows each history; `vectors` as in `forward`."""
        vectors = self.item_vectors() if vectors is None else vectors
        hidden, vectors = self.compared(self(batch, vectors)[batch.last], vectors)
        scores = self.products(hidden, vectors)
        return scores.add_(self.similarity(batch)) if self.adds_similarity else scores

    @property
    def adds_similarity(self) -> bool:
        """Whether scores are not those of the hidden states alone."""
        return self.similarity_weight is not None and bool(self.similarity_weight > 0)

    def similarity(self, batch: PackedBatch) -> Tensor:
        """What `similarity_output` adds to the scores `(B, n_items)`."""
        profiles = history_profiles(batch, self.features, self.similarity_decay)
        return self.products(self.similarity_weight * profiles, self.features)

    @torch.no_grad()
    def attention(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """How the last layer attends from the last item of the batch's only history to each of its T items.

        Returns weights `(H, T)`, which sum to 1, and what they would be without terms, for the same queries and keys.
        """
        projected = []
        qkv = self.transformer.blocks[-1].attention.qkv
        hook = qkv.register_forward_hook(lambda module, inputs, output: projected.append(output))
        try:
            self(batch)
        finally:
            hook.remove()
        query, key, _ = projected[0].unflatten(-1, (3, self.config.heads, -1)).unbind(-3)  # (T, H, D)
        weights = [_last_weights(query, key, batch, terms) for terms in (self._terms(batch)[-1], [])]
        return weights[0], weights[1]

    def products(self, hidden: Tensor, vectors: Tensor) -> Tensor:
        """`hidden (B, d)` with `vectors (n_items, d)`: `(B, n_items)`, added items apart as in `item_vectors`."""
        if not self.n_added:
            return hidden @ vectors.T
        return torch.cat([hidden @ part.T for part in vectors.tensor_split([self.n_trained])], dim=1)

    def compared(self, hidden: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """What the logits are dot products of."""
        if not self.config.cosine_output:
            return hidden, vectors
        return self.config.output_scale * F.normalize(hidden, dim=-1), F.normalize(vectors, dim=-1)

    def _terms(self, batch: PackedBatch) -> list[list[Term]]:
        """The terms of every layer's attention; what all layers share is made once."""
        terms = [[] for _ in self.transformer.blocks]
        if self.tables is not None:
            left, right = zip(*self.channels, strict=True)
            codes = self._look_up(batch.items, own_rows(self.codes).__getitem__)  # (T, M, L)
            query, key = pack(codes[:, left], self.codebook_size), pack(codes[:, right], self.codebook_size)
            for layer, table in zip(terms, self.tables, strict=True):
                layer.append(prefix(query, table, key_codes=key))
        for places, tables in ((batch.positions, self.position_tables), (batch.timestamps, self.time_tables)):
            if tables is None:
                continue
            if places is None:
                raise ValueError("timestamps: got none, expected the time of every interaction (model.relative_time)")
            for layer, table in zip(terms, tables, strict=True):
                layer.append(gap(places[:, None], table))
        return terms


def _last_weights(query: Tensor, key: Tensor, batch: PackedBatch, terms: list[Term]) -> Tensor:
    """Attention weights `(H, T)` of the last token: the operator's outputs for unit vectors as values."""
    tokens, heads, width = query.shape
    weights = []
    for units in torch.eye(tokens, dtype=query.dtype, device=query.device).split(width, dim=1):  # values of that width
        value = F.pad(units, (0, width - units.shape[1]))[:, None].expand(tokens, heads, width)
        output = similarity_attention_varlen(
            query, key, value, terms, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, is_causal=True
        )
        weights.append(output[-1, :, : units.shape[1]])
    return torch.cat(weights, dim=1)


def attention_channels(modalities: int, config: ModelConfig, is_shared: bool) -> list[tuple[int, int]]:
    """Pairs of modality indices that attention compares: each with itself, and with the others where they fit.

    Modalities with codebooks of their own (`is_shared` is false) have no code in common to compare.

    Raises `ValueError` for more modalities than the `gap` terms leave channels to.
    """
    free = MAX_CHANNELS - config.relative_position - config.relative_time
    if modalities > free:
        raise ValueError(
            f"tokenizer.modalities: got {modalities}, expected at most {free} to reweight attention by; "
            "choose fewer, or set model.reweighting=false"
        )
    pairs = list(product(range(modalities), repeat=2))
    if config.cross_modal and is_shared and len(pairs) <= free:
        return pairs
    return [(m, m) for m in range(modalities)]
