"""Which interactions are trained on, and which are held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bbqrec.data.dataset import Dataset, Histories


@dataclass(frozen=True, eq=False)
class Heldout:
    """One item for each of `n` users, to be ranked given the user's history.

    Attributes:
        histories: what the user did before; `n` sequences, none of them empty.
        targets: `(n,)` int64, the held-out items.
        users: `(n,)` int64, indices of the users in the data set.
    """

    histories: Histories
    targets: np.ndarray
    users: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def sample(self, n: int | None, seed: int) -> Heldout:
        """`n` users in their order, drawn by `seed`; all where there are no more, or `n` is None."""
        if n is None or n >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        offsets = self.histories.offsets
        histories = self.histories.spans(offsets[chosen], offsets[chosen + 1])
        return Heldout(histories, self.targets[chosen], self.users[chosen])


@dataclass(frozen=True, eq=False)
class Split:
    """`train` has a sequence for every user, in the order of the data set."""

    train: Histories
    validation: Heldout
    test: Heldout

    @cached_property
    def train_items(self) -> np.ndarray:
        """Items of the histories that training reads, sorted; held-out targets that are not among them are cold.

        A history of one item has no transition, and is not read.
        """
        return np.unique(self.train.items[np.repeat(self.train.lengths > 1, self.train.lengths)])


def leave_one_out(data: Dataset) -> Split:
    """Holds out the last item of every user for the test, and the last but one for validation.

    The history of the test target includes the validation target. Users with fewer than three interactions cannot give
    both targets and a history: they are in `train`, with all they did, and nowhere else.
    """
    histories = data.histories
    starts, stops = histories.offsets[:-1], histories.offsets[1:]
    split = histories.lengths >= 3
    users = np.flatnonzero(split)

    def hold_out(from_the_end: int) -> Heldout:
        targets = stops[split] - from_the_end
        return Heldout(histories.spans(starts[split], targets), histories.items[targets], users)

    return Split(histories.spans(starts, np.where(split, stops - 2, stops)), hold_out(2), hold_out(1))
