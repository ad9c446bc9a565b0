"""Packed batches: sequences of different lengths one after another, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from bbqrec.data.dataset import Histories
from bbqrec.processes import rank_and_world

PREFIXES_A_HISTORY = 6  # an epoch: TIGER then trains about three times as long as its beam search validates


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sequences with T items in all.

    Attributes:
        items: `(T,)` int64 item indices.
        positions: `(T,)` int64, place of each item in its sequence, from 0.
        timestamps: `(T,)` int64, or None where the data has none.
        cu_seqlens: `(B + 1,)` int32; sequence `b` is `items[cu_seqlens[b] : cu_seqlens[b + 1]]`.
        max_seqlen: length of the longest sequence.
        targets: `(T,)` int64, the item that follows at each position, or None outside training.
        users: `(B,)` int64, the history that each sequence is of, or None outside training.
    """

    items: Tensor
    positions: Tensor
    timestamps: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    targets: Tensor | None = None
    users: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """`(B,)` int64, index into the T items of each sequence's last one."""
        return self.cu_seqlens[1:].long() - 1

    def to(self, device: torch.device | str) -> PackedBatch:
        values = (getattr(self, f.name) for f in fields(self))
        return PackedBatch(*(v.to(device) if isinstance(v, Tensor) else v for v in values))


def pack_histories(histories: Histories | Sequence[Sequence[int]], max_length: int) -> PackedBatch:
    """Packs histories for scoring: of each the latest `max_length` items, with positions from the first one kept.

    Raises `ValueError` if a history is empty or `max_length` is below 1.
    """
    if not isinstance(histories, Histories):
        histories = Histories.from_lists(histories)
    _check_at_least_one("max_length", max_length)
    if (histories.lengths < 1).any():
        raise ValueError(f"histories: number {histories.lengths.argmin()} (counted from 0) is empty; leave it out")
    stops = histories.offsets[1:]
    return _pack(histories.spans(np.maximum(histories.offsets[:-1], stops - max_length), stops))


class TrainingBatches(IterableDataset):
    """All transitions of the histories, each once an epoch, in packed batches with targets.

    A history of n items has n - 1 transitions: every item but the last is an input, and the item after it the target.
    Histories with more than `max_length` transitions are cut into consecutive windows of `max_length`, counted from the
    end, so that the latest window is a full one. A history of one item has no transition and is left out.

    An epoch's batches depend on (seed, epoch) alone. They hold whole windows and about equally many tokens:
    `batch_tokens` at most on average, and each less than `batch_tokens + max_length`. Their number is the same in every
    epoch: training loops ask for `len` once. With several loader workers or distributed ranks each gets its share; the
    ranks' shares are equally many (some batches are seen twice where the number of ranks does not divide `len`).

    Args:
        histories: of training.
        max_length: longest window.
        batch_tokens: interactions a batch.
        seed: of the order.

    Raises `ValueError` if no history has a transition or a number is below 1.
    """

    def __init__(self, histories: Histories, max_length: int, batch_tokens: int, seed: int):
        super().__init__()
        _check_at_least_one("max_length", max_length)
        _check_at_least_one("batch_tokens", batch_tokens)
        if not (histories.lengths > 1).any():
            raise ValueError("histories: no user has two interactions in training; there is no transition to learn")
        self.histories = histories
        self.starts, self.stops = self._inputs(histories, max_length)
        self.seed = seed
        self.epoch = 0
        self.epochs_of_a_pass = self._epochs_of_a_pass()
        n_batches = -(-int((self.stops - self.starts).sum()) // (batch_tokens * self.epochs_of_a_pass))
        self.n_batches = min(n_batches, len(self.starts) // self.epochs_of_a_pass)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch: on this rank, where training is distributed."""
        return -(-self.n_batches // rank_and_world()[1])

    def __iter__(self) -> Iterator[PackedBatch]:
        a_pass, part = divmod(self.epoch, self.epochs_of_a_pass)
        order = np.random.default_rng((self.seed, a_pass)).permutation(len(self.starts))[part :: self.epochs_of_a_pass]
        bounds = _bounds(self.stops[order] - self.starts[order], self.n_batches)
        rank, world = rank_and_world()
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for n in range(first, len(self), step):
            k = (rank + n * world) % self.n_batches
            windows = order[bounds[k] : bounds[k + 1]]
            starts, stops = self.starts[windows], self.stops[windows]
            inputs = self.histories.spans(starts, stops)
            users = np.searchsorted(self.histories.offsets, starts, side="right") - 1
            yield _pack(inputs, self.histories.spans(starts + 1, stops + 1).items, users)

    def _inputs(self, histories: Histories, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        return _windows(histories, max_length)

    def _epochs_of_a_pass(self) -> int:
        return 1


class PrefixBatches(TrainingBatches):
    """Single transitions, for models that read a history as a whole: an item, and up to `max_length` items before it.

    In a batch each sequence is such a prefix; what follows it is the target at its last position. There are as many
    prefixes as transitions, and a long history has many long ones: where there are more than `PREFIXES_A_HISTORY`
    for every history with a transition, a pass over all of them takes several epochs, each with an equal share, so that
    validation is not rare. All else is as in `TrainingBatches`; the average tokens a batch are those of a pass, so a
    batch may have somewhat more.
    """

    def _inputs(self, histories: Histories, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        stops = np.arange(1, len(histories.items))
        first = np.repeat(histories.offsets[:-1], histories.lengths)[1:]  # of the history that each target is in
        stops, first = stops[stops > first], first[stops > first]
        return np.maximum(first, stops - max_length), stops

    def _epochs_of_a_pass(self) -> int:
        return -(-len(self.starts) // (PREFIXES_A_HISTORY * int((self.histories.lengths > 1).sum())))


def _windows(histories: Histories, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops of the inputs of each window, as indices into the flat items."""
    first, last = histories.offsets[:-1], histories.offsets[1:] - 1  # the last item of a history is a target only
    counts = np.maximum(-(-(last - first) // max_length), 0)
    history = np.repeat(np.arange(len(histories)), counts)
    from_the_end = counts.cumsum().repeat(counts) - np.arange(len(history)) - 1
    stops = last[history] - from_the_end * max_length
    return np.maximum(first[history], stops - max_length), stops


def _bounds(lengths: np.ndarray, n_batches: int) -> np.ndarray:
    """Cuts windows of these lengths into `n_batches` runs of about equally many tokens, none of them empty."""
    starts = lengths.cumsum() - lengths
    k = np.arange(n_batches)
    bounds = np.searchsorted(starts, k * (lengths.sum() / n_batches))
    bounds = np.maximum.accumulate(bounds - k) + k  # at least one window before each bound ...
    bounds = np.minimum(bounds, len(lengths) - n_batches + k)  # ... and after it
    return np.append(bounds, len(lengths))


def _pack(histories: Histories, targets: np.ndarray | None = None, users: np.ndarray | None = None) -> PackedBatch:
    lengths = histories.lengths
    positions = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], lengths)
    return PackedBatch(
        items=torch.from_numpy(histories.items),
        positions=torch.from_numpy(positions),
        timestamps=None if histories.timestamps is None else torch.from_numpy(histories.timestamps),
        cu_seqlens=torch.from_numpy(histories.offsets.astype(np.int32)),
        max_seqlen=int(lengths.max(initial=0)),
        targets=None if targets is None else torch.from_numpy(targets),
        users=None if users is None else torch.from_numpy(users),
    )


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
