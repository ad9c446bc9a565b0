"""Data sets, how they are split, and the batches models see."""

from bbqrec.data.batches import PackedBatch, PrefixBatches, TrainingBatches, pack_histories
from bbqrec.data.dataset import Dataset, Features, Histories
from bbqrec.data.splits import Heldout, Split, leave_one_out

__all__ = [
    "Dataset",
    "Features",
    "Heldout",
    "Histories",
    "PackedBatch",
    "PrefixBatches",
    "Split",
    "TrainingBatches",
    "leave_one_out",
    "pack_histories",
]
