"""From features and behaviour to semantic IDs."""

from bbqrec.tokenizer.model import Tokenizer
from bbqrec.tokenizer.semantic_ids import SemanticIDs

__all__ = ["SemanticIDs", "Tokenizer"]
