"""Files are written whole or not at all; and what a library says of a broken one is an error."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl


def atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Calls `write` with a temporary name beside `path` and moves the result there: no reader sees half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_parquet(path: Path) -> pl.DataFrame:
    """The table of one file, whatever characters its name has. Raises `PolarsError` where it is broken."""
    with panics_raised():
        return pl.read_parquet(path, glob=False)


@contextmanager
def panics_raised() -> Iterator[None]:
    """Polars panics at some broken values, which no `except Exception` catches: here that is a `ComputeError`."""
    try:
        yield
    except pl.exceptions.PanicException as panic:
        raise pl.exceptions.ComputeError(str(panic)) from None


def one_line(text: object) -> str:
    """For a message: what a library or a file says, without line breaks, and not all of what is long."""
    words = " ".join(str(text).split())
    return words if len(words) <= 200 else f"{words[:200]}..."
