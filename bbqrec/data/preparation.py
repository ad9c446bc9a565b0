"""Between reading a data set and writing it: leaves out what is not to be learned from, and counts it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bbqrec.data.dataset import Dataset, Features


@dataclass(frozen=True)
class Prepared:
    """A data set and what was done to it.

    Attributes:
        data: what is left.
        figures: `counts`, of users, items and interactions: read, left out for each reason, and written; `features`,
            for each modality the share of the items that have it; `time_ties`, the interactions at the same time as
            the one before of the same user, or None without times.
    """

    data: Dataset
    figures: dict[str, Any]


def prepare(data: Dataset, *, k_core: int = 0, keep_repeats: bool = False) -> Prepared:
    """Leaves out repeats, then users and items with too few interactions.

    Args:
        data: any data set.
        k_core: users and items with fewer interactions are left out, again and again, until all left have as many. 0
            keeps all, items without interactions included.
        keep_repeats: keep interactions of the same user with the same item at the same time. Without timestamps no
            interaction counts as a repeat.

    Raises:
        ValueError: nothing is left, or `k_core` is negative.
    """
    if k_core < 0:
        raise ValueError(f"k_core: got {k_core}, expected 0 or more")
    counts = {"read": _counts(data)}
    if not keep_repeats:
        data = _step("repeated", data, _without_repeats(data), counts)
    if k_core:
        data = _step(f"below {k_core} interactions", data, _core(data, k_core), counts)
    counts["written"] = _counts(data)
    shares = {name: float(feature.present.mean()) for name, feature in data.features.items()}
    return Prepared(data, {"counts": counts, "features": shares, "time_ties": _time_ties(data)})


def _step(name: str, before: Dataset, after: Dataset, counts: dict[str, dict[str, int]]) -> Dataset:
    old, new = _counts(before), _counts(after)
    counts[name] = {key: old[key] - new[key] for key in old}
    return after


def _counts(data: Dataset) -> dict[str, int]:
    return {"users": data.n_users, "items": data.n_items, "interactions": len(data.histories.items)}


def _users(data: Dataset) -> np.ndarray:
    """User of every interaction."""
    return np.repeat(np.arange(data.n_users), data.histories.lengths)


def _without_repeats(data: Dataset) -> Dataset:
    times = data.histories.timestamps
    if times is None:
        return data
    _, first = np.unique(np.stack([_users(data), times, data.histories.items]), axis=1, return_index=True)
    keep = np.zeros(len(times), bool)
    keep[first] = True
    return _subset(data, keep, np.ones(data.n_users, bool), np.ones(data.n_items, bool))


def _core(data: Dataset, k: int) -> Dataset:
    users, items = _users(data), data.histories.items
    keep = np.ones(len(items), bool)
    while True:
        good_users = np.bincount(users[keep], minlength=data.n_users) >= k
        good_items = np.bincount(items[keep], minlength=data.n_items) >= k
        still = keep & good_users[users] & good_items[items]
        if (still == keep).all():
            break
        keep = still
    if not keep.any():
        raise ValueError(f"k_core: got {k}, but no user and item of {data.name} is left with as many interactions")
    return _subset(data, keep, good_users, good_items)


def _subset(data: Dataset, interactions: np.ndarray, users: np.ndarray, items: np.ndarray) -> Dataset:
    """Masks of what stays: interactions that stay are of users and items that do."""
    histories, chosen = data.histories, np.flatnonzero(items)
    places = np.cumsum(items) - 1
    lengths = np.bincount(_users(data)[interactions], minlength=data.n_users)[users]
    return replace(
        data,
        path=None,  # whose data set is another one
        item_ids=[data.item_ids[i] for i in chosen],
        user_ids=[data.user_ids[u] for u in np.flatnonzero(users)],
        histories=replace(
            histories,
            items=places[histories.items[interactions]],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            timestamps=None if histories.timestamps is None else histories.timestamps[interactions],
        ),
        features={
            name: Features(feature.values[chosen], feature.present[chosen], feature.words)
            for name, feature in data.features.items()
            if feature.present[chosen].any()
        },
        texts={name: [column[i] for i in chosen] for name, column in data.texts.items()},
    )


def _time_ties(data: Dataset) -> int | None:
    times = data.histories.timestamps
    if times is None:
        return None
    users = _users(data)
    return int(((times[1:] == times[:-1]) & (users[1:] == users[:-1])).sum())
