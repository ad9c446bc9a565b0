"""How well a model ranks what users did next."""

from bbqrec.evaluation.ranking import Ranker, evaluate, metrics_of, ranks, target_ranks

__all__ = ["Ranker", "evaluate", "metrics_of", "ranks", "target_ranks"]
