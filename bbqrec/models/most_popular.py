"""The baseline every model has to beat: what most users took."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bbqrec.data.batches import PackedBatch
from bbqrec.data.dataset import Histories


class MostPopular(nn.Module):
    """Scores every item by the number of its interactions in training, for every user alike.

    Args:
        histories: of training.
        n_items: size of the catalogue.
    """

    def __init__(self, histories: Histories, n_items: int):
        super().__init__()
        counts = np.bincount(histories.items, minlength=n_items)
        self.register_buffer("counts", torch.from_numpy(counts))

    def score(self, batch: PackedBatch) -> Tensor:
        """`(B, n_items)` int64 counts."""
        return self.counts.expand(len(batch.last), -1)
