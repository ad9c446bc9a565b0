"""A baseline without training: the items that look and read like the latest ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbqrec.data.batches import PackedBatch
from bbqrec.data.dataset import Features


class ItemKNN(nn.Module):
    """Scores an item by `Σ_k decay^k cos(x_item, x_k)`, `k` counting a history's items from the latest, 0, backwards.

    The cosine is the mean over modalities; where either item lacks one, it counts as 0.

    Args:
        features: the feature sets to compare, by modality.
        decay: 0 looks at the latest item alone, 1 at all alike.
    """

    def __init__(self, features: dict[str, Features], decay: float):
        super().__init__()
        self.decay = decay
        rows = [_unit_rows(feature) for feature in features.values()]
        self.register_buffer("rows", torch.cat(rows, dim=1) / len(rows) ** 0.5)

    def score(self, batch: PackedBatch) -> Tensor:
        """`(B, n_items)` float32."""
        return history_profiles(batch, self.rows, self.decay) @ self.rows.T


def history_profiles(batch: PackedBatch, rows: Tensor, decay: float | Tensor) -> Tensor:
    """`Σ_k decay^k rows[x_k]` of each history, `(B, F)`: `k` counts its items from the latest, 0, backwards."""
    token = torch.arange(batch.items.shape[0], device=batch.items.device)
    history = torch.bucketize(token, batch.cu_seqlens[1:].long(), right=True)
    age = (batch.last[history] - token).float()
    profiles = rows.new_zeros(batch.last.shape[0], rows.shape[1])
    return profiles.index_add(0, history, rows[batch.items] * (decay**age)[:, None])


def _unit_rows(feature: Features) -> Tensor:
    values = torch.from_numpy(np.where(feature.present[:, None], feature.values, 0))
    mean = values.sum(0) / max(int(feature.present.sum()), 1)
    return F.normalize((values - mean) * torch.from_numpy(feature.present)[:, None], dim=-1)
