"""Items' semantic IDs as a tree: which tokens may follow which, for a search that finds existing items only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Beams(NamedTuple):
    """The best paths of B searches, W each, best first; where there are fewer, the score is -inf and the rest void."""

    nodes: Tensor  # (B, W) int64, numbers of nodes at the depth reached
    parents: Tensor  # (B, W) int64, which of the beams before each one continues
    scores: Tensor  # (B, W), sums of log-probabilities


class IDTree(nn.Module):
    """Every item's ID as a path of `depth` tokens from the root, a leaf for each item.

    Tokens of an item are its codes, level after level and modality after modality, with a token of its own where it
    lacks the modality; the last one is its number among the items with the same codes, in the order of the catalogue.
    Tokens count from 0 at every depth anew. Nodes of a depth are numbered in the order of their paths, so that the
    children of a node are neighbours: a depth is an array of tokens and one of where each node's children start.

    Args:
        codes: `(n_items, M, L)` int64, -1 where the item lacks the modality.
        codebook_size: K; codes are below it.

    Attributes:
        tokens: `(n_items, depth)` int64.
        sizes: how many tokens there are at each depth: K + 1 for codes, and at last as many as items share codes.
        items: `(n_items,)` int64, the item of each leaf.
    """

    def __init__(self, codes: Tensor, codebook_size: int):
        super().__init__()
        codes = codes.flatten(1)
        number = _number_among_equals(codes)
        tokens = torch.cat([torch.where(codes < 0, codebook_size, codes), number[:, None]], 1)
        self.sizes = (*[codebook_size + 1] * codes.shape[1], int(number.max()) + 1)
        paths, leaves = tokens.unique(dim=0, return_inverse=True)  # in the order of the paths
        self._add("tokens", tokens)
        self._add("items", leaves.argsort())
        starts = torch.ones(len(paths), dtype=torch.bool)  # where the node of a leaf, at this depth, is a new one
        starts[1:] = False
        for depth in range(self.depth):
            parents = starts
            starts = parents.clone()
            starts[1:] |= paths[1:, depth] != paths[:-1, depth]
            self._add(f"token_{depth}", paths[starts, depth])
            ends = starts.new_ones(len(paths) + 1)
            ends[:-1] = parents
            self._add(f"first_child_{depth}", torch.cat([starts.new_zeros(1), starts]).cumsum(0)[ends])

    @property
    def depth(self) -> int:
        return len(self.sizes)

    def token(self, depth: int) -> Tensor:
        """Of each node at `depth + 1`, the token that leads there."""
        return getattr(self, f"token_{depth}")

    def first_child(self, depth: int) -> Tensor:
        """Of each node at `depth`, its first child at `depth + 1`; and at the end the number of nodes there."""
        return getattr(self, f"first_child_{depth}")

    def expand(self, depth: int, nodes: Tensor, scores: Tensor, log_probs: Tensor, width: int) -> Beams:
        """The best `width` of all children of the beams of each search, or all where there are fewer.

        Args:
            depth: of the nodes.
            nodes, scores: `(B, W)`, the beams; a score of -inf marks one that is none.
            log_probs: `(B, W, sizes[depth])` of the tokens that follow.
        """
        searches, beams = nodes.shape
        first = self.first_child(depth)
        counts = (first[nodes + 1] - first[nodes]).masked_fill(scores == -torch.inf, 0)
        beam = torch.arange(searches * beams, device=nodes.device).repeat_interleave(
            counts.flatten()
        )  # (C,) candidates
        node = _count_up(counts.flatten(), beam) + first[nodes].flatten()[beam]
        score = scores.flatten()[beam] + log_probs.flatten(0, 1)[beam, self.token(depth)[node]]
        # Searches have different numbers of candidates: side by side, filled up with -inf.
        search = beam // beams
        place = _count_up(counts.sum(1), search)
        padded = score.new_full((searches, int(counts.sum(1).max())), -torch.inf)
        padded[search, place] = score
        best = padded.topk(min(width, padded.shape[1]))
        found = (counts.sum(1).cumsum(0) - counts.sum(1))[:, None] + best.indices
        found = found.clamp_max(len(node) - 1)  # of what filled up
        return Beams(node[found], beam[found] % beams, best.values)

    def _add(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)  # follows from the codes


def _number_among_equals(rows: Tensor) -> Tensor:
    """`(N, ·)` → `(N,)`: 0 for the first of equal rows, 1 for the second, ..."""
    group, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)[1:]
    order = group.argsort(stable=True)
    number = torch.empty_like(group)
    number[order] = _count_up(counts, group[order])
    return number


def _count_up(counts: Tensor, group: Tensor) -> Tensor:
    """For groups of these sizes side by side, `group` being each member's: 0, 1, ... within each."""
    return torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]
