"""A data set in memory: who did what in which order, and what the items look and read like."""

from __future__ import annotations

import difflib
import hashlib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bbqrec.data.text import WordVectors


@dataclass(frozen=True, eq=False)
class Features:
    """The features of all items in one modality.

    Attributes:
        values: `(n_items, F)` float32; rows of absent items are zero.
        present: `(n_items,)` bool; false where an item lacks the modality.
        words: what made them of the texts on loading; None where they were given.

    Raises `ValueError` (shapes, no item present, NaN or infinity) and `TypeError` (dtypes).
    """

    values: np.ndarray
    present: np.ndarray
    words: WordVectors | None = None

    def __post_init__(self) -> None:
        if self.values.dtype != np.float32 or self.present.dtype != np.bool_:
            raise TypeError(
                f"features: got values of {self.values.dtype} and present of {self.present.dtype}, "
                "expected float32 and bool"
            )
        if self.values.ndim != 2 or self.present.shape != self.values.shape[:1] or not self.values.shape[1]:
            raise ValueError(
                f"features: got values {self.values.shape} and present {self.present.shape}, "
                "expected (n_items, F) with F >= 1 and (n_items,)"
            )
        if not self.present.any():
            raise ValueError("features: no item has any, so there is nothing to learn from; leave this modality out")
        check_finite(self.values, "features")

    @property
    def derived(self) -> bool:
        """Whether they were made of the texts: they are neither saved nor part of the fingerprint."""
        return self.words is not None

    @classmethod
    def of_items(cls, values: np.ndarray, rows: np.ndarray, n_items: int) -> Features:
        """Row `r` of `values` belongs to item `rows[r]`; the items without a row lack the modality.

        Raises `ValueError` for rows that are not as many as vectors, no items, or twice the same.
        """
        if len(rows) != len(values) or len(np.unique(rows)) < len(rows):
            raise ValueError(f"rows: got {len(rows)} for {len(values)} vectors, expected a different item for each")
        if len(rows) and not 0 <= rows.min() <= rows.max() < n_items:
            raise ValueError(f"rows: got {rows.min()} to {rows.max()}, expected 0 to {n_items - 1}")
        table = np.zeros((n_items, values.shape[1]), np.float32)
        table[rows] = values
        present = np.zeros(n_items, bool)
        present[rows] = True
        return cls(table, present)


@dataclass(frozen=True, eq=False)
class Histories:
    """Sequences of items, oldest first, one after another in flat arrays.

    `len(histories)` counts sequences, `histories[n]` are the items of sequence `n` (a view), `histories[a:b]` are
    `Histories` again.

    Attributes:
        items: `(T,)` int64, item indices.
        offsets: `(N + 1,)` int64; sequence `n` is `items[offsets[n] : offsets[n + 1]]`.
        timestamps: `(T,)` int64 in the unit of the source (mostly seconds), or None.

    Raises `ValueError` where shapes or offsets do not fit together, `TypeError` where an array is not int64.
    """

    items: np.ndarray
    offsets: np.ndarray
    timestamps: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("items", "offsets", "timestamps"):
            array = getattr(self, name)
            if array is None and name == "timestamps":
                continue
            if array.dtype != np.int64:
                raise TypeError(f"histories: got {name} of {array.dtype}, expected int64")
            if array.ndim != 1:
                raise ValueError(f"histories: got {name} of shape {array.shape}, expected one dimension")
        if self.timestamps is not None and len(self.timestamps) != len(self.items):
            raise ValueError(f"histories: got {len(self.timestamps)} timestamps for {len(self.items)} items")
        ends = (self.offsets[0], self.offsets[-1]) if len(self.offsets) else None
        if ends != (0, len(self.items)) or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"histories: offsets must start at 0, never decrease and end at {len(self.items)}")

    @classmethod
    def from_lists(
        cls, sequences: Sequence[Sequence[int]], timestamps: Sequence[Sequence[int]] | None = None
    ) -> Histories:
        """`sequences[n]` are the items of sequence `n`, oldest first, and `timestamps[n]` their times.

        Raises `ValueError` where a sequence has not as many times as items, `TypeError` where a number is not whole.
        """

        def flat(name: str, lists: Sequence[Sequence[int]]) -> np.ndarray:
            arrays = [np.asarray(each) for each in lists if len(each)]
            for array in arrays:
                if array.dtype.kind not in "iu":
                    raise TypeError(f"{name}: got {array.dtype}, expected whole numbers")
            return np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, np.int64)

        items, offsets = flat("sequences", sequences), np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        if timestamps is None:
            return cls(items, offsets)
        if len(timestamps) != len(sequences):
            raise ValueError(f"timestamps: got {len(timestamps)}, expected {len(sequences)} (one list a sequence)")
        for n, (sequence, times) in enumerate(zip(sequences, timestamps, strict=True)):
            if len(times) != len(sequence):
                raise ValueError(
                    f"timestamps of sequence {n}: got {len(times)}, expected {len(sequence)} (one an item)"
                )
        return cls(items, offsets, flat("timestamps", timestamps))

    @classmethod
    def from_interactions(
        cls, users: np.ndarray, items: np.ndarray, timestamps: np.ndarray | None, n_users: int
    ) -> Histories:
        """One row an interaction, sorted by time within each user; rows of equal time keep their order.

        `timestamps` `(T,)`: numbers, stored as whole numbers, or datetime64, stored in seconds; sorting comes first.
        """
        order = np.argsort(users, kind="stable") if timestamps is None else np.lexsort((timestamps, users))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=n_users))]).astype(np.int64)
        if timestamps is not None:
            whole = timestamps.astype("datetime64[s]") if timestamps.dtype.kind == "M" else timestamps
            timestamps = whole[order].astype(np.int64)
        return cls(items[order], offsets, timestamps)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int | slice) -> np.ndarray | Histories:
        if isinstance(index, slice):
            chosen = np.arange(len(self))[index]
            return self.spans(self.offsets[chosen], self.offsets[chosen + 1])
        if not -len(self) <= index < len(self):
            raise IndexError(f"histories: got sequence {index}, expected one below {len(self)}")
        index %= len(self)
        return self.items[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """`(N,)` int64, items of each sequence."""
        return np.diff(self.offsets)

    def spans(self, starts: np.ndarray, stops: np.ndarray) -> Histories:
        """New sequences cut from the flat arrays: sequence `n` is `items[starts[n] : stops[n]]`."""
        lengths = stops - starts
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Histories(self.items[index], offsets, None if self.timestamps is None else self.timestamps[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Users, items, interactions, features and texts.

    Attributes:
        name: for people; the name of the folder, if it came from one.
        item_ids: names of items; their positions are the indices used everywhere else.
        user_ids: names of users, likewise.
        histories: one sequence for each user.
        features: by modality, e.g. "text" and "image".
        texts: text columns by name, one string an item, empty where unknown; "title" is what people see.
        path: the folder it was read from, or None.

    Raises `ValueError` where an ID appears twice, a table has the wrong number of rows, or a history names an item
    that does not exist.
    """

    name: str
    item_ids: list[str]
    user_ids: list[str]
    histories: Histories
    features: dict[str, Features] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        check_unique(self.item_ids, "item_ids")
        check_unique(self.user_ids, "user_ids")
        if len(self.histories) != self.n_users:
            raise ValueError(f"histories: got {len(self.histories)}, expected {self.n_users} (one for each user)")
        items = self.histories.items
        if not len(items):
            raise ValueError("histories: there is no interaction in them; a data set needs at least one")
        if items.min() < 0 or items.max() >= self.n_items:
            raise ValueError(
                f"histories: got item indices {items.min()} to {items.max()}, expected 0 to {self.n_items - 1}"
            )
        for name, feature in self.features.items():
            if len(feature.values) != self.n_items:
                raise ValueError(
                    f"features[{name!r}]: got {len(feature.values)} rows, expected {self.n_items} (one for each item)"
                )
        for name, texts in self.texts.items():
            if len(texts) != self.n_items:
                raise ValueError(f"texts[{name!r}]: got {len(texts)}, expected {self.n_items} (one for each item)")

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Reads a folder in any of the formats of `bbqrec.data.formats`, found out by its files.

        Where items have texts but no "text" features, those are derived from the texts (TF-IDF and SVD, 128 wide).

        Raises `ValueError` if the folder is missing, empty or of unknown format, and for every fault in its files, as
        one sentence naming the file and the row.
        """
        from bbqrec.data import formats  # the readers need this module
        from bbqrec.data.text import with_text_features

        return with_text_features(formats.read(Path(path)))

    def save(self, folder: str | Path) -> None:
        """Writes the native format (see `bbqrec.data.formats.native`); it has no place for users without interactions.

        Raises `ValueError` if `folder` is not empty, an item ID has a newline in it, a text column is called "item", or
        the name of a feature set is no name of a file.
        """
        from bbqrec.data.formats import native  # the readers need this module

        native.write(self, Path(folder))

    @property
    def n_items(self) -> int:
        """Size of the catalogue, items that nobody has taken included."""
        return len(self.item_ids)

    @property
    def n_users(self) -> int:
        """Number of users, which is that of histories."""
        return len(self.user_ids)

    def title(self, item: int) -> str:
        """What to call item `item`: its title, otherwise its ID."""
        return (self.texts["title"][item] if "title" in self.texts else "") or self.item_ids[item]

    def text(self, item: int) -> str:
        """All that the item's texts say, in the order of the columns."""
        return joined(column[item] for column in self.texts.values())

    def item_index(self, item_id: str) -> int:
        """Index of an item. Raises `ValueError` naming the nearest known IDs."""
        try:
            return self.item_positions[item_id]
        except KeyError:
            raise ValueError(unknown_item(item_id, self.item_ids)) from None

    @cached_property
    def item_positions(self) -> dict[str, int]:
        """Index by item ID."""
        return {item_id: i for i, item_id in enumerate(self.item_ids)}

    def with_features(self, modality: str, features: Features) -> Dataset:
        """A copy with these features, in place of those it may have in `modality`; row `i` belongs to item `i`."""
        return replace(self, path=None, features={**self.features, modality: features})  # nobody finds it there

    def with_features_of(self, other: Dataset, modality: str) -> Dataset:
        """A copy with the features that `other` has in `modality`, joined by item ID; items it lacks are absent.

        Raises `ValueError` if `other` lacks the modality or shares no item that has it.
        """
        if modality not in other.features:
            known = ", ".join(other.features) or "none"
            raise ValueError(f"modality: {other.name} has no {modality!r} features; it has {known}")
        source = other.features[modality]
        rows = [i for i, item_id in enumerate(other.item_ids) if source.present[i] and item_id in self.item_positions]
        if not rows:
            raise ValueError(f"other: {self.name} has no item that has {modality!r} features in {other.name}")
        own = np.array([self.item_positions[other.item_ids[i]] for i in rows])
        return self.with_features(modality, Features.of_items(source.values[rows], own, self.n_items))

    def fingerprint(self) -> str:
        """Hash of the contents (not of name, path or derived features): 32 hex digits, the same on every machine."""
        digest = hashlib.blake2b(digest_size=16)

        def add(label: str, content: bytes | memoryview) -> None:
            digest.update(f"{label} {len(content)}\n".encode())  # sizes keep neighbours apart
            digest.update(content)

        def add_strings(label: str, strings: list[str]) -> None:
            add(label, np.array([len(s.encode()) for s in strings], "<i8").tobytes())
            add(label, "".join(strings).encode())

        def add_array(label: str, array: np.ndarray) -> None:
            little_endian = array.dtype.newbyteorder("<")
            add(f"{label} {array.shape}", np.ascontiguousarray(array, little_endian).tobytes())

        add_strings("items", self.item_ids)
        add_strings("users", self.user_ids)
        add_array("histories", self.histories.items)
        add_array("offsets", self.histories.offsets)
        if self.histories.timestamps is not None:
            add_array("timestamps", self.histories.timestamps)
        for name, feature in sorted(self.features.items()):
            if not feature.derived:
                add_array(f"features {name}", feature.values)
                add_array(f"present {name}", feature.present)
        for name, texts in self.texts.items():
            add_strings(f"texts {name}", texts)
        return digest.hexdigest()


def joined(texts: Iterable[str]) -> str:
    """What the texts of an item say together."""
    return ". ".join(stripped for text in texts if (stripped := text.strip(" .")))


def unknown_item(item_id: str, item_ids: Sequence[str]) -> str:
    """The message of an error about an item that is not in the catalogue."""
    # a fraction of a second at most: of large catalogues, only the IDs nearest in length are compared
    candidates = heapq.nsmallest(20_000, item_ids, key=lambda known: abs(len(known) - len(item_id)))
    nearest = difflib.get_close_matches(item_id, candidates, n=3, cutoff=0)
    return f"item: {item_id!r} is not in the catalogue; the nearest known ids are {', '.join(map(repr, nearest))}"


def check_unique(ids: Sequence[str], where: str) -> None:
    """Raises `ValueError` naming `where`, the ID and both rows, if one appears twice."""
    first: dict[str, int] = {}
    for row, identifier in enumerate(ids):
        if identifier in first:
            raise ValueError(
                f"{where}: {identifier!r} appears twice, in rows {first[identifier] + 1} and {row + 1} "
                "(counted from 1); keep one of them"
            )
        first[identifier] = row


def check_finite(values: np.ndarray, where: str) -> None:
    """Raises `ValueError` naming `where` and the first row that holds NaN or infinity."""
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise ValueError(
            f"{where}: row {bad.argmax() + 1} (counted from 1) holds NaN or infinity; "
            "leave the item out where its features are unknown"
        )
