"""How well a model ranks what users did next."""

from bbqrec.evaluation.ranking import Ranker, evaluate, ranks

__all__ = ["Ranker", "evaluate", "ranks"]
