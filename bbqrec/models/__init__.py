"""Models that rank the next item: each has `score(batch) -> (B, n_items)`."""

from bbqrec.models.most_popular import MostPopular
from bbqrec.models.sequence_model import SequenceModel

__all__ = ["MostPopular", "SequenceModel"]
