"""Tables that know the file they came from, so that every fault in them names the file and the line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from bbqrec.data.files import one_line, panics_raised

BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one file.

    Attributes:
        frame: the rows.
        path: the file.
        first_line: number of the line that the first row stands on; None where rows are no lines (Parquet, CSV).
    """

    frame: pl.DataFrame
    path: Path
    first_line: int | None = None

    def __post_init__(self) -> None:
        if not len(self.frame):
            below = " below its header" if self.first_line == 2 else ""
            raise ValueError(
                f"{self.path}: has no {'rows' if self.first_line is None else 'lines'}{below}, expected at least one"
            )

    @property
    def columns(self) -> list[str]:
        return self.frame.columns

    def __getitem__(self, name: str) -> pl.Series:
        return self.frame[name]

    def place(self, row: int) -> str:
        """How an error calls row `row` (from 0)."""
        return f"row {row + 1} (counted from 1)" if self.first_line is None else f"line {row + self.first_line}"

    def with_ids(self, *names: str) -> Table:
        """The same table with these columns as strings.

        Raises `ValueError` if one is missing or empty in a row, `TypeError` if it has no strings and no numbers.
        """
        frame = self.frame
        for name in names:
            if name not in self.columns:
                raise ValueError(f"{self.path}: got columns {listed(self.columns)}, expected a column {name!r}")
            column = self._strings(frame[name])
            empty = (column.is_null() | (column == "")).fill_null(True)
            if empty.any():
                raise ValueError(f"{self.path}: column {name!r} is empty in {self.place(empty.arg_max())}")
            frame = frame.with_columns(column)
        return replace(self, frame=frame)

    def _strings(self, column: pl.Series) -> pl.Series:
        try:
            if not (column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object)):
                with panics_raised():
                    return column.cast(pl.String)
        except pl.exceptions.PolarsError:  # a date that no calendar has
            pass
        raise TypeError(f"{self.path}: column {column.name!r} is of {column.dtype}, expected strings or numbers")

    def listed(self, name: str, ids: Sequence[str], listed_in: str) -> np.ndarray:
        """`(rows,)` int64, index of each value of a column among `ids`. Raises `ValueError` if one is not there."""
        found = positions(self[name], ids)
        if (found < 0).any():
            row = int((found < 0).argmax())
            raise ValueError(
                f"{self.path}: {self.place(row)} has item {self[name][row]!r}, which {listed_in} does not list; "
                "add it there"
            )
        return found

    def timestamps(self, name: str) -> np.ndarray | None:
        """`(rows,)` int64, float64 or datetime64, for `Histories.from_interactions`; None without such a column.

        Raises `ValueError` where a row has neither a number nor a date, `TypeError` for a column of another kind.
        """
        if name not in self.columns:
            return None
        column = self[name]
        if column.dtype == pl.String:
            parsed = _int64(column)
            if parsed.has_nulls():  # looking for dates takes longest
                parsed = min(parsed, _float64(column), _dates(column), key=pl.Series.null_count)
        elif column.dtype in (pl.Date, pl.Datetime):
            parsed = column.cast(pl.Datetime("us"), strict=False) if column.dtype == pl.Date else column
        elif column.dtype.is_numeric():
            parsed = _int64(column) if column.dtype.is_integer() else _float64(column)
        else:
            raise TypeError(f"{self.path}: column {name!r} is of {column.dtype}, expected numbers or dates")
        if parsed.has_nulls():
            row = parsed.is_null().arg_max()
            raise ValueError(
                f"{self.path}: {self.place(row)} has timestamp {_shown(column, row)}, expected a number or a date"
            )
        if isinstance(parsed.dtype, pl.Datetime) and parsed.dtype.time_zone is not None:
            parsed = parsed.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return parsed.to_numpy().copy()


def read_separated(
    path: Path, separator: str, columns: Sequence[str] | None = None, used: Sequence[str] | None = None
) -> Table:
    """A text file with a row a line, all columns as strings; quotes mean nothing in it.

    Args:
        path: the file, in UTF-8, otherwise in Latin-1.
        separator: between columns; of any length.
        columns: their names; by default the first line says them.
        used: those to keep; by default all.

    Raises `ValueError` if there are no rows, if a line has another number of columns than the others should have, or if
    two columns have one name.
    """
    first_line, frames = 1, []
    line = 1  # that the next block starts on
    for lines in _blocks(path):
        if columns is None:
            columns = lines[0].split(separator)
            first_line, line, lines = 2, 2, lines.slice(1)
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path}: two columns have the same name, got {listed(columns)}")
        counts = lines.str.count_matches(separator, literal=True) + 1
        wrong = counts != len(columns)
        if wrong.any():
            row = wrong.arg_max()
            raise ValueError(
                f"{path}: line {row + line} has {counts[row]} columns, expected {len(columns)} ({separator!r} between)"
            )
        fields = lines.str.split_exact(separator, len(columns) - 1).struct.rename_fields(list(columns))
        frame = fields.struct.unnest()
        frames.append(frame if used is None else frame.select(used))
        line += len(lines)
    if not frames:
        first_line = 1 if columns else 2  # nothing, not even a header
        frames = [pl.DataFrame(schema=dict.fromkeys(used or columns or [""], pl.String))]
    return Table(pl.concat(frames), path, first_line)


def read_lines(path: Path) -> pl.Series:
    """The lines of a text file in UTF-8, otherwise in Latin-1, without the empty ones at its end."""
    return pl.concat([pl.Series([], dtype=pl.String), *_blocks(path)])


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark. Raises `ValueError` if it is not in UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 (byte {error.start}); save it in that encoding") from None


def _blocks(path: Path) -> Iterator[pl.Series]:
    """As `read_lines`, in blocks: what is made of a block is smaller than the text around it."""
    encoding, empty = _encoding(path), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES) + file.readline():
            text = block.decode(encoding).replace("\r\n", "\n")
            encoding = encoding.removesuffix("-sig")  # such a mark is at the start of a file
            kept = text.rstrip("\n")
            if not kept:
                empty += len(text)
                continue
            lines = pl.Series([kept], dtype=pl.String).str.split("\n").explode()
            yield pl.concat([pl.Series([""] * empty, dtype=pl.String), lines])
            empty = max(0, len(text) - len(kept) - 1)  # at the end of the file, or before another block


def _encoding(path: Path) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while block := file.read(BLOCK_BYTES):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8-sig"


def listed(names: Sequence[str]) -> str:
    """Names for a message."""
    return one_line(", ".join(names))


def encode(column: pl.Series) -> tuple[np.ndarray, list[str]]:
    """Indices in order of appearance, and the names they stand for."""
    names = column.unique(maintain_order=True)
    return positions(column, names.to_list()), names.to_list()


def positions(column: pl.Series, names: Sequence[str]) -> np.ndarray:
    """Index of each value among `names`, which are distinct; -1 where it is not one of them."""
    index = pl.Series(range(len(names)), dtype=pl.Int64)
    found = column.replace_strict(pl.Series(names, dtype=pl.String), index, default=-1, return_dtype=pl.Int64)
    return found.to_numpy().copy()


def _shown(column: pl.Series, row: int) -> str:
    try:
        with panics_raised():
            return repr(column[row])
    except (pl.exceptions.PolarsError, ValueError, OverflowError):
        return "out of range"


# Null where a value is none of the kind:


def _int64(column: pl.Series) -> pl.Series:
    return column.cast(pl.Int64, strict=False)


def _float64(column: pl.Series) -> pl.Series:
    numbers = column.cast(pl.Float64, strict=False)
    return numbers.set(~(numbers.abs() < 2.0**63).fill_null(False), None)  # what int64 does not hold is no time


def _dates(column: pl.Series) -> pl.Series:
    try:
        return column.str.to_datetime(strict=False, time_unit="us")
    except pl.exceptions.ComputeError:  # nothing looks like a date
        return pl.Series([None] * len(column), dtype=pl.Datetime("us"))
