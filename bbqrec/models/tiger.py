"""TIGER: generates the semantic ID of the next item, token by token.

Source: Rajput et al. 2023, Recommender systems with generative retrieval, arXiv 2305.05065; without its user tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbqrec.config import ModelConfig
from bbqrec.data.batches import PackedBatch
from bbqrec.models.id_tree import IDTree
from bbqrec.models.transformer import Block, Dropout, feed_forward
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec_kernels import similarity_attention


class Tiger(nn.Module):
    """A Transformer that reads a history as tokens of semantic IDs and says which tokens come next.

    The encoder is bidirectional and packed; the decoder sees its states and the tokens so far. The log-probability of
    an item is the sum of those of its tokens. `score` finds the likeliest items by beam search in the tree of the IDs
    that exist: `config.beam` items, or all where there are fewer.

    Args:
        config: see `ModelConfig`.
        semantic_ids: of the catalogue.
    """

    has_semantic_ids = True

    def __init__(self, config: ModelConfig, semantic_ids: SemanticIDs):
        super().__init__()
        self.config = config
        self.register_buffer("codes", semantic_ids.codes.clone())
        self.register_buffer("codebooks", semantic_ids.codebooks.clone())  # not read here: what the codes stand for
        with torch.device(self.codes.device):  # the tree is of values, also where the rest is of shapes (`load_model`)
            self.tree = IDTree(self.codes, semantic_ids.codebook_size)
        offsets = torch.tensor([0, *self.tree.sizes[:-1]]).cumsum(0)
        self.register_buffer("offsets", offsets, persistent=False)  # where the tokens of each depth start
        dim, depth = config.dim, self.tree.depth
        self.vocabulary = nn.Parameter(torch.randn(sum(self.tree.sizes), dim) * dim**-0.5)
        self.item_positions = nn.Parameter(torch.randn(config.max_length, dim) * 0.02)
        self.token_positions = nn.Parameter(torch.randn(depth, dim) * 0.02)
        self.steps = nn.Parameter(torch.randn(depth, dim) * 0.02)  # of the decoder: all that its first one starts from
        options = (dim, config.heads, config.dropout)
        self.encoder = nn.ModuleList(Block(*options, is_causal=False) for _ in range(config.layers))
        self.encoder_norm = nn.LayerNorm(dim)
        self.decoder = nn.ModuleList(DecoderBlock(*options) for _ in range(config.layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)

    def log_likelihood(self, batch: PackedBatch, items: Tensor) -> Tensor:
        """Log-probability `(B,)` that `items (B,)` are the ones that follow the histories."""
        tokens = self.tree.tokens[items]  # (B, depth)
        known = self._embed(tokens[:, :-1], slice(0, -1))
        inputs = torch.cat([known.new_zeros(len(items), 1, known.shape[2]), known], 1) + self.steps
        hidden = self._decode(inputs[:, None], self._remember(batch))[0]
        logits = [self._logits(hidden[:, 0, depth], depth) for depth in range(self.tree.depth)]
        losses = [F.cross_entropy(each, tokens[:, depth], reduction="none") for depth, each in enumerate(logits)]
        return -torch.stack(losses).sum(0)

    def loss(self, batch: PackedBatch) -> Tensor:
        """Mean negative log-likelihood of the items after each history: the targets at the last positions."""
        return -self.log_likelihood(batch, batch.targets[batch.last]).mean()

    def transitions(self, batch: PackedBatch) -> int:
        """How many targets `loss` is a mean over."""
        return len(batch.last)

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Tensor:
        """Log-probabilities `(B, n_items)` of the items found after each history, -inf for all others."""
        tree, memory = self.tree, self._remember(batch)
        inputs = self.steps[0].expand(len(batch.last), 1, 1, -1)  # (B, beams, tokens, dim)
        nodes = batch.last.new_zeros(len(batch.last), 1)
        scores = inputs.new_zeros(nodes.shape)
        past = None
        for depth in range(tree.depth):
            hidden, past = self._decode(inputs, memory, past)
            log_probs = self._logits(hidden[:, :, 0], depth).log_softmax(-1)
            nodes, parents, scores = tree.expand(depth, nodes, scores, log_probs, self.config.beam)
            if depth + 1 < tree.depth:
                tokens = tree.token(depth)[nodes]
                inputs = (self._embed(tokens, slice(depth, depth + 1)) + self.steps[depth + 1])[:, :, None]
                past = [(_of_beams(key, parents), _of_beams(value, parents)) for key, value in past]
        found = inputs.new_full((len(scores), len(tree.items)), -torch.inf)
        history, place = (scores != -torch.inf).nonzero(as_tuple=True)
        found[history, tree.items[nodes[history, place]]] = scores[history, place]
        return found

    def _remember(self, batch: PackedBatch) -> Memory:
        """Encodes packed histories for the decoder, which gets them padded: it reads no padding."""
        depth = self.tree.depth
        tokens = self.tree.tokens[batch.items]  # (T, depth)
        positions = F.embedding(batch.positions, self.item_positions)
        vectors = self._embed(tokens, slice(0, depth)) + positions[:, None] + self.token_positions
        flat = PackedBatch(
            items=tokens.flatten(),
            positions=batch.positions.repeat_interleave(depth),
            timestamps=None,
            cu_seqlens=batch.cu_seqlens * depth,
            max_seqlen=batch.max_seqlen * depth,
        )
        hidden = self.dropout(vectors.flatten(0, 1))
        for block in self.encoder:
            hidden = block(hidden, flat)
        hidden = self.encoder_norm(hidden)
        lengths = flat.cu_seqlens.diff().long()
        width = flat.max_seqlen
        sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        places = torch.arange(len(hidden), device=lengths.device) - flat.cu_seqlens[:-1].long()[sequence]
        slots = sequence * width + places
        layers = []
        for block in self.decoder:
            packed = block.key_value(hidden)
            padded = packed.new_zeros(len(lengths) * width, packed.shape[1]).index_copy(0, slots, packed)
            padded = padded.view(len(lengths), width, 2, self.config.heads, -1)
            layers.append(padded.permute(2, 0, 3, 1, 4).unbind(0))
        return Memory(layers, lengths)

    def _decode(self, inputs: Tensor, memory: Memory, past: list | None = None) -> tuple[Tensor, list]:
        """Hidden states of `inputs (B, W, S, dim)`, S tokens more of W sequences for each history; and their past."""
        hidden, present = self.dropout(inputs), []
        for n, block in enumerate(self.decoder):
            hidden, seen = block(hidden, *memory.layers[n], memory.lengths, past[n] if past else None)
            present.append(seen)
        return self.decoder_norm(hidden), present

    def _embed(self, tokens: Tensor, depths: slice) -> Tensor:
        """`tokens (..., S)`, counted from 0 at each of `depths`, to `(..., S, dim)`."""
        return F.embedding(tokens + self.offsets[depths], self.vocabulary)

    def _logits(self, hidden: Tensor, depth: int) -> Tensor:
        return hidden @ self.vocabulary.split(self.tree.sizes)[depth].T


class Memory(NamedTuple):
    """What the decoder reads of B histories."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values (B, H, S, D) of each
    lengths: Tensor  # (B,), tokens


class DecoderBlock(nn.Module):
    """Pre-norm attention to the tokens so far, to the encoder's states, and feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.self_norm, self.cross_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)  # of the encoder's states
        self.cross_project = nn.Linear(dim, dim)
        self.feed_forward = feed_forward(dim, dropout)
        self.dropout = Dropout(dropout)

    def forward(
        self, hidden: Tensor, key: Tensor, value: Tensor, lengths: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`hidden (B, W, S, dim)`: W sequences for each history, of which `past` are keys and values of the tokens
        before, `(B, W, H, ·, D)`. `key`, `value` and `lengths` are a layer of `Memory`.

        Returns the new `hidden`, and the keys and values of all tokens so far.
        """
        attended, present = self._attend_to_itself(self.self_norm(hidden), past)
        hidden = hidden + self.dropout(self.project(attended))
        query = self.query(self.cross_norm(hidden)).flatten(1, 2)  # (B, W · S, dim)
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attended = similarity_attention(query, key, value, key_lengths=lengths)
        attended = attended.transpose(1, 2).flatten(2).view_as(hidden)
        hidden = hidden + self.dropout(self.cross_project(attended))
        return hidden + self.dropout(self.feed_forward(hidden)), present

    def _attend_to_itself(
        self, hidden: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        qkv = self.qkv(hidden).unflatten(-1, (3, self.heads, -1))  # (B, W, S, 3, H, D)
        query, key, value = qkv.transpose(2, 4).unbind(3)  # (B, W, H, S, D)
        if past is not None:
            key, value = torch.cat([past[0], key], 3), torch.cat([past[1], value], 3)
        flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
        attended = similarity_attention(*flat, is_causal=True)  # (B · W, H, S, D)
        return attended.transpose(1, 2).flatten(2).view_as(hidden), (key, value)


def _of_beams(tensor: Tensor, parents: Tensor) -> Tensor:
    """`tensor (B, W, ...)` of the beams that `parents (B, W')` name."""
    histories, beams = tensor.shape[:2]
    first = torch.arange(histories, device=parents.device)[:, None] * beams
    return tensor.flatten(0, 1)[first + parents]
