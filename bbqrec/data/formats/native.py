"""bbqrec's own format.

    interactions.parquet|csv         columns `user`, `item` and, optionally, `timestamp`: a number, or a date, which
                                     becomes seconds since 1970. Fractions count for the order, and are not kept.
                                     Without times, and for equal ones, rows are oldest first.
    items.parquet|csv                optional: `item`, and any text columns; `title` is what people see. It fixes the
                                     catalogue and its order, items without interaction included. Without it the items
                                     are those of the interactions, in order of appearance. Categories are texts, and
                                     lists of texts are joined by commas.
    features/<modality>.npy          `(rows, width)` numbers, with
    features/<modality>.items.txt    the item of each row, one a line (UTF-8). Items without a row lack the modality;
                                     rows of items that are not in the catalogue are left out, if they are not most.

Other columns are not read. In CSV every column of the items counts as text.
"""

from __future__ import annotations

import tokenize
from pathlib import Path

import numpy as np
import polars as pl

from bbqrec.data.dataset import Dataset, Features, Histories, check_finite, check_unique
from bbqrec.data.files import Sink, folder_atomically, one_line, panics_raised, read_parquet
from bbqrec.data.formats.tables import Table, encode, positions, read_utf8

LAYOUT = "interactions.parquet or interactions.csv (columns user, item, timestamp)"


def detect(folder: Path) -> bool:
    return _table(folder, "interactions") is not None


def read(folder: Path) -> Dataset:
    """Reads the format of this module. Raises `ValueError` naming the file and the row of the first fault."""
    interactions = _read_table(_table(folder, "interactions"), ("user", "item"))
    users, user_ids = encode(interactions["user"])
    items_path = _table(folder, "items")
    if items_path is None:
        items, item_ids = encode(interactions["item"])
        texts = {}
    else:
        item_ids, texts = read_items(items_path)
        items = interactions.listed("item", item_ids, items_path.name)
    return Dataset(
        name=folder.resolve().name,
        item_ids=item_ids,
        user_ids=user_ids,
        histories=Histories.from_interactions(users, items, interactions.timestamps("timestamp"), len(user_ids)),
        features=read_features(folder, item_ids),
        texts=texts,
        path=folder,
    )


def items_file(folder: Path) -> Path:
    """`items.parquet|csv` of a folder, which need not hold interactions. Raises `ValueError` where there is none."""
    path = _table(folder, "items")
    if path is None:
        raise ValueError(
            f"data: {folder} holds no items.parquet or items.csv (columns item and texts); of another format, "
            f"`bbqrec import {folder} NEW` makes a folder with one"
        )
    return path


def read_items(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the items of a table, and their texts by column."""
    table = _read_table(path, ("item",))
    item_ids = table["item"].to_list()
    check_unique(item_ids, str(path))
    texts = {c: _texts(table[c]) for c in table.columns if c != "item"}
    return item_ids, {c: column.fill_null("").to_list() for c, column in texts.items() if column is not None}


def _texts(column: pl.Series) -> pl.Series | None:
    """A column of strings, of categories, or of lists of either, as strings; None for one of another kind."""
    if isinstance(column.dtype, (pl.Categorical, pl.Enum)):
        return column.cast(pl.String)
    if isinstance(column.dtype, pl.List) and isinstance(column.dtype.inner, (pl.String, pl.Categorical, pl.Enum)):
        return column.cast(pl.List(pl.String)).list.join(", ", ignore_nulls=True)
    return column if column.dtype == pl.String else None


def check_lines(item_ids: list[str]) -> None:
    """Raises `ValueError` where an item has a newline in its name: features name their items one a line."""
    for row, item_id in enumerate(item_ids):
        if "\n" in item_id or "\r" in item_id:
            raise ValueError(f"item_ids: {item_id!r} in row {row + 1} (counted from 1) has a newline; rename the item")


def read_features(folder: Path, item_ids: list[str]) -> dict[str, Features]:
    """Every `features/<modality>.npy`, by modality."""
    return {path.stem: _read_features(path, item_ids) for path in sorted(folder.glob("features/*.npy"))}


def write(data: Dataset, folder: Path) -> None:
    """Writes `data` so that `read` gives it back, but for users without interactions, wholly or not at all.

    Raises `ValueError` as `Dataset.save` says.
    """
    check_lines(data.item_ids)
    if "item" in data.texts:
        raise ValueError("texts: got a column 'item', which is where the names of items are written; rename it")
    for name in data.features:  # it becomes the name of a file
        if not name or name.startswith(".") or any(mark in name for mark in "/\\\0"):
            raise ValueError(f"features: got the name {name!r}, expected one without slashes and a dot at its start")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file, expected a folder; give a new name")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: {folder} is not empty; give a new one")
    folder_atomically(folder, lambda whole: _write_files(data, whole))


def _write_files(data: Dataset, folder: Path) -> None:
    (folder / "features").mkdir(parents=True)
    histories = data.histories
    rows = {
        "user": np.array(data.user_ids, object)[np.repeat(np.arange(data.n_users), histories.lengths)],
        "item": np.array(data.item_ids, object)[histories.items],
    }
    if histories.timestamps is not None:
        rows["timestamp"] = histories.timestamps
    pl.DataFrame(rows).write_parquet(folder / "interactions.parquet")
    pl.DataFrame({"item": data.item_ids, **data.texts}).write_parquet(folder / "items.parquet")
    for name, feature in data.features.items():
        if not feature.derived:
            with Sink(folder / "features" / f"{name}.npy") as file:
                np.save(file, feature.values[feature.present])
            names = [item_id for item_id, present in zip(data.item_ids, feature.present, strict=True) if present]
            text = "".join(f"{item_id}\n" for item_id in names)
            (folder / "features" / f"{name}.items.txt").write_text(text, encoding="utf-8", newline="\n")


def _table(folder: Path, name: str) -> Path | None:
    paths = [path for kind in ("parquet", "csv") if (path := folder / f"{name}.{kind}").is_file()]
    if len(paths) > 1:
        raise ValueError(f"data: {folder} holds {paths[0].name} and {paths[1].name}; keep one of them")
    return paths[0] if paths else None


def _read_table(path: Path, required: tuple[str, ...]) -> Table:
    """A table with the `required` columns as strings, none of them empty."""
    try:
        # everything in a CSV file is text first, so that an ID such as 007 stays what it is
        if path.suffix == ".parquet":
            frame = read_parquet(path)
        else:
            with panics_raised():
                frame = pl.read_csv(path, infer_schema=False, glob=False)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)}); write the file again") from None
    return Table(frame, path).with_ids(*required)


def _read_features(path: Path, item_ids: list[str]) -> Features:
    names_path = path.with_suffix(".items.txt")
    if not names_path.is_file():
        raise ValueError(f"{path}: {names_path.name} is missing beside it; it names the item of each row, one a line")
    names = _read_lines(names_path)
    try:
        # mapped, a header that claims more than the file has is refused before anything is allocated
        with np.errstate(over="ignore"):  # of the size that it claims
            values = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OverflowError, SyntaxError, tokenize.TokenError) as error:  # NumPy parses the header
        raise ValueError(
            f"{path}: is no NumPy array of numbers ({one_line(error)}); write it with numpy.save"
        ) from None
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.shape[1]:
        raise ValueError(f"{path}: got {values.dtype} of shape {values.shape}, expected numbers of shape (rows, width)")
    if len(values) != len(names):
        raise ValueError(
            f"{path}: got {len(values)} rows, expected {len(names)} (one for each line of {names_path.name})"
        )
    with np.errstate(over="ignore"):  # what float32 does not hold is refused as infinity
        values = np.array(values, np.float32)
    check_finite(values, str(path))
    known = set(item_ids)
    names = [name if name in known else name.strip(" \t") for name in names]
    check_unique(names, str(names_path))
    found = positions(pl.Series(names, dtype=pl.String), item_ids)
    in_catalogue = found >= 0
    if 2 * in_catalogue.sum() < len(names) or not len(names):
        example = f", e.g. {names[in_catalogue.argmin()]!r}" if names else ""
        raise ValueError(
            f"{names_path}: {(~in_catalogue).sum()} of {len(names)} lines name no item of this data set{example}; "
            f"write its items as the data set does, e.g. {item_ids[0]!r}, and leave out rows of other items"
        )
    return Features.of_items(values[in_catalogue], found[in_catalogue], len(item_ids))


def _read_lines(path: Path) -> list[str]:
    """Lines end in a newline only: `str.splitlines` splits at characters that an ID may hold, such as U+2028."""
    text = read_utf8(path).replace("\r\n", "\n").rstrip("\n")
    return text.split("\n") if text else []
