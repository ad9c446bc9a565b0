"""BBQRec: a multi-modal sequential recommender on semantic IDs.

from bbqrec import BBQRec, Dataset, fit

run = fit(Dataset.load("path/to/data"), out="runs/a")
BBQRec.load("runs/a").recommend([["item-a", "item-b"]], k=10)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bbqrec.config import Config
    from bbqrec.data.dataset import Dataset
    from bbqrec.serving.recommender import BBQRec
    from bbqrec.training.fit import fit, tokenize
    from bbqrec.training.run import Run
    from bbqrec_kernels._version import __version__

__all__ = ["BBQRec", "Config", "Dataset", "Run", "__version__", "fit", "tokenize"]

_HOMES = {
    "BBQRec": "bbqrec.serving.recommender",
    "Config": "bbqrec.config",
    "Dataset": "bbqrec.data.dataset",
    "Run": "bbqrec.training.run",
    "__version__": "bbqrec_kernels._version",
    "fit": "bbqrec.training.fit",
    "tokenize": "bbqrec.training.fit",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: the command line stays quick, and a missing extra is named instead of a module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bbqrec' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("bbqrec", "bbqrec_kernels"):
            raise
        raise ImportError(f"bbqrec.{name} needs {error.name!r}: pip install 'bbqrec[models]'") from error
