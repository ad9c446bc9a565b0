"""Which model a run's options name."""

from __future__ import annotations

from torch import Tensor

from bbqrec.config import Config
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.models.tiger import Tiger
from bbqrec.tokenizer.semantic_ids import SemanticIDs


def build_model(
    config: Config, n_items: int, semantic_ids: SemanticIDs | None, features: Tensor | None = None
) -> SequenceModel | Tiger:
    """A new model for a catalogue of `n_items`; `semantic_ids` are None for SASRec only, `features` are for those of
    `model.features`."""
    if config.model_name == "tiger":
        return Tiger(config.model, semantic_ids)
    return SequenceModel(n_items, config.model, semantic_ids, features)
