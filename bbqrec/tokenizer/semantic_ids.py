"""Semantic IDs: the codes of every item in every modality, and the codebooks they index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from bbqrec.data.files import atomically
from bbqrec_kernels import codebook_usage, residual_decode

CODES = "codes/"  # prefix of a modality's column in the table: it may be called `title`


@dataclass(frozen=True)
class SemanticIDs:
    """What the tokenizer hands to the sequence model.

    Attributes:
        modalities: names of the M modalities, in the order of the tensors.
        codes: `(n_items, M, L)` int64, -1 where the item lacks the modality.
        codebooks: `(S, L, K, d)` float32; S is 1 where all modalities share one codebook, otherwise M.
    """

    modalities: tuple[str, ...]
    codes: Tensor
    codebooks: Tensor

    @classmethod
    def none(cls, n_items: int) -> SemanticIDs:
        """Of a model without modalities."""
        return cls((), torch.empty(n_items, 0, 0, dtype=torch.int64), torch.empty(0, 0, 0, 0))

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[2]

    @property
    def is_shared(self) -> bool:
        """Whether equal codes of two modalities mean the same codeword."""
        return len(self.codebooks) == 1

    def figures(self) -> dict[str, list[float] | float | None]:
        """`usage` and `perplexity` per level, `collision_rate`, `agreement`."""
        return {**self.usage(), "collision_rate": self.collision_rate(), "agreement": self.agreement()}

    def usage(self) -> dict[str, list[float]]:
        """Per level: share of codewords in use, and perplexity (exp of the entropy of the code distribution).

        Where every modality has codebooks of its own, means over the modalities.
        """
        groups = [self.codes] if self.is_shared else self.codes.unbind(1)
        found = [codebook_usage(codes, self.codebook_size) for codes in groups]
        return {
            "usage": torch.stack([each.usage for each in found]).mean(0).tolist(),
            "perplexity": torch.stack([each.perplexity for each in found]).mean(0).tolist(),
        }

    def collision_rate(self) -> float:
        """Share of items whose codes, over all modalities, another item has as well."""
        _, inverse, counts = self.codes.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
        return (counts[inverse] > 1).double().mean().item()

    def agreement(self) -> float | None:
        """Share of items whose modalities all have the same first code, among items that have every modality.

        None where there is no such item, and where there is nothing to agree on: with one modality alone, or where
        every modality has codebooks of its own.
        """
        first = self.codes[:, :, 0]
        complete = (first >= 0).all(1)
        if first.shape[1] < 2 or not self.is_shared or not complete.any():
            return None
        return (first[complete] == first[complete, :1]).all(1).double().mean().item()

    def text(self, item: int) -> str:
        """The semantic ID of an item for people, e.g. `text 3-17-40-8 · image 3-17-2-60 · #41`."""
        parts = [
            f"{name} " + "-".join(str(c) for c in codes if c >= 0)
            for name, codes in zip(self.modalities, self.codes[item].tolist(), strict=True)
            if codes[0] >= 0
        ]
        return " · ".join([*parts, f"#{item}"])

    def save_table(self, path: str | Path, item_ids: list[str], titles: list[str]) -> None:
        """Writes parquet: `item`, `title`, a list column `codes/<modality>` for each modality, and `number`.

        The item's own number is the last part of its semantic ID, so that no two items share one.
        """
        columns = {"item": item_ids, "title": titles}
        for m, name in enumerate(self.modalities):
            columns[f"{CODES}{name}"] = self.codes[:, m].tolist()
        columns["number"] = range(len(item_ids))
        atomically(Path(path), pl.DataFrame(columns).write_parquet)


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sums the codewords of all modalities: `(N, M, L)`, codebooks `(S, L, K, d)` → `(N, d)`; gradient to codebooks."""
    of_each = codebooks.expand(codes.shape[1], -1, -1, -1)
    return residual_decode(codes.flatten(1), of_each.flatten(0, 1))
