"""Draws a CSV of results as PNG beside it: `python -m benchmarks.plots results/*.csv`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def plot(path: Path) -> Path:
    """One panel for each operator and direction; bars of the least time, one group for each shape."""
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
    figure, axes = pyplot.subplots(len(panels), squeeze=False, figsize=(10, 3.2 * len(panels)), layout="constrained")
    for (operator, direction), axis in zip(panels, axes[:, 0], strict=True):
        chosen = [row for row in rows if (row["operator"], row["direction"]) == (operator, direction)]
        cases = list(dict.fromkeys(f"{row['shape']}\n{row['dtype']}" for row in chosen))
        for index, provider in enumerate(providers):
            bars = {f"{r['shape']}\n{r['dtype']}": float(r["min_ms"]) for r in chosen if r["provider"] == provider}
            places = [cases.index(case) + (index - len(providers) / 2) * 0.8 / len(providers) for case in bars]
            axis.bar(places, bars.values(), 0.8 / len(providers), color=colors[provider], label=provider, align="edge")
        axis.set(title=f"{operator}, {direction}", ylabel="ms (least)", yscale="log")
        axis.set_xticks(range(len(cases)), cases, fontsize=7)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[name]) for name in providers]
    figure.legend(handles, providers, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, commit {rows[0]['commit']}", fontsize=9)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(plot(Path(argument)))
