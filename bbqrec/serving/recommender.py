"""`BBQRec`: a finished run folder as an object that recommends. Needs the run folder, not the data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from bbqrec.data.batches import pack_histories
from bbqrec.data.dataset import Histories, unknown_item
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.models.tiger import Tiger
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training.run import Run

BATCH_HISTORIES = 256  # bounds the memory of the scores, BATCH_HISTORIES x n_items


class BBQRec:
    """Recommends the next items of histories. `BBQRec.load` opens a run folder of any model, SASRec and TIGER too.

    Args:
        model: a trained model; its device is where scores are computed.
        item_ids: name of every item, in the order of the model.
        titles: title of every item.
        max_length: latest interactions of a history that count.
        semantic_ids: codes of every item, None for a model without.
    """

    def __init__(
        self,
        model: SequenceModel | Tiger,
        item_ids: Sequence[str],
        titles: Sequence[str],
        max_length: int,
        semantic_ids: SemanticIDs | None = None,
    ):
        self.model = model.eval()
        self.item_ids = list(item_ids)
        self.titles = list(titles)
        self.max_length = max_length
        self.semantic_ids = semantic_ids
        self._index = {item: i for i, item in enumerate(self.item_ids)}

    @classmethod
    def load(cls, folder: str | Path) -> BBQRec:
        """Opens a finished run folder. Raises `ValueError` where there is none, or an unfinished one."""
        run = Run(Path(folder))
        items = run.items
        max_length = run.config.model.max_length
        return cls(run.model, items["item"].to_list(), items["title"].to_list(), max_length, run.semantic_ids)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        keep_history: bool = False,
        candidates: Iterable[str] | None = None,
        timestamps: Sequence[Sequence[int]] | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The best next items.

        Args:
            histories: item ids of each user, oldest first. Of a long one, the latest `max_length` items count.
            k: items to return for each history.
            keep_history: also recommend items of the history; by default they are left out.
            candidates: recommend these items only; by default the whole catalogue.
            timestamps: time of every item of every history, in the unit of the data set (mostly seconds). Needed by a
                model with `model.relative_time`, and by no other.

        Returns:
            For each history `k` pairs of item id and score, best first. Scores are logits of the softmax over items:
            they compare within a history, not between histories. TIGER's are log-probabilities.

        Raises:
            TypeError: `histories` is no list of lists of strings.
            ValueError: an item is unknown, a history is empty, `k` is below 1 or above the number of candidates (of
                TIGER, those that its search finds, `model.beam`, without the history), or timestamps are missing, not
                needed, or not one for each item.
        """
        indices = [self._indices(n, history) for n, history in enumerate(histories)]
        self._check_timestamps(indices, timestamps)
        is_candidate = torch.full((len(self.item_ids),), candidates is None)
        if candidates is not None:
            is_candidate[[self.item_index(item) for item in candidates]] = True
        total = int(is_candidate.sum())
        for n, items in enumerate(indices):
            removed = 0 if keep_history else int(is_candidate[sorted(set(items))].sum())
            if not 1 <= k <= total - removed:
                what = "items" if candidates is None else "candidates"
                raise ValueError(
                    f"k: got {k}, expected 1 to {total - removed} for history {n} "
                    f"({total} {what}, {removed} of them left out as history)"
                )
        recommended = []
        for start in range(0, len(indices), BATCH_HISTORIES):
            chosen = slice(start, start + BATCH_HISTORIES)
            times = None if timestamps is None else timestamps[chosen]
            recommended += self._recommend(indices[chosen], times, k, keep_history, is_candidate)
        for n, found in enumerate(recommended):
            if len(found) < k:  # of models that search
                raise ValueError(
                    f"k: got {k}, expected 1 to {len(found)} for history {n}: the search keeps "
                    f"{self.model.config.beam} items, some of them left out as history or no candidates; ask for "
                    "fewer, or fit with a larger model.beam"
                )
        return recommended

    def title(self, item: str) -> str:
        """Title of an item. Raises `ValueError` where the item is unknown."""
        return self.titles[self.item_index(item)]

    def semantic_id(self, item: str) -> str:
        """Semantic ID of an item for people; the item's number alone for a model without semantic IDs."""
        index = self.item_index(item)
        return f"#{index}" if self.semantic_ids is None else self.semantic_ids.text(index)

    def item_index(self, item: str) -> int:
        """Row of an item. Raises `ValueError` naming the nearest known ids where the item is unknown."""
        if item not in self._index:
            raise ValueError(unknown_item(item, self.item_ids))
        return self._index[item]

    def _indices(self, n: int, history: Sequence[str]) -> list[int]:
        if isinstance(history, str) or not all(isinstance(item, str) for item in history):
            raise TypeError(f"histories: got {history!r} at position {n}, expected a list of item ids (strings)")
        if not history:
            raise ValueError(f"histories: history {n} is empty, expected at least one item id")
        return [self.item_index(item) for item in history]

    def _check_timestamps(self, histories: list[list[int]], timestamps: Sequence[Sequence[int]] | None) -> None:
        needed = self.model.config.relative_time
        if (timestamps is not None) != needed:
            raise ValueError(
                "timestamps: got None, expected one for each item, as this model reads times"
                if needed
                else "timestamps: got some, expected None, as this model reads no times"
            )
        for n, history in enumerate(histories if needed else ()):
            times = list(timestamps[n]) if n < len(timestamps) and isinstance(timestamps[n], Iterable) else []
            whole = all(isinstance(t, (int, np.integer)) and -(2**63) <= t < 2**63 for t in times)
            if len(times) != len(history) or not whole or times != sorted(times):
                raise ValueError(
                    f"timestamps: got {times} for history {n}, expected {len(history)} whole numbers, oldest first"
                )

    def _recommend(
        self,
        histories: list[list[int]],
        timestamps: Sequence[Sequence[int]] | None,
        k: int,
        keep_history: bool,
        is_candidate: torch.Tensor,
    ) -> list[list[tuple[str, float]]]:
        batch = pack_histories(Histories.from_lists(histories, timestamps), self.max_length)
        scores = self.model.score(batch.to(next(self.model.parameters()).device)).cpu()
        scores[:, ~is_candidate] = -torch.inf
        if not keep_history:
            for row, items in zip(scores, histories, strict=True):
                row[items] = -torch.inf
        best = scores.topk(k)
        return [
            [(self.item_ids[i], score) for i, score in zip(*row, strict=True) if score != -torch.inf]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
