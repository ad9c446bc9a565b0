"""Measures accuracy: fits models with several seeds, writes a CSV row for each run and split, prints a table of means.

    python tools/accuracy.py --data DATA --out runs/accuracy --csv docs/results/NAME.csv
    python tools/accuracy.py --table docs/results/*.csv    # one table of files written before, no run

Finished runs in `--out` are not fitted again, unfinished ones are resumed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import time
from pathlib import Path

import polars as pl
from scipy import stats

from bbqrec import Config, Dataset, fit
from bbqrec.config import ModelConfig
from bbqrec.data.splits import leave_one_out
from bbqrec.evaluation.ranking import METRICS, evaluate
from bbqrec.models import ItemKNN
from bbqrec.training.run import device, versions

TITLES = {
    "most_popular": "most popular",
    "item_knn": "item-kNN by content",
    "sasrec": "SASRec",
    "tiger": "TIGER",
    "bbqrec": "BBQRec",
}
UNTRAINED = ("most_popular", "item_knn")
DECAYS = (0, 0.3, 0.5, 0.7, 0.9, 1)  # of item-kNN, chosen by validation NDCG@10


def measure(path: Path, model: str, seed: int, out: Path, options: list[str]) -> list[dict[str, object]]:
    """Fits a model, or finds it fitted, and returns its rows; those of most-popular come with SASRec."""
    data = Dataset.load(path)
    if model == "item_knn":
        return measure_item_knn(data)
    config = Config().override([*options, f"training.seed={seed}"])
    folder = out / f"{model}-{seed}"
    is_new = not (folder / "run.json").exists()
    run = fit(data, folder, model=model, config=config)
    note = folder / "commit.txt"  # of the first call: that of a finished run stays
    if is_new:
        note.write_text(_git("describe", "--always", "--dirty"))
    commit = note.read_text() if note.exists() else ""
    measured = {"seconds": run.facts["seconds"], "peak_memory_mb": run.facts["peak_memory_mb"]}
    made = {"commit": commit, "device": run.facts["device"]}
    facts = {"options": " ".join(options), "seed": seed, **measured, "data": data.name, **run.facts["versions"], **made}
    rows = []
    for split in ("validation", "test"):
        rows.append({"model": model, "split": split, **_metrics(run.metrics[split]), **facts})
        if model == "sasrec":
            rows.append(
                {"model": "most_popular", "split": split, **_metrics(run.metrics["most_popular"][split]), **facts}
            )
    return rows


def measure_item_knn(data: Dataset) -> list[dict[str, object]]:
    """Rows of the item-kNN whose decay is best on validation."""
    split, options = leave_one_out(data), {"n_items": data.n_items, "max_length": ModelConfig().max_length}
    started = time.perf_counter()
    rankers = {decay: ItemKNN(data.features, decay).eval() for decay in DECAYS}
    found = {decay: evaluate(ranker, split.validation, **options) for decay, ranker in rankers.items()}
    decay = max(found, key=lambda decay: found[decay]["ndcg@10"])
    metrics = {"validation": found[decay], "test": evaluate(rankers[decay], split.test, **options)}
    facts = {"options": f"decay={decay}", "seed": 0, "seconds": round(time.perf_counter() - started, 1)}
    facts |= {"peak_memory_mb": None, "data": data.name, **versions()}
    facts |= {"commit": _git("describe", "--always", "--dirty"), "device": device()}
    return [{"model": "item_knn", "split": name, **_metrics(values), **facts} for name, values in metrics.items()]


def markdown(rows: pl.DataFrame) -> str:
    """Mean and, in brackets, standard deviation over seeds; time and memory of a fit, mean."""
    lines = ["| model | split | Recall@10 | NDCG@10 | minutes | peak memory, MB |", "|---|---|---|---|---|---|"]
    for split in ("validation", "test"):
        for model, title in TITLES.items():
            chosen = rows.filter(model=model, split=split)
            if len(chosen):
                cells = [_mean(chosen[name]) for name in ("recall@10", "ndcg@10")]
                if model in UNTRAINED:
                    cells += ["", ""]
                else:
                    cells += [f"{chosen['seconds'].mean() / 60:.1f}", f"{chosen['peak_memory_mb'].mean():.0f}"]
                lines.append(f"| {title} | {split} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of(files: list[Path]) -> str:
    """One line a data set, model and set of options: means over seeds, on the test split; see `paired`."""
    head = [
        "data",
        "model",
        "options",
        "seeds",
        "Recall@10",
        "NDCG@10",
        "over BBQRec",
        "validation NDCG@10",
        "minutes",
        "peak memory, MB",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for path in files:
        rows = pl.read_csv(path).fill_null("")
        bbqrec = rows.filter(model="bbqrec", options="", split="test")
        for model, title in TITLES.items():
            for (options,), chosen in rows.filter(model=model).group_by("options", maintain_order=True):
                test, validation = chosen.filter(split="test"), chosen.filter(split="validation")
                cells = [chosen["data"][0], title, f"`{options}`" if options else "", str(len(test))]
                cells += [_mean(test["recall@10"]), _mean(test["ndcg@10"]), paired(test, bbqrec)]
                cells += [_mean(validation["ndcg@10"])]
                cells += (
                    ["", ""]
                    if model in UNTRAINED
                    else [f"{test['seconds'].mean() / 60:.1f}", f"{test['peak_memory_mb'].mean():.0f}"]
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paired(rows: pl.DataFrame, others: pl.DataFrame) -> str:
    """Mean difference of NDCG@10 between runs of the same seeds, with the half width of its 95 % interval (Student).

    Empty for the same runs, and for fewer than two seeds in common.
    """
    both = rows.join(others, on="seed", suffix=" of others")
    if len(both) < 2 or rows.equals(others):
        return ""
    differences = both["ndcg@10"] - both["ndcg@10 of others"]
    half = stats.t.ppf(0.975, len(both) - 1) * differences.std() / len(both) ** 0.5
    return f"{differences.mean():+.4f} (± {half:.4f})".replace("0.", ".")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def _metrics(values: dict[str, float]) -> dict[str, float]:
    return {name: round(values[name], 5) for name in METRICS}


def _mean(column: pl.Series) -> str:
    spread = column.std() or 0.0
    return f"{column.mean():.4f}".removeprefix("0") + (f" (± {spread:.4f})".replace("0.", ".") if spread else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, nargs="+", help="files to show in one table, instead of measuring")
    parser.add_argument("--data", type=Path, help="data set")
    parser.add_argument("--out", type=Path, help="folder of the run folders")
    parser.add_argument("--csv", type=Path, help="file to write")
    parser.add_argument("--models", nargs="+", choices=[*TITLES][1:], default=["sasrec", "bbqrec"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of all runs")
    arguments = parser.parse_args()
    if arguments.table:
        print(table_of(arguments.table))
        return
    if not (arguments.data and arguments.out and arguments.csv):
        parser.error("--data, --out and --csv are needed to measure")

    rows = []
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:  # a process for each run: its memory is its own
        for seed in arguments.seeds:
            for model in arguments.models:
                run = (arguments.data, model, seed, arguments.out, arguments.set)
                rows += pool.apply(measure, run)
    table = pl.DataFrame(rows)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    table.sort("model", "split", "seed").write_csv(arguments.csv)
    print(markdown(table))


if __name__ == "__main__":
    main()
