"""Lines of item numbers, as SASRec, S3Rec, MQL4GRec and others have them.

    <name>.txt                          `user item item ...`, separated by blanks, oldest first, a line a user; or
                                        `user item` in every line, a line an interaction, oldest first (SASRec)
    items.tsv or <name>_items.tsv       optional: tab separated with a header; the first column is the item's number
                                        in the lines, the others are texts, `title` is what people see
    <name>.item2id                      optional, instead: name of an item, tab, its number in the lines
    *.npz                               optional: codes as features, see `bbqrec.data.formats.codes`; a row an item, in
                                        the order of their numbers

Users and items are whole numbers. Items are named by their number, or, where there is one, by the column `asin` or by
`item2id`, so that features of other folders join them. The table of items fixes the catalogue, items without
interaction included; without it the items are those of the lines. Either way they are in the order of their numbers.
Text files whose first line is not all numbers, and other files, such as `_item2attributes.json`, are not read.
"""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np
import polars as pl

from bbqrec.data.dataset import Dataset, Histories, check_unique
from bbqrec.data.formats.codes import read_codes
from bbqrec.data.formats.tables import Table, encode, read_lines, read_separated

LAYOUT = "<name>.txt with lines of numbers: user item item ... (SASRec, S3Rec)"


def detect(folder: Path) -> bool:
    return bool(_paths(folder))


def read(folder: Path) -> Dataset:
    """Reads the format of this module. Raises `ValueError` naming the file and the line of the first fault."""
    path, *others = _paths(folder)
    if others:
        raise ValueError(f"data: {folder} holds {path.name} and {others[0].name}; keep one data set in a folder")
    user_ids, numbers, offsets, first_lines = _read_histories(path)
    items_path = _only(folder, "items.tsv", f"{path.stem}_items.tsv", f"{path.stem}.item2id")
    if items_path is None:
        catalogue, items = np.unique(numbers, return_inverse=True)
        item_ids, texts = [str(number) for number in catalogue], {}
    else:
        catalogue, item_ids, texts = _read_items(items_path)
        items = np.searchsorted(catalogue, numbers).clip(max=len(catalogue) - 1)
        unknown = catalogue[items] != numbers
        if unknown.any():
            raise ValueError(
                f"{path}: line {first_lines[unknown.argmax()]} has item {numbers[unknown.argmax()]}, which "
                f"{items_path.name} does not list; add it there"
            )
    codes_path = _only(folder, *(path.name for path in folder.glob("*.npz")))
    return Dataset(
        name=f"{path.stem} ({folder.resolve().name})",
        item_ids=item_ids,
        user_ids=user_ids,
        histories=Histories(items.astype(np.int64), offsets),
        features={} if codes_path is None else read_codes(codes_path, len(item_ids)),
        texts=texts,
        path=folder,
    )


def _paths(folder: Path) -> list[Path]:
    """The text files whose first line is all numbers, at least two."""
    return [path for path in sorted(folder.glob("*.txt")) if _is_history(path)]


def _is_history(path: Path) -> bool:
    with path.open("rb") as file:
        tokens = file.readline().removeprefix(codecs.BOM_UTF8).split()
    return len(tokens) > 1 and all(token.isdigit() for token in tokens)


def _only(folder: Path, *names: str) -> Path | None:
    found = [folder / name for name in sorted(set(names)) if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"data: {folder} holds {found[0].name} and {found[1].name}; keep the one that counts")
    return found[0] if found else None


def _read_histories(path: Path) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """User IDs, `(T,)` item numbers, `(N + 1,)` offsets, and `(T,)` the line that each item stands on."""
    tokens = read_lines(path).str.extract_all(r"\S+")
    lengths = tokens.list.len().to_numpy().astype(np.int64)
    if lengths.min() < 2:
        line = int(lengths.argmin())
        what = "no item" if lengths[line] else "nothing in it"
        raise ValueError(f"{path}: line {line + 1} has {what}, expected a user and at least one item")
    words = tokens.explode()
    values = _numbers(words, path, np.repeat(np.arange(1, len(lengths) + 1), lengths))
    starts = np.cumsum(lengths) - lengths
    items = np.delete(values, starts)
    lines = np.repeat(np.arange(1, len(lengths) + 1), lengths - 1)
    users, user_ids = encode(pl.Series(values[starts]).cast(pl.String))
    if (lengths == 2).all():  # a line an interaction
        lines = lines[np.argsort(users, kind="stable")]
        histories = Histories.from_interactions(users, items, None, len(user_ids))
        return user_ids, histories.items, histories.offsets, lines
    if len(user_ids) < len(users):
        again = int((users != np.arange(len(users))).argmax())  # indices are in order of appearance
        raise ValueError(
            f"{path}: line {again + 1} has user {user_ids[users[again]]}, which line {users[again] + 1} has as well; "
            "write all a user did in one line"
        )
    return user_ids, items, np.append(0, np.cumsum(lengths - 1)), lines


def _read_items(path: Path) -> tuple[np.ndarray, list[str], dict[str, list[str]]]:
    """Numbers of the items in ascending order, their names and texts."""
    if path.suffix == ".item2id":
        table = read_separated(path, "\t", ("asin", "number"))
        number = "number"
    else:
        table = read_separated(path, "\t")
        number = table.columns[0]
    name = "asin" if "asin" in table.columns else number
    table = table.with_ids(number, name)
    numbers = _numbers(table[number], path, np.arange(len(table.frame)) + table.first_line)
    _check_once(numbers, table)
    check_unique(table[name].to_list(), str(path))
    order = np.argsort(numbers)
    item_ids = [str(n) for n in numbers[order]] if name == number else table[name].gather(order).to_list()
    texts = {c: table[c].gather(order).to_list() for c in table.columns if c not in (number, name)}
    return numbers[order], item_ids, texts


def _check_once(numbers: np.ndarray, table: Table) -> None:
    again = np.setdiff1d(np.arange(len(numbers)), np.unique(numbers, return_index=True)[1])
    if len(again):
        raise ValueError(f"{table.path}: {table.place(again[0])} has item {numbers[again[0]]}, as an earlier line has")


def _numbers(words: pl.Series, path: Path, lines: np.ndarray) -> np.ndarray:
    """`(len(words),)` int64. Raises `ValueError` with the line of the first word that is no number from 0."""
    values = words.cast(pl.Int64, strict=False).fill_null(-1).to_numpy()
    if values.min() < 0:
        bad = int((values < 0).argmax())
        raise ValueError(f"{path}: line {lines[bad]} has {words[bad]!r} where a number is expected (0, 1, 2, ...)")
    return values
