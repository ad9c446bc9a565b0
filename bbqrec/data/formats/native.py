"""bbqrec's own format.

    interactions.parquet|csv         columns `user`, `item` and, optionally, `timestamp`: a number, or a date, which
                                     becomes seconds since 1970. Without it, and for equal times, rows are oldest first.
    items.parquet|csv                optional: `item`, and any text columns; `title` is what people see. It fixes the
                                     catalogue and its order, items without interaction included. Without it the items
                                     are those of the interactions, in order of appearance.
    features/<modality>.npy          `(rows, width)` numbers, with
    features/<modality>.items.txt    the item of each row, one a line. Items without a row lack the modality; rows of
                                     items that are not in the catalogue are left out.

Other columns are not read. In CSV every column of the items counts as text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from bbqrec.data.dataset import Dataset, Features, Histories, check_finite, check_unique

LAYOUT = "interactions.parquet or interactions.csv (columns user, item, timestamp)"


def detect(folder: Path) -> bool:
    return _table(folder, "interactions") is not None


def read(folder: Path) -> Dataset:
    """Reads the format of this module. Raises `ValueError` naming the file and the row of the first fault."""
    interactions_path, items_path = _table(folder, "interactions"), _table(folder, "items")
    interactions = _read_table(interactions_path, ("user", "item"))
    users, user_ids = _encode(interactions["user"])
    if items_path is None:
        items, item_ids = _encode(interactions["item"])
        texts = {}
    else:
        table = _read_table(items_path, ("item",))
        item_ids = table["item"].to_list()
        check_unique(item_ids, str(items_path))
        columns = [c for c in table.columns if c != "item" and table[c].dtype == pl.String]
        texts = {c: table[c].fill_null("").to_list() for c in columns}
        items = _known(interactions["item"], item_ids, interactions_path, items_path)
    return Dataset(
        name=folder.resolve().name,
        item_ids=item_ids,
        user_ids=user_ids,
        histories=Histories.from_interactions(
            users, items, _timestamps(interactions, interactions_path), len(user_ids)
        ),
        features={path.stem: _read_features(path, item_ids) for path in sorted(folder.glob("features/*.npy"))},
        texts=texts,
        path=folder,
    )


def write(data: Dataset, folder: Path) -> None:
    """Writes `data` so that `read` gives it back. Raises `ValueError` if `folder` is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: {folder} is not empty; give a new one")
    (folder / "features").mkdir(parents=True, exist_ok=True)
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
            np.save(folder / "features" / f"{name}.npy", feature.values[feature.present])
            names = [item_id for item_id, present in zip(data.item_ids, feature.present, strict=True) if present]
            (folder / "features" / f"{name}.items.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def _table(folder: Path, name: str) -> Path | None:
    paths = [folder / f"{name}.{kind}" for kind in ("parquet", "csv")]
    return next((path for path in paths if path.is_file()), None)


def _read_table(path: Path, required: tuple[str, ...]) -> pl.DataFrame:
    """A table with the `required` columns as strings, none of them empty."""
    try:
        # everything in a CSV file is text first, so that an ID such as 007 stays what it is
        table = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); write the file again") from None
    for name in required:
        if name not in table.columns:
            raise ValueError(f"{path}: got columns {', '.join(table.columns)}, expected a column {name!r}")
        column = table[name].cast(pl.String)
        empty = (column.is_null() | (column == "")).fill_null(True)
        if empty.any():
            raise ValueError(f"{path}: column {name!r} is empty in row {empty.arg_max() + 1} (counted from 1)")
        table = table.with_columns(column)
    if not len(table):
        raise ValueError(f"{path}: has no rows, expected at least one")
    return table


def _encode(column: pl.Series) -> tuple[np.ndarray, list[str]]:
    """Indices in order of appearance, and the names they stand for."""
    names = column.unique(maintain_order=True)
    return _positions(column, names.to_list()), names.to_list()


def _known(column: pl.Series, item_ids: list[str], path: Path, items_path: Path) -> np.ndarray:
    positions = _positions(column, item_ids)
    if (positions < 0).any():
        row = int((positions < 0).argmax())
        raise ValueError(
            f"{path}: row {row + 1} (counted from 1) has item {column[row]!r}, which {items_path.name} does not list; "
            "add it there"
        )
    return positions


def _positions(column: pl.Series, names: list[str]) -> np.ndarray:
    """Index of each value among `names`, -1 where it is not one of them."""
    positions = {name: i for i, name in enumerate(names)}
    return np.fromiter((positions.get(value, -1) for value in column), np.int64, len(column))


def _timestamps(table: pl.DataFrame, path: Path) -> np.ndarray | None:
    if "timestamp" not in table.columns:
        return None
    column = table["timestamp"]
    if column.dtype.is_temporal():
        parsed = column.cast(pl.Datetime("us")).dt.epoch("s")
    elif column.dtype == pl.String:
        parsed = _parse_timestamps(column)
    elif column.dtype.is_numeric():
        parsed = column.cast(pl.Int64, strict=False)
    else:
        raise TypeError(f"{path}: column 'timestamp' is of {column.dtype}, expected numbers or dates")
    if parsed.has_nulls():
        row = parsed.is_null().arg_max()
        raise ValueError(
            f"{path}: row {row + 1} (counted from 1) has timestamp {column[row]!r}, expected a number or a date"
        )
    return parsed.to_numpy().copy()


def _parse_timestamps(column: pl.Series) -> pl.Series:
    """Whole numbers, decimals or dates, whichever fits more of the column; null where it does not."""
    whole = column.cast(pl.Int64, strict=False)
    decimals = column.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False)
    try:
        dates = column.str.to_datetime(strict=False, time_unit="us").dt.epoch("s")
    except pl.exceptions.ComputeError:  # nothing looks like a date
        return min(whole, decimals, key=pl.Series.null_count)
    return min(whole, decimals, dates, key=pl.Series.null_count)


def _read_features(path: Path, item_ids: list[str]) -> Features:
    names_path = path.with_suffix(".items.txt")
    if not names_path.is_file():
        raise ValueError(f"{path}: {names_path.name} is missing beside it; it names the item of each row, one a line")
    names = names_path.read_text(encoding="utf-8").splitlines()
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: is no NumPy array of numbers ({error}); write it with numpy.save") from None
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.shape[1]:
        raise ValueError(f"{path}: got {values.dtype} of shape {values.shape}, expected numbers of shape (rows, width)")
    if len(values) != len(names):
        raise ValueError(
            f"{path}: got {len(values)} rows, expected {len(names)} (one for each line of {names_path.name})"
        )
    values = values.astype(np.float32)
    check_finite(values, str(path))
    check_unique(names, str(names_path))
    positions = _positions(pl.Series(names, dtype=pl.String), item_ids)
    in_catalogue = positions >= 0
    if not in_catalogue.any():
        raise ValueError(f"{names_path}: names no item of this data set, e.g. {names[:1]} against {item_ids[:1]}")
    return Features.of_items(values[in_catalogue], positions[in_catalogue], len(item_ids))
