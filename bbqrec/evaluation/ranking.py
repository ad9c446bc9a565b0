"""Recall and NDCG of the held-out item among all items."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bbqrec.data.batches import PackedBatch, pack_histories
from bbqrec.data.splits import Heldout
from bbqrec.processes import gathered, rank_and_world, summed

if TYPE_CHECKING:
    from bbqrec.models.shards import ItemShards

RECALL_AT = (1, 5, 10, 20)
NDCG_AT = (5, 10, 20)
METRICS = (*(f"recall@{k}" for k in RECALL_AT), *(f"ndcg@{k}" for k in NDCG_AT))


class Ranker(Protocol):
    """Anything that scores the next item. An `nn.Module` must be in evaluation mode."""

    def score(self, batch: PackedBatch) -> Tensor:
        """Scores `(B, n_items)`, higher is better, on the device of the batch.

        A ranker may have `item_vectors()`: what that returns is then given to every call as `vectors`. One that has
        `shards`, if they are not None, scores the items of this process alone; all are asked about the same users.
        """


def evaluate(
    ranker: Ranker,
    heldout: Heldout,
    n_items: int,
    *,
    keep_history: bool = False,
    max_length: int,
    batch_users: int | None = None,
    train_items: np.ndarray | Collection[int] | None = None,
) -> dict[str, float]:
    """Ranks all items for every user of `heldout`, and says how many found their target.

    Args:
        ranker, heldout, n_items, keep_history, max_length, batch_users: see `target_ranks`, whose errors are raised.
        train_items: `(n_items,)` bool mask, or indices, of the items seen in training. If given, targets that are not
            among them (cold ones) are reported apart as well.

    Returns:
        `metrics_of` all users. With `train_items` also "cold/users" and, unless that is 0, "cold/recall@1" and so on.
    """
    options = {"keep_history": keep_history, "max_length": max_length, "batch_users": batch_users}
    all_ranks = target_ranks(ranker, heldout, n_items, **options)
    metrics = metrics_of(all_ranks)
    if train_items is not None:
        cold = ~_mask(train_items, n_items)[heldout.targets]
        cold_metrics = metrics_of(all_ranks[cold]) if cold.any() else {"users": 0}
        metrics |= {f"cold/{name}": value for name, value in cold_metrics.items()}
    return metrics


@torch.no_grad()
def target_ranks(
    ranker: Ranker,
    heldout: Heldout,
    n_items: int,
    *,
    keep_history: bool = False,
    max_length: int,
    batch_users: int | None = None,
) -> np.ndarray:
    """Rank of the held-out item of every user among all items, from 1: `(users,)` int64.

    Where several processes train together (see `bbqrec.processes`), all have to call it: each ranks for some users, and
    all get the ranks of all. Where they have shared out the ranker's items, each scores its own for all users.

    Items of the user's whole history are no candidates, except for the target itself; with `keep_history` they are.
    A tie counts against the target.

    Args:
        ranker: its `score` gets the latest `max_length` items of each history, on the ranker's device.
        heldout: histories and targets.
        n_items: size of the catalogue.
        keep_history: leave the items of the history among the candidates.
        max_length: longest history that the ranker sees.
        batch_users: users scored at once; by default at most 512, and fewer where there are many items.

    Raises:
        ValueError: there is no user, a target is no item, or the scores have the wrong shape or hold NaN.
    """
    if not len(heldout):
        raise ValueError("heldout: has no user; leave-one-out needs users with three interactions or more")
    if heldout.targets.min() < 0 or heldout.targets.max() >= n_items:
        raise ValueError(f"heldout: got targets up to {heldout.targets.max()}, expected 0 to {n_items - 1}")
    device, (rank, world) = _device(ranker), rank_and_world()
    first, stop, most = 0, n_items, n_items  # the items that are scored here, and how many are anywhere
    shards = getattr(ranker, "shards", None)
    if shards is not None:
        rank, world = 0, 1
        first, stop, most = shards.first, shards.first + shards.sizes[shards.rank], shards.sizes[0]
    batch_users = batch_users or max(1, min(512, 2**24 // most))
    starts = range(0, len(heldout), batch_users)  # the same batches for any number of processes: the same scores
    score = partial(ranker.score, vectors=ranker.item_vectors()) if hasattr(ranker, "item_vectors") else ranker.score
    found = []
    for start in starts[rank::world]:
        histories = heldout.histories[start : start + batch_users]
        targets = torch.from_numpy(heldout.targets[start : start + batch_users]).to(device)
        scores = score(pack_histories(histories, max_length).to(device))
        if scores.shape != (len(targets), stop - first):
            raise ValueError(f"ranker: got scores {tuple(scores.shape)}, expected ({len(targets)}, {stop - first})")
        is_bad = scores.amax(1).isnan()  # in a sixth of the time of `isnan`
        is_bad = is_bad if shards is None else summed(is_bad.int())  # all of them stop
        if is_bad.any():
            row = int(is_bad.int().argmax())
            raise ValueError(f"ranker: scores of user {heldout.users[start + row]} hold NaN; has training diverged?")
        excluded = None
        if not keep_history:
            excluded = torch.zeros(scores.shape, dtype=torch.bool, device=device)
            here = (histories.items >= first) & (histories.items < stop)
            places = np.repeat(np.arange(len(histories)), histories.lengths)[here], histories.items[here] - first
            excluded[tuple(torch.from_numpy(place).to(device) for place in places)] = True
        found.append(ranks(scores, targets, excluded, shards).cpu())
    return _of_all_processes(found, starts, len(heldout), world)


def _of_all_processes(found: list[Tensor], starts: range, users: int, world: int) -> np.ndarray:
    """The ranks of all users, of which process r found those of batches r, r + world, ...; `starts`: of the batches."""
    batches = torch.arange(users).split(starts.step)
    of_process = [torch.cat(batches[r::world]) if r < len(batches) else torch.arange(0) for r in range(world)]
    mine = torch.cat(found) if found else torch.arange(0)
    all_ranks = torch.empty(users, dtype=torch.int64)
    for at, part in zip(of_process, gathered(mine, [len(at) for at in of_process]), strict=True):
        all_ranks[at] = part
    return all_ranks.numpy()


def ranks(scores: Tensor, targets: Tensor, excluded: Tensor | None = None, shards: ItemShards | None = None) -> Tensor:
    """Rank of each target, from 1: one more than the other candidates that score as high or higher.

    Args:
        scores: `(B, n_items)`, without NaN.
        targets: `(B,)` int64.
        excluded: `(B, n_items)` bool, items that are no candidates; a target always is one. None excludes nothing.
        shards: given, the columns of `scores` and `excluded` are this process's items, and all processes call it
            together: two numbers a row cross over.

    Returns `(B,)` int64.
    """
    is_own = torch.ones_like(targets, dtype=torch.bool)
    if shards is not None:
        targets = targets - shards.first
        is_own = (targets >= 0) & (targets < scores.shape[1])
    targets = targets.where(is_own, 0)[:, None]
    of_target = scores.gather(1, targets).where(is_own[:, None], 0)
    ahead = scores >= (of_target if shards is None else summed(of_target))
    if excluded is not None:
        ahead.masked_fill_(excluded, False)
    # The target itself is the one that makes ranks start at 1.
    ahead.scatter_(1, targets, ahead.gather(1, targets) | is_own[:, None])
    count = ahead.sum(1, dtype=torch.int32).long()  # int64 takes twice the time
    return count if shards is None else summed(count)


def metrics_of(ranks: np.ndarray) -> dict[str, float]:
    """Metrics of one target for each user, from `ranks (users,)`.

    Returns "recall@1", "recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10" and "ndcg@20", means over users, and
    "users", their number. A recall is the share of users whose target is among the first k; with one target, NDCG is
    `1 / log2(rank + 1)` for rank <= k and 0 beyond.
    """
    gains = 1 / np.log2(ranks + 1)
    return {
        **{f"recall@{k}": float((ranks <= k).mean()) for k in RECALL_AT},
        **{f"ndcg@{k}": float((gains * (ranks <= k)).mean()) for k in NDCG_AT},
        "users": len(ranks),
    }


def _mask(items: np.ndarray | Collection[int], n_items: int) -> np.ndarray:
    if isinstance(items, np.ndarray) and items.dtype == np.bool_:
        if items.shape != (n_items,):
            raise ValueError(f"train_items: got a mask of shape {items.shape}, expected ({n_items},)")
        return items
    mask = np.zeros(n_items, bool)
    mask[np.fromiter(items, np.int64, len(items))] = True
    return mask


def _device(ranker: Ranker) -> torch.device:
    """Where the ranker's weights are; the CPU for a ranker without."""
    weights = chain(ranker.parameters(), ranker.buffers()) if isinstance(ranker, nn.Module) else iter(())
    return next((weight.device for weight in weights), torch.device("cpu"))
