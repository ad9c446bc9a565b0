"""Folders of UniSRec and MISSRec, which VQ-Rec, DeCoRec and others use too.

    <name>.item2index    item ID, tab, index; indices count from 0
    <name>.test.inter    header, then user, tab, history (space separated indices, oldest first), tab, test item
    <name>.text          optional: header, then item ID, tab, "title. categories. brand."
    <name>.feat1CLS, <name>.feat3CLS    optional: features of text and image, raw little-endian float32, a row an item

The history of the test file plus its test item is what a user did: `.train.inter` and `.valid.inter` hold prefixes of
it and are not read. Who made the folder may have cut histories, as UniSRec does at the latest 50 items: what was before
is neither trained on nor left out of the candidates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bbqrec.data.dataset import Dataset, Features, Histories, check_finite, check_unique
from bbqrec.data.formats.tables import read_utf8

LAYOUT = "<name>.item2index beside <name>.test.inter (UniSRec)"
LONGEST_INDEX = 18  # digits
MODALITIES = {"text": "feat1CLS", "image": "feat3CLS"}


def detect(folder: Path) -> bool:
    return any(folder.glob("*.item2index"))


def read(folder: Path) -> Dataset:
    """Reads the format of this module. Raises `ValueError` naming the file and the line of the first fault."""
    first, *others = sorted(folder.glob("*.item2index"))
    if others:
        raise ValueError(f"data: {folder} holds {first.name} and {others[0].name}; keep one data set in a folder")
    item_ids = _read_items(first)
    user_ids, histories = _read_histories(first.with_suffix(".test.inter"), len(item_ids))
    paths = {name: first.with_suffix(f".{suffix}") for name, suffix in MODALITIES.items()}
    text_path = first.with_suffix(".text")
    return Dataset(
        name=f"{first.stem} ({folder.resolve().name})",
        item_ids=item_ids,
        user_ids=user_ids,
        histories=histories,
        features={name: _read_features(path, len(item_ids)) for name, path in paths.items() if path.is_file()},
        texts=_read_texts(text_path, item_ids) if text_path.is_file() else {},
        path=folder,
    )


def _read_items(path: Path) -> list[str]:
    by_index = {}
    for line, (item_id, index) in _rows(path, 2, header=False):
        if _index(index, path, line) in by_index:
            raise ValueError(f"{path}: line {line} has index {index}, which an earlier line has as well")
        by_index[int(index)] = item_id
    missing = set(range(len(by_index))) - set(by_index)
    if missing:
        raise ValueError(f"{path}: no item has index {min(missing)}, expected 0 to {len(by_index) - 1}, each once")
    item_ids = [by_index[i] for i in range(len(by_index))]
    check_unique(item_ids, str(path))
    return item_ids


def _read_histories(path: Path, n_items: int) -> tuple[list[str], Histories]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; it holds the histories")
    user_ids, sequences = [], []
    for line, (user, history, target) in _rows(path, 3):
        items = [_index(text, path, line) for text in (*history.split(), target)]
        if max(items) >= n_items:
            raise ValueError(f"{path}: line {line} has item {max(items)}, expected one below {n_items} (item2index)")
        user_ids.append(user)
        sequences.append(items)
    check_unique(user_ids, str(path))
    return user_ids, Histories.from_lists(sequences)


def _read_texts(path: Path, item_ids: list[str]) -> dict[str, list[str]]:
    known, by_item = set(item_ids), {}
    for line, (item_id, text) in _rows(path, 2):
        if item_id not in known:
            raise ValueError(f"{path}: line {line} has item {item_id!r}, which item2index does not list")
        if item_id in by_item:
            raise ValueError(f"{path}: line {line} has item {item_id!r}, which an earlier line has as well")
        by_item[item_id] = text.strip().partition(". ")
    parts = [by_item.get(item_id, ("", "", "")) for item_id in item_ids]
    return {"title": [title for title, _, _ in parts], "details": [details for _, _, details in parts]}


def _read_features(path: Path, n_items: int) -> Features:
    size = path.stat().st_size
    if not size or size % (4 * n_items):
        raise ValueError(f"{path}: got {size} bytes, expected a multiple of 4 x {n_items} (float32, a row an item)")
    values = np.fromfile(path, "<f4").reshape(n_items, -1).astype(np.float32)
    check_finite(values, str(path))
    return Features(values, np.ones(n_items, bool))


def _rows(path: Path, n_columns: int, header: bool = True):
    """Line number (from 1) and columns of each line below the header."""
    lines = read_utf8(path).split("\n")  # splitlines() would also break at U+2028 inside a text
    if not any(lines[header:]):
        raise ValueError(f"{path}: has no lines{' below its header' if header else ''}, expected at least one")
    for number, line in enumerate(lines[header:], 1 + header):
        if line:
            columns = line.rstrip("\r").split("\t")
            if len(columns) != n_columns:
                raise ValueError(
                    f"{path}: line {number} has {len(columns)} columns, expected {n_columns} (tabs between)"
                )
            yield number, columns


def _index(text: str, path: Path, line: int) -> int:
    if not text.isdecimal() or len(text) > LONGEST_INDEX:
        raise ValueError(f"{path}: line {line} has {text[:60]!r} where an index is expected (0, 1, 2, ...)")
    return int(text)
