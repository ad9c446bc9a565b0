"""Fits one model and measures how good it is, and how slow and how large."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from bbqrec import Config, Dataset, fit
from bbqrec.config import ModelConfig
from bbqrec.data.splits import Heldout, Split, leave_one_out
from bbqrec.evaluation import Ranker, metrics_of, target_ranks
from bbqrec.evaluation.ranking import METRICS
from bbqrec.models import ItemKNN, MostPopular
from bbqrec.training.run import device, versions
from benchmarks.machine import commit

DECAYS = (0, 0.3, 0.5, 0.7, 0.9, 1)  # of item-kNN, chosen by validation NDCG@10
SHORT = 4  # interactions of a history that count as few
RARE = 5  # interactions of an item, in training
PARTS = ("kept", "cold", "rare", "short")  # see `part_metrics`


def measure(data: Dataset, name: str, model: str, options: list[str], seed: int, out: Path) -> list[dict[str, object]]:
    """Fits a model, or finds it fitted, and returns its rows, of validation and of test."""
    split, started = leave_one_out(data), time.perf_counter()
    made = {"commit": commit(), "device": device(), **versions()}
    max_length = ModelConfig().max_length
    if model == "most_popular":
        ranker: Ranker = MostPopular(split.train, data.n_items)
        costs = {"seconds": None, "peak_memory_mb": None}
    elif model == "item_knn":
        ranker, options = best_item_knn(data, split, max_length)
        costs = {"seconds": round(time.perf_counter() - started, 1), "peak_memory_mb": None}
    else:
        folder = out / f"{name}-{seed}"
        config = Config().override([*options, f"training.seed={seed}"])
        note = out / f"{name}-{seed}.commits"  # beside the folder, where `fit` wants nothing of others
        trained_by = note.read_text().split() if note.exists() else []
        if made["commit"] not in trained_by and not (folder / "metrics.json").exists():
            trained_by.append(made["commit"])
            out.mkdir(parents=True, exist_ok=True)
            note.write_text(" ".join(trained_by))
        run = fit(data, folder, model=model, config=config)
        ranker, max_length = run.model.eval(), run.config.model.max_length
        costs = {key: run.facts[key] for key in ("seconds", "peak_memory_mb")}
        made |= {"device": run.facts["device"], **run.facts["versions"]}
        made["commit"] = " ".join(trained_by) or made["commit"]
    facts = {"run": name, "model": model, "options": " ".join(options), "seed": seed}
    rows = []
    for part, heldout in (("validation", split.validation), ("test", split.test)):
        metrics = part_metrics(ranker, heldout, split.train.items, data.n_items, max_length)
        rows.append({**facts, "split": part, **metrics, **costs, "data": data.name, **made})
    return rows


def best_item_knn(data: Dataset, split: Split, max_length: int) -> tuple[ItemKNN, list[str]]:
    """The item-kNN whose decay is best on validation, and what to call that."""
    rankers = {decay: ItemKNN(data.features, decay).eval() for decay in DECAYS}

    def found(decay: float) -> float:
        ranks = target_ranks(rankers[decay], split.validation, data.n_items, max_length=max_length)
        return metrics_of(ranks)["ndcg@10"]

    best = max(DECAYS, key=found)
    return rankers[best], [f"decay={best}"]


def part_metrics(
    ranker: Ranker, heldout: Heldout, trained: np.ndarray, n_items: int, max_length: int
) -> dict[str, float | None]:
    """Metrics with the history removed, and apart: with the history `kept`, of targets that training never saw
    (`cold`) or saw at most `RARE` times, of users with at most `SHORT` interactions before."""
    ranks = target_ranks(ranker, heldout, n_items, max_length=max_length)
    kept = target_ranks(ranker, heldout, n_items, max_length=max_length, keep_history=True)
    times = np.bincount(trained, minlength=n_items)[heldout.targets]
    parts = {"kept": kept, "cold": ranks[times == 0], "rare": ranks[(times > 0) & (times <= RARE)]}
    parts["short"] = ranks[heldout.histories.lengths <= SHORT]
    found: dict[str, float | None] = {name: round(metrics_of(ranks)[name], 5) for name in METRICS}
    for part in PARTS:
        metrics = metrics_of(parts[part]) if len(parts[part]) else {}
        found |= {f"{part}/{name}": _rounded(metrics.get(name)) for name in ("recall@10", "ndcg@10")}
        found[f"{part}/users"] = len(parts[part])
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
