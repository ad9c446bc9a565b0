"""RecBole atomic files.

    <name>.inter    tab separated; `user_id:token`, `item_id:token` and, optionally, `timestamp:float`, a row an
                    interaction. Without times, and for equal ones, rows are oldest first.
    <name>.item     optional: `item_id:token` and columns of any type. It fixes the catalogue and its order, items
                    without interaction included. Without it the items are those of the interactions.

Columns of type `token` and `token_seq` in the items are texts; the first one called `title`, or ending in `_title`, is
the title. Other columns, `.user` and other files are not read, and no rating is left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bbqrec.data.dataset import Dataset, Histories, check_unique
from bbqrec.data.formats.tables import Table, encode, listed, read_separated

LAYOUT = "<name>.inter with a header such as user_id:token (RecBole)"
TYPES = ("token", "token_seq", "float", "float_seq")


def detect(folder: Path) -> bool:
    return any(folder.glob("*.inter"))


def read(folder: Path) -> Dataset:
    """Reads the format of this module. Raises `ValueError` naming the file and the line of the first fault."""
    path, *others = sorted(folder.glob("*.inter"))
    if others:
        raise ValueError(f"data: {folder} holds {path.name} and {others[0].name}; put all interactions into one file")
    table, _ = _read_atomic(path)
    if "item_id_list" in table.columns:
        raise ValueError(f"{path}: holds histories (item_id_list), expected a row an interaction (user_id, item_id)")
    table = table.with_ids("user_id", "item_id")
    users, user_ids = encode(table["user_id"])
    items_path = path.with_suffix(".item")
    if items_path.is_file():
        item_ids, texts = _read_items(items_path)
        items = table.listed("item_id", item_ids, items_path.name)
    else:
        (items, item_ids), texts = encode(table["item_id"]), {}
    return Dataset(
        name=path.stem,
        item_ids=item_ids,
        user_ids=user_ids,
        histories=Histories.from_interactions(users, items, table.timestamps("timestamp"), len(user_ids)),
        texts=texts,
        path=folder,
    )


def _read_items(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    table, types = _read_atomic(path)
    table = table.with_ids("item_id")
    item_ids = table["item_id"].to_list()
    check_unique(item_ids, str(path))
    names = [name for name in table.columns if name != "item_id" and types[name].startswith("token")]
    texts = {name: table[name].to_list() for name in names}
    title = next((name for name in names if name == "title" or name.endswith("_title")), None)
    return item_ids, texts if title is None else {"title": texts.pop(title), **texts}


def _read_atomic(path: Path) -> tuple[Table, dict[str, str]]:
    """The table, its columns named without their types, and the types."""
    table = read_separated(path, "\t")
    fields = [column.rpartition(":") for column in table.columns]
    for name, _, kind in fields:
        if not name or kind not in TYPES:
            raise ValueError(
                f"{path}: line 1 has {':'.join(filter(None, (name, kind)))!r}, "
                f"expected name:type with one of the types {', '.join(TYPES)}"
            )
    names = [name for name, _, _ in fields]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns have the same name, got {listed(names)}")
    return replace(table, frame=table.frame.rename(dict(zip(table.columns, names, strict=True)))), {
        name: kind for name, _, kind in fields
    }
