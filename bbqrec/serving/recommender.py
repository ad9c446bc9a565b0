"""`BBQRec`: a finished run folder as an object that recommends. Needs the run folder, not the data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

from bbqrec.data.batches import PackedBatch, pack_histories
from bbqrec.data.dataset import Histories, check_unique, unknown_item
from bbqrec.data.files import atomically, read_parquet
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.models.tiger import Tiger
from bbqrec.tokenizer.item_encoder import ItemEncoder
from bbqrec.tokenizer.semantic_ids import CODES, SemanticIDs
from bbqrec.training.run import Run, damage_named, versions
from bbqrec_kernels import _library

NEW_ITEMS = "new_items.parquet"
BATCH_HISTORIES = 256  # that are scored at once, at most
BATCH_SCORES = 2**24  # of all of them: bounds the memory


class BBQRec:
    """Recommends the next items of histories. `BBQRec.load` opens a run folder of any model, SASRec and TIGER too.

    Args:
        model: a trained model; its device is where scores are computed. Its weights stay as they are: vectors of items
            are computed once.
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
        self.n_trained = len(self.item_ids)  # those behind are new: see `add_items`
        self._run: Run | None = None
        self._vectors: torch.Tensor | None = None
        self._index = {item: i for i, item in enumerate(self.item_ids)}

    @classmethod
    def load(cls, folder: str | Path, *, new_items: bool = True) -> BBQRec:
        """Opens a finished run folder, with the new items that `save_new_items` left in it, or without.

        Raises `ValueError` where there is no run folder, or an unfinished or damaged one.
        """
        run = Run(Path(folder))
        items = run.items
        max_length = run.config.model.max_length
        model = cls(run.model, items["item"].to_list(), items["title"].to_list(), max_length, run.semantic_ids)
        model._run = run
        path = run.folder / NEW_ITEMS
        if new_items and path.is_file():
            with damage_named(path):
                model._append(*_read_new_items(path, run.modalities))
        return model

    def add_items(
        self,
        items: Sequence[str],
        *,
        titles: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        features: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Adds items that training did not know: from now on they are recommended, and histories may hold them.

        The trained tokenizer gives them semantic IDs, and their vectors are what the model makes of these (and of their
        features, with `model.features`). What is missing is the part of the vector that the item's own ID has: what
        training learned about an item from who took it, beyond its content. It is zero, so new items with the same
        semantic ID score the same, and an item that is better or worse than its content says is taken for average; the
        larger that part is in a run, the less new items are like old ones. Fit again when they have interactions.
        `evaluate`, `inspect` and `fit` know nothing of them. `save_new_items` keeps them.

        Args:
            items: N names.
            titles: what people see; by default the names.
            texts: one an item, empty where unknown, for a run whose "text" features were made of texts on loading.
            features: by modality `(N, F)`, made as those of the data set were; a row of NaN says that an item lacks
                the modality, and so does a modality that is not there.

        Raises:
            TypeError: items, titles or texts are no lists of strings.
            ValueError: a name is there already, an item has no modality at all, numbers or shapes do not fit, or the
                model cannot tell new items from their content.
        """
        encoder = self._item_encoder()
        items = _strings("items", items, "names (strings, not empty)")
        titles = items if titles is None else _strings("titles", titles, "strings, empty where unknown")
        texts = None if texts is None else _strings("texts", texts, "strings, empty where unknown")
        if not all(items):
            raise TypeError(f"items: got {items!r}, expected a list of names (strings, not empty)")
        check_unique(items, "items")
        for item in items:
            if item in self._index:
                raise ValueError(f"items: {item!r} is in the catalogue already; give new items other names")
        if len(titles) != len(items):
            raise ValueError(f"titles: got {len(titles)}, expected {len(items)} (one for each item)")
        titles = [title or item for title, item in zip(titles, items, strict=True)]
        if not items:
            return
        encoded = encoder.encode(len(items), features or {}, texts)
        bare = ~encoded.present.any(1)
        if bare.any():
            known = ", ".join(map(repr, encoder.standardizations))
            raise ValueError(
                f"items: {items[bare.argmax()]!r} has nothing in any of {known}, so nothing is known about it; leave "
                "it out"
            )
        self._append(items, titles, encoded.codes, encoded.features)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The feature sets that `add_items` takes. Raises `ValueError` where it takes nothing."""
        return tuple(self._item_encoder().standardizations)

    @property
    def reads_texts(self) -> bool:
        """Whether `add_items` takes texts. Raises `ValueError` where it takes nothing."""
        return self._item_encoder().words is not None

    def save_new_items(self) -> None:
        """Writes all new items to `new_items.parquet` in the run folder, where `BBQRec.load` finds them.

        Raises `ValueError` where there are none, and where the file has items that this object does not.
        """
        if len(self.item_ids) == self.n_trained:
            raise ValueError("save_new_items: there are no new items; `add_items` adds some")
        new, path = slice(self.n_trained, None), self._run.folder / NEW_ITEMS
        for item in _read_new_items(path, ())[0] if path.is_file() else ():
            if item not in self._index:
                raise ValueError(
                    f"save_new_items: {path} has {item!r}, which was not there when this run was loaded; load it "
                    "again, and add items to that"
                )
        columns = {"item": self.item_ids[new], "title": self.titles[new]}
        if self.semantic_ids is not None:
            for m, name in enumerate(self.semantic_ids.modalities):
                columns[f"{CODES}{name}"] = self.semantic_ids.codes[new, m].tolist()
        if self.model.features is not None:
            columns["features"] = self.model.features[new].tolist()
        schema = {"item": pl.String, "title": pl.String}
        atomically(path, pl.DataFrame(columns, schema_overrides=schema).write_parquet)

    def _item_encoder(self) -> ItemEncoder:
        """Raises `ValueError` for a model that cannot tell new items from their content."""
        if self._run is None:
            raise ValueError("add_items: this model was not opened by BBQRec.load, so it has no tokenizer; open one so")
        if isinstance(self.model, Tiger):
            raise ValueError(
                "add_items: TIGER finds items by a search in the IDs that it was trained to write, which holds no new "
                "ones; fit model 'bbqrec'"
            )
        if not self.model.has_content and self.model.features is None:
            raise ValueError(
                "add_items: this model knows items by their own IDs alone, so it can say nothing about new ones; fit "
                "model 'bbqrec', or set model.features=true"
            )
        return self._run.item_encoder

    def _append(
        self, items: list[str], titles: list[str], codes: torch.Tensor | None, features: torch.Tensor | None
    ) -> None:
        self.model.add_items(codes, features)
        self._vectors = None
        self._index |= {item: len(self.item_ids) + n for n, item in enumerate(items)}
        self.item_ids += items
        self.titles += titles
        if self.semantic_ids is not None:
            self.semantic_ids = replace(self.semantic_ids, codes=self.model.codes)

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
            TypeError: `histories` is no list of lists of strings, `k` no whole number, or `candidates` one string.
            ValueError: an item is unknown, a history is empty, `k` is below 1 or above the number of candidates (of
                TIGER, those that its search finds, `model.beam`, without the history), or timestamps are missing, not
                needed, or not one for each item.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
            raise TypeError(f"k: got {k!r}, expected a whole number")
        if isinstance(candidates, str):
            raise TypeError(f"candidates: got {candidates!r}, expected a list of item ids")
        indices = [self._indices(n, history) for n, history in enumerate(histories)]
        self._check_timestamps(indices, timestamps)
        is_candidate = torch.full((len(self.item_ids),), candidates is None)
        if candidates is not None:
            is_candidate[[self.item_index(item) for item in candidates]] = True
        total = int(is_candidate.sum())
        if total == 0:
            raise ValueError("candidates: got none, expected at least one item id")
        for n, items in enumerate(indices):
            removed = 0 if keep_history else int(is_candidate[sorted(set(items))].sum())
            what = f"{total} {'items' if candidates is None else 'candidates'}, {removed} of them left out as history"
            if total == removed:
                raise ValueError(f"candidates: nothing is left to recommend for history {n} ({what}); keep it")
            if not 1 <= k <= total - removed:
                raise ValueError(f"k: got {k}, expected 1 to {total - removed} for history {n} ({what})")
        recommended = []
        at_once = max(1, min(BATCH_HISTORIES, BATCH_SCORES // len(self.item_ids)))
        for start in range(0, len(indices), at_once):
            chosen = slice(start, start + at_once)
            times = None if timestamps is None else timestamps[chosen]
            recommended += self._recommend(indices[chosen], times, k, keep_history, is_candidate)
        for n, found in enumerate(recommended):
            if len(found) < k:  # of models that search
                kept = f"the search keeps {self.model.config.beam} items, without the history or what is no candidate"
                if not found:
                    raise ValueError(f"k: nothing is left for history {n}: {kept}; fit with a larger model.beam")
                raise ValueError(
                    f"k: got {k}, expected 1 to {len(found)} for history {n}: {kept}; ask for fewer, or fit with a "
                    "larger model.beam"
                )
        return recommended

    def export(self, path: str | Path, k: int = 10, *, keep_history: bool = False, compiled: bool = False) -> None:
        """Writes the recommender, new items included, as a program that runs without this package and the run folder.

        It maps `histories (B, S)` of item numbers to the `k` best next items and their scores, as `recommend` does; for
        a model that reads times, `timestamps (B, S)` are its second input. `bbqrec.serving.export` says how to load and
        call it: that takes torch and `import bbqrec_kernels`.

        Args:
            path: of the file, named .pt2.
            k: how many items it returns; where fewer are left for a history, the last scores are -inf.
            keep_history: also recommend items of the history.
            compiled: machine code by AOTInductor, for machines like this one, in place of a graph for `torch.export`.
                It needs a C++ compiler, and takes about a minute.

        Raises:
            ValueError: a wrong `k` or name, a model that searches (TIGER), or operators without a compiled library.
        """
        from bbqrec.serving.export import Program, export  # loads torch.export, which takes a second

        path = Path(path)
        if path.suffix != ".pt2" or not path.parent.is_dir():
            raise ValueError(f"path: got {path}, expected a name that ends in .pt2, in a folder that exists")
        if isinstance(self.model, Tiger):
            raise ValueError("export: TIGER's search has no fixed shapes, so it cannot be exported; fit model 'bbqrec'")
        if not 1 <= k <= len(self.item_ids):
            raise ValueError(f"k: got {k}, expected 1 to {len(self.item_ids)}, the number of items")
        if _library.CPU.blocker:
            raise ValueError(f"export: needs the compiled library of bbqrec_kernels, but {_library.CPU.blocker}")
        about = {
            "items": self.item_ids,
            "titles": self.titles,
            "k": k,
            "max_length": self.max_length,
            "keep_history": keep_history,
            "reads_timestamps": self.model.config.relative_time,
            "versions": versions(),
        }
        export(Program(self.model, k, self.max_length, keep_history), about, path, compiled=compiled)

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
        if len(history) == 0:  # of an array, too
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
            whole = all(type(t) is int or isinstance(t, np.integer) for t in times)  # a bool is an int
            whole = whole and all(-(2**63) <= t < 2**63 for t in times)
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
        scores = self._score(batch.to(next(self.model.parameters()).device)).cpu()
        if not keep_history:
            for row, items in zip(scores, histories, strict=True):
                row[items] = -torch.inf
        candidates = is_candidate.nonzero()[:, 0]
        if len(candidates) < len(is_candidate):  # the others are not there at all: they have no say in ties
            scores = scores[:, candidates]
        best = scores.topk(k)
        return [
            [(self.item_ids[i], score) for i, score in zip(*row, strict=True) if score != -torch.inf]
            for row in zip(candidates[best.indices].tolist(), best.values.tolist(), strict=True)
        ]

    def _score(self, batch: PackedBatch) -> torch.Tensor:
        if isinstance(self.model, Tiger):
            return self.model.score(batch)
        if self._vectors is None or self._vectors.device != batch.items.device:
            with torch.no_grad():
                self._vectors = self.model.item_vectors()
        return self.model.score(batch, self._vectors)


def _strings(name: str, values: Iterable[str], expected: str) -> list[str]:
    listed = list(values)
    if isinstance(values, str) or not all(isinstance(value, str) for value in listed):
        raise TypeError(f"{name}: got {values!r}, expected a list of {expected}")
    return listed


def _read_new_items(
    path: Path, modalities: tuple[str, ...]
) -> tuple[list[str], list[str], torch.Tensor | None, torch.Tensor | None]:
    """What `BBQRec.save_new_items` wrote: names, titles, and codes and features, where the model has them."""
    table = read_parquet(path)
    codes = features = None
    if modalities:
        codes = torch.stack([torch.tensor(table[f"{CODES}{name}"].to_list()) for name in modalities], dim=1)
    if "features" in table.columns:
        features = torch.tensor(table["features"].to_list())
    return table["item"].to_list(), table["title"].to_list(), codes, features
