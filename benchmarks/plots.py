"""Draws a CSV of results as PNG beside it: `python -m benchmarks.plots results/*.csv`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def plot(path: Path) -> Path:
    """One panel for each operator and direction; dots of the least time, one column for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path}: got no rows, expected some; run python -m benchmarks first")
    panels = list(dict.fromkeys((row["operator"], row["direction"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    colors = dict(zip(providers, pyplot.get_cmap("tab10").colors * 2, strict=False))

    def case_of(row: dict[str, str]) -> str:
        sizes = row["shape"].split()
        half = (len(sizes) + 1) // 2
        return "\n".join([" ".join(sizes[:half]), " ".join(sizes[half:]), row["dtype"]])

    figure, axes = pyplot.subplots(len(panels), squeeze=False, figsize=(10, 3.2 * len(panels)), layout="constrained")
    for (operator, direction), axis in zip(panels, axes[:, 0], strict=True):
        chosen = [row for row in rows if (row["operator"], row["direction"]) == (operator, direction)]
        cases = list(dict.fromkeys(map(case_of, chosen)))
        present = [name for name in providers if any(row["provider"] == name for row in chosen)]
        for index, provider in enumerate(present):
            times = {case_of(row): float(row["min_ms"]) for row in chosen if row["provider"] == provider}
            places = [cases.index(case) + (index - (len(present) - 1) / 2) * 0.1 for case in times]
            axis.plot(places, list(times.values()), "o", color=colors[provider])
        axis.set(title=f"{operator}, {direction}", ylabel="ms (least)", yscale="log", xlim=(-0.5, len(cases) - 0.5))
        axis.set_xticks(range(len(cases)), cases, fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    handles = [pyplot.Line2D([], [], marker="o", linestyle="", color=colors[name]) for name in providers]
    figure.legend(handles, providers, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, commit {rows[0]['commit']}", fontsize=9)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(plot(Path(argument)))
