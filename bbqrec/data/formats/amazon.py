"""Amazon reviews of 2014, 2018 and 2023, as downloaded: JSON lines, `.json` or `.jsonl`, with or without `.gz`.

    reviews      `reviewerID` or `user_id`, `asin` and maybe `parent_asin`, `unixReviewTime` (seconds) or `timestamp`
                 (milliseconds), a line a review
    metadata     optional: `asin` or `parent_asin`, and `title`, `brand` or `store`, `category` or `categories`,
                 `feature` or `features`, `description`, a line an item

The first line of a file says which of the two it is. Every review is an interaction, whatever its stars and however
few the user or the item has: for the 5-core data set give the 5-core file. Items are those reviewed, in order of
appearance; where reviews have a `parent_asin` (2023) it is the item. Metadata of other items is not read, items without
metadata have no texts, and of several lines for one item the first counts. Times become seconds, after sorting.
"""

from __future__ import annotations

import ast
import codecs
import gzip
import html
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import polars as pl

from bbqrec.data.dataset import Dataset, Histories
from bbqrec.data.files import one_line, panics_raised
from bbqrec.data.formats.tables import Table, encode

LAYOUT = "reviews as .json or .jsonl, also .gz (Amazon 2014, 2018, 2023)"
BLOCK_BYTES = 1 << 26
LONGEST_LINE = 1 << 26  # bytes: a packed file of a megabyte may unpack to a line of a gigabyte
DEEPEST_TEXT = 8  # lists in lists
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
USERS, ITEMS, TIMES = ("user_id", "reviewerID"), ("parent_asin", "asin"), ("timestamp", "unixReviewTime")
TEXTS = {
    "title": ("title",),
    "brand": ("brand", "store"),
    "categories": ("categories", "category"),
    "details": ("features", "feature"),
    "description": ("description",),
}


def detect(folder: Path) -> bool:
    return any(path.name.endswith(SUFFIXES) and _kind(path) == "reviews" for path in folder.iterdir())


def read(folder: Path) -> Dataset:
    """Reads the format of this module. Raises `ValueError` naming the file and the line of the first fault."""
    kinds: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES)):
        kind = _kind(path)
        if kind in kinds:
            raise ValueError(f"data: {folder} holds {kinds[kind].name} and {path.name}, both {kind}; keep one of them")
        if kind is not None:
            kinds[kind] = path
    reviews, in_milliseconds = _read_reviews(kinds["reviews"])
    users, user_ids = encode(reviews["user"])
    items, item_ids = encode(reviews["item"])
    times = reviews.timestamps("timestamp")
    histories = Histories.from_interactions(users, items, times, len(user_ids))
    if in_milliseconds:
        histories = replace(histories, timestamps=histories.timestamps // 1000)
    return Dataset(
        name=kinds["reviews"].name.partition(".json")[0],
        item_ids=item_ids,
        user_ids=user_ids,
        histories=histories,
        texts=_read_texts(kinds["metadata"], item_ids) if "metadata" in kinds else {},
        path=folder,
    )


def _read_reviews(path: Path) -> tuple[Table, bool]:
    """Columns `user`, `item` and maybe `timestamp`, and whether times are in milliseconds."""
    _, first = next(_records(path))
    keys = {
        column: next((key for key in names if key in first), None)
        for column, names in (("user", USERS), ("item", ITEMS), ("timestamp", TIMES))
    }
    kinds = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    schema = {key: kinds[column] for column, key in keys.items() if key is not None}
    try:
        with panics_raised():
            frame = pl.concat([pl.read_ndjson(block, schema=schema) for block in _blocks(path)])
    except pl.exceptions.PolarsError as error:
        for line, record in _records(path):  # says which line, if it is no JSON at all
            value = record.get(keys["timestamp"], 0)
            if not isinstance(value, int):
                raise ValueError(
                    f"{path}: line {line} has {keys['timestamp']} {value!r}, expected a whole number"
                ) from None
        raise ValueError(f"{path}: cannot be read ({one_line(error)}); download it again") from None
    # Its errors count rows: empty lines are none.
    table = Table(frame.rename({key: column for column, key in keys.items() if key is not None}), path)
    return table.with_ids("user", "item"), keys["timestamp"] == "timestamp"


def _read_texts(path: Path, item_ids: list[str]) -> dict[str, list[str]]:
    wanted, found = set(item_ids), {}
    for line, record in _records(path):
        item = next((record[key] for key in ITEMS if record.get(key)), None)
        if not isinstance(item, str):
            raise ValueError(f"{path}: line {line} names no item, expected {' or '.join(ITEMS)}")
        if item in wanted and item not in found:
            found[item] = {
                column: next((_text(record[name]) for name in names if record.get(name)), "")
                for column, names in TEXTS.items()
            }
    if not found:
        raise ValueError(
            f"{path}: describes no item that the reviews name, e.g. {item_ids[0]!r}; give that of the same data"
        )
    texts = {column: [found[item][column] if item in found else "" for item in item_ids] for column in TEXTS}
    return {column: values for column, values in texts.items() if any(values)}


def _text(value: object, depth: int = 0) -> str:
    """Lists, also of lists, as words with commas between; entities such as &amp; as what they stand for."""
    if isinstance(value, list):
        texts = (_text(part, depth + 1) for part in value) if depth < DEEPEST_TEXT else ()
        return ", ".join(text for text in texts if text)
    if not isinstance(value, str):
        return ""
    with suppress(ValueError):  # a number of thousands of digits
        value = html.unescape(value)
    # JSON can name half of a character, which no file can hold
    return " ".join(value.encode(errors="replace").decode().split())


def _kind(path: Path) -> str | None:
    """`"reviews"`, `"metadata"`, or None for another file."""
    try:
        _, first = next(_records(path))
    except ValueError:
        return "metadata" if path.name.startswith("meta_") else None  # the reader says what is wrong with it
    if not any(key in first for key in ITEMS):
        return None
    return "reviews" if any(key in first for key in USERS) else "metadata"


def _records(path: Path) -> Iterator[tuple[int, dict]]:
    """Number (from 1) and content of each line. Raises `ValueError` where a line is no object, or there is no line."""
    empty = True
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: _line(file, path), b""), 1):
            if line.strip():
                empty = False
                yield number, _object(line, path, number)
    if empty:
        raise ValueError(f"{path}: has no lines, expected at least one")


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines, in blocks: review texts may not fit into memory."""
    with _open(path) as file:
        while block := file.read(BLOCK_BYTES):
            yield (block + _line(file, path)).removeprefix(codecs.BOM_UTF8)


def _line(file: IO[bytes], path: Path) -> bytes:
    line = file.readline(LONGEST_LINE)
    if len(line) == LONGEST_LINE:
        raise ValueError(f"{path}: has a line of more than {LONGEST_LINE >> 20} MB; download the file again")
    return line


def _object(line: bytes, path: Path, number: int) -> dict:
    for parse in (json.loads, _literal):
        try:
            value = parse(line)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all of them of broken text
            continue
        if isinstance(value, dict):
            return value
        break
    raise ValueError(f"{path}: line {number} is no JSON object; download the file again")


def _literal(line: bytes) -> object:
    """Metadata of 2014 is written as Python, with single quotes. Nothing in it is run."""
    return ast.literal_eval(line.decode())


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: is no whole gzip file ({error}); download it again") from None
