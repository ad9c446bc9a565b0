"""Folders of other projects, read as they are.

A format is one module with `LAYOUT` (what its folders hold, for error messages), `detect(folder) -> bool` and
`read(folder) -> Dataset`. To add one, write the module and name it in `FORMATS`.
"""

from __future__ import annotations

from pathlib import Path

from bbqrec.data.dataset import Dataset
from bbqrec.data.formats import amazon, lines, movielens, native, recbole, unisrec

FORMATS = (native, unisrec, recbole, movielens, lines, amazon)  # UniSRec's folders hold .inter files, too


def read(folder: Path) -> Dataset:
    """Reads `folder` in the first format that knows it. Raises `ValueError` if none does."""
    if not folder.exists():
        raise ValueError(f"data: {folder} does not exist; give the folder of a data set")
    if not folder.is_dir():
        raise ValueError(f"data: {folder} is a file; give the folder of a data set")
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        raise ValueError(f"data: {folder} is empty; give the folder of a data set")
    for format_ in FORMATS:
        if format_.detect(folder):
            return format_.read(folder)
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    known = "; or ".join(format_.LAYOUT for format_ in FORMATS)
    raise ValueError(f"data: {folder} holds {found}, which is no known format; expected {known}")
