"""What the tables of accuracy are made of."""

from __future__ import annotations

import polars as pl
from scipy import stats


def mean(column: pl.Series) -> str:
    """Mean and, in brackets, standard deviation over seeds."""
    spread = column.std() or 0.0
    return f"{column.mean():.4f}".removeprefix("0") + (f" (± {spread:.4f})".replace("0.", ".") if spread else "")


def paired(rows: pl.DataFrame, others: pl.DataFrame, column: str = "ndcg@10") -> str:
    """Mean difference of a column between runs of the same seeds, with the half width of its 95 % interval (Student).

    Empty for the same runs, and for fewer than two seeds in common.
    """
    both = rows.join(others, on="seed", suffix=" of others")
    if len(both) < 2 or rows.equals(others):
        return ""
    differences = both[column] - both[f"{column} of others"]
    half = stats.t.ppf(0.975, len(both) - 1) * differences.std() / len(both) ** 0.5
    return f"{differences.mean():+.4f} (± {half:.4f})".replace("0.", ".")
