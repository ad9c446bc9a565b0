"""Serving: recommendations from a run folder alone."""

from bbqrec.serving.recommender import BBQRec

__all__ = ["BBQRec"]
