"""Models that rank the next item: each has `score(batch) -> (B, n_items)`."""

from bbqrec.models.build import build_model
from bbqrec.models.item_knn import ItemKNN
from bbqrec.models.most_popular import MostPopular
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.models.tiger import Tiger

__all__ = ["ItemKNN", "MostPopular", "SequenceModel", "Tiger", "build_model"]
