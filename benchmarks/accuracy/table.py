"""The tables of docs/accuracy.md, from the rows that were measured."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl
from scipy import stats

from benchmarks.accuracy.runs import IN_GRID, POINTS, Runs

TITLES = {
    "most_popular": "most popular",
    "item_knn": "item-kNN by content",
    "sasrec": "SASRec",
    "tiger": "TIGER",
    "bbqrec": "BBQRec",
}
YARDSTICK = "bbqrec"  # the run that others are compared with
PARTS = {
    "kept": "history kept",
    "cold": "items never seen",
    "rare": "items seen 1 to 5 times",
    "short": "users of 4 items or fewer",
}


def headline(all_runs: Iterable[Runs]) -> str:
    """Test NDCG@10 of each data set and model with content, and the best that others report."""
    columns = ("most-popular", "item-knn", "sasrec", "sasrec-features-no-similarity", "sasrec-features", YARDSTICK)
    names = ["most popular", "item-kNN", "SASRec", "with features", "and similarity", "BBQRec", "best published"]
    lines = _head(["data", *names])
    for runs in all_runs:
        tests = [runs.of(run, "test") for run in columns]
        cells = [runs.title, *("" if rows.is_empty() else mean(rows["ndcg@10"]) for rows in tests)]
        best = max(runs.published, key=lambda row: row.ndcg, default=None)
        cells.append(f"{_number(best.ndcg)}, {best.model}" if best else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(all_runs: Iterable[Runs]) -> str:
    """For each data set a line a run that has rows, and under it what others report; then parts of users and items."""
    parts = [part for runs in all_runs for part in (f"### {runs.title}", _main_table(runs), _table_of_parts(runs))]
    return "\n\n".join(part for part in parts if part)


def _main_table(runs: Runs) -> str:
    head = ["run", "model", "seeds", "Recall@10", "NDCG@10", "over BBQRec", "in validation", "minutes", "MB", "commit"]
    lines = _head(head)
    for name, entry in runs.runs.items():
        test, validation = runs.of(name, "test"), runs.of(name, "validation")
        if test.is_empty():
            continue
        model = " ".join([TITLES[entry.model], *(f"`{option}`" for option in _options(test))])
        cells = [f"`{name}`", model, str(len(test)), mean(test["recall@10"])]
        cells += [mean(test["ndcg@10"]), paired(test, runs.of(YARDSTICK, "test")), mean(validation["ndcg@10"])]
        seconds, peak = test["seconds"].mean(), test["peak_memory_mb"].mean()
        cells += ["" if seconds is None else f"{seconds / 60:.1f}", "" if peak is None else f"{peak:.0f}"]
        cells.append(", ".join(test["commit"].unique(maintain_order=True)))
        lines.append(f"| {' | '.join(cells)} |")
    for row in runs.published:
        model = f"{row.model} ({row.source})"
        cells = ["published", model, "", _number(row.recall), _number(row.ndcg), *[""] * 5]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _table_of_parts(runs: Runs) -> str:
    """Of the models without options of ablations: NDCG@10 of parts of the users, with their number."""
    lines = _head(["NDCG@10 of", *PARTS.values()])
    for name, entry in runs.runs.items():
        test = runs.of(name, "test")
        if entry.in_parts and not test.is_empty() and "kept/ndcg@10" in test.columns:
            test = test.drop_nulls("kept/ndcg@10")
            if test.is_empty():
                continue
            cells = [f"`{name}`"]
            for part in PARTS:
                values, users = test[f"{part}/ndcg@10"].drop_nulls(), test[f"{part}/users"][0]
                cells.append(f"{mean(values)}, {users:,} users" if len(values) else "none")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def grid_table(all_runs: Iterable[Runs]) -> str:
    """Validation NDCG@10 of each data set and model by point of the grid, the best of a line in bold type."""
    lines = _head(["data", "run", "seeds", *(" ".join(f"`{option}`" for option in point) for point in POINTS)])
    for runs in all_runs:
        for run in IN_GRID:
            found = [runs.of(" ".join([run, *point]), "validation") for point in POINTS]
            if any(rows.is_empty() for rows in found):
                continue
            means = [rows["ndcg@10"].mean() for rows in found]
            cells = [f"**{_number(value)}**" if value == max(means) else _number(value) for value in means]
            lines.append(f"| {' | '.join([runs.title, f'`{run}`', str(len(found[0])), *cells])} |")
    return "\n".join(lines)


def _head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def _options(rows: pl.DataFrame) -> list[str]:
    """Those of the rows: item-kNN found its own."""
    return (rows["options"][0] or "").split()


def _number(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def mean(column: pl.Series) -> str:
    """Mean and, in brackets, standard deviation over seeds."""
    spread = column.std() or 0.0
    return _number(column.mean()) + (f" (± {spread:.4f})".replace("0.", ".") if spread else "")


def paired(rows: pl.DataFrame, others: pl.DataFrame, column: str = "ndcg@10") -> str:
    """Mean difference of a column between runs of the same seeds, with the half width of its 95 % interval (Student).

    Empty for the same runs, and for fewer than two seeds in common.
    """
    if others.is_empty() or rows.equals(others):
        return ""
    both = rows.join(others, on="seed", suffix=" of others")
    if len(both) < 2:
        return ""
    differences = both[column] - both[f"{column} of others"]
    half = stats.t.ppf(0.975, len(both) - 1) * differences.std() / len(both) ** 0.5
    return f"{differences.mean():+.4f} (± {half:.4f})".replace("0.", ".")
