"""Files in and out: histories in JSON lines and recommendations for many users at once; new items."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bbqrec.data.dataset import joined
from bbqrec.data.formats import native
from bbqrec.serving.recommender import BATCH_HISTORIES, BBQRec


@dataclass(frozen=True)
class Request:
    """One line: where it is, whose history it is, its items, oldest first, and their times."""

    place: str
    user: str | None
    history: list[str]
    timestamps: list[int] | None


def read_requests(lines: Iterable[str], name: str) -> Iterator[Request]:
    """Reads JSON lines, `{"user": "u", "history": ["a", "b"]}`, with "timestamps" for a model that reads them, or just
    `["a", "b"]`.

    Args:
        lines: of a file; empty ones are skipped.
        name: what to call it in errors.

    Raises `ValueError` naming the line that is something else, or the file that is not in UTF-8.
    """
    for number, line in enumerate(_decoded(lines, name), 1):
        line = line.removeprefix("\ufeff")  # a byte order mark
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if "\\u" in line:
                json.dumps(value, ensure_ascii=False).encode()  # fails where half of a character is named
        except (ValueError, RecursionError):
            value = None
        value = {"history": value} if isinstance(value, list) else value
        history = value.get("history") if isinstance(value, dict) else None
        if not isinstance(history, list) or not history or not all(isinstance(item, str) for item in history):
            raise ValueError(
                f'{name}: line {number} is {line.strip()[:60]!r}, expected {{"user": "u", "history": ["a", "b"]}} or '
                '["a", "b"]: a list of item ids as strings, oldest first'
            )
        user = value.get("user")
        yield Request(f"{name}: line {number}", None if user is None else str(user), history, value.get("timestamps"))


def _decoded(lines: Iterable[str], name: str) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: is not UTF-8 ({error.reason}); save it in that encoding") from None


def recommend_all(model: BBQRec, requests: Iterable[Request], k: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows `{"user", "items": [{"item", "title", "score"}, ...]}` in the order of the requests, as they are ready.

    `options` are those of `BBQRec.recommend`. Raises `ValueError` as it does, naming the line.
    """
    for batch in _batches(requests, BATCH_HISTORIES):
        try:
            found = _recommend(model, batch, k, options)
        except ValueError:
            for request in batch:  # which one is it?
                try:
                    _recommend(model, [request], k, options)
                except ValueError as error:
                    raise ValueError(f"{request.place}: {str(error).replace(' for history 0', '')}") from None
            raise
        for request, best in zip(batch, found, strict=True):
            items = [{"item": item, "title": model.title(item), "score": score} for item, score in best]
            yield {"user": request.user, "items": items}


def add_items_of(model: BBQRec, path: Path) -> tuple[list[str], list[str]]:
    """Adds the items of a table, or of a folder in the native format.

    Their features are those of the folder that the run uses, made as those of the data set were; texts count where the
    run's features were made of texts and the folder has none.

    Returns the items' names, and those of the folder's feature sets that the run does not use. Raises `ValueError` as
    `BBQRec.add_items` does, and for faults in files.
    """
    folder = path if path.is_dir() else None
    items, texts = native.read_items(path if folder is None else native.items_file(folder))
    features = {} if folder is None else native.read_features(folder, items)
    used = {name: each for name, each in features.items() if name in model.modalities}
    reads_texts = model.reads_texts and "text" not in used
    model.add_items(
        items,
        titles=texts.get("title"),
        texts=[joined(column[i] for column in texts.values()) for i in range(len(items))] if reads_texts else None,
        features={name: np.where(each.present[:, None], each.values, np.nan) for name, each in used.items()},
    )
    return items, [name for name in features if name not in used]


def _recommend(model: BBQRec, batch: list[Request], k: int, options: dict[str, Any]) -> list[list[tuple[str, float]]]:
    times = [request.timestamps for request in batch]
    timestamps = None if all(each is None for each in times) else [each or [] for each in times]
    return model.recommend([request.history for request in batch], k, timestamps=timestamps, **options)


def _batches(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    batch: list[Request] = []
    for request in requests:
        batch.append(request)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
