"""Time and memory of each step, for generated catalogues that grow: each in a process of its own.

    python -m benchmarks.scale --csv FILE [--items 10000 100000 1000000] [--steps import fit ...]

An item has `--interactions-per-item` interactions, 10 unless said, and one text vector of 64 numbers. Popularity falls
as 1 / rank; users have 10 interactions on average.
One row a catalogue and step:

seconds        of the step
units          what it went through: interactions, items or users
per_million    seconds for a million of them
peak_mb        most resident memory of the process

Steps: `import` reads, prepares and writes the data set. `codebooks` is the tokenizer's start, k-means over all items.
`tokenizer` and `training` are optimizer steps over all interactions, from the median of some; `training` with a softmax
over all items, `training, sampled` over 4096. `codes` are those of the catalogue; `evaluation` ranks all items for
users. `fit` is a whole run: tokenizer, one epoch with the sampled softmax, and all else that `bbqrec fit` does, for the
metrics of 2000 users.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl

WIDTH = 64
STEPS = 6  # optimizer steps to time; the first is left out
USERS = 512  # to rank items for
FIT_USERS = 2000  # that a whole run is validated and tested on
SAMPLED = 4096  # items of a sampled softmax
FULL_SOFTMAX = 200_000  # items up to which the exact softmax is timed


def generate(folder: Path, n_items: int, n_interactions: int) -> None:
    """A data set in the native format."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    n_users = n_interactions // 10
    ranks = np.exp(rng.uniform(0, np.log(n_items), n_interactions)).astype(np.int64) - 1  # density 1 / rank
    items = rng.permutation(n_items)[np.minimum(ranks, n_items - 1)]
    columns = {
        "user": rng.integers(n_users, size=n_interactions),
        "item": items,
        "timestamp": np.arange(n_interactions),
    }
    pl.DataFrame(columns).write_parquet(folder / "interactions.parquet")
    pl.DataFrame({"item": np.arange(n_items)}).write_parquet(folder / "items.parquet")
    (folder / "features").mkdir()
    np.save(folder / "features" / "text.npy", rng.standard_normal((n_items, WIDTH), dtype=np.float32))
    (folder / "features" / "text.items.txt").write_text("".join(f"{i}\n" for i in range(n_items)))


def import_(folder: Path) -> tuple[float, int]:
    from bbqrec import Dataset
    from bbqrec.data.preparation import prepare

    started = time.perf_counter()
    data = prepare(Dataset.load(folder)).data
    data.save(folder.parent / "imported")
    return time.perf_counter() - started, len(data.histories.items)


def codebooks(folder: Path) -> tuple[float, int]:
    import torch

    tokenizer, data = _tokenizer(folder)
    started = time.perf_counter()
    tokenizer.initialize_codebooks(torch.Generator().manual_seed(0))
    return time.perf_counter() - started, data.n_items


def codes(folder: Path) -> tuple[float, int]:
    tokenizer, data = _tokenizer(folder)
    started = time.perf_counter()
    tokenizer.eval().semantic_ids()
    return time.perf_counter() - started, data.n_items


def tokenizer(folder: Path) -> tuple[float, int]:
    import torch

    from bbqrec import Config
    from bbqrec.training.modules import TokenizerModule

    made, data = _tokenizer(folder)
    batches = _batches(data, Config().tokenizer.batch_tokens)
    module = TokenizerModule(made, Config(), batches, data.user_ids)
    optimizers = module.configure_optimizers()

    def step(batch) -> None:
        items = module.items_of_step(batch)
        losses = made.estimator_loss, lambda items: sum(made.losses(items, batch).values())
        for optimizer, loss in zip(reversed(optimizers), losses, strict=True):
            optimizer.zero_grad()
            loss(items).backward()
            optimizer.step()

    torch.manual_seed(0)
    return _timed_steps(step, batches), len(data.histories.items)


def training(folder: Path, sampled: int | None = None) -> tuple[float, int]:
    from bbqrec import Config
    from bbqrec.training.modules import SequenceModule

    config = Config().override({"model.sampled_items": sampled})
    model, data = _model(folder, config)
    batches = _batches(data, config.training.batch_tokens)
    optimizer = SequenceModule(model, config, batches, data.user_ids, None, data.n_items).configure_optimizers()

    def step(batch) -> None:
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()

    return _timed_steps(step, batches), len(data.histories.items)


def sampled_training(folder: Path) -> tuple[float, int]:
    return training(folder, sampled=SAMPLED)


def evaluation(folder: Path) -> tuple[float, int]:
    from bbqrec import Config
    from bbqrec.data.splits import Heldout, leave_one_out
    from bbqrec.evaluation import evaluate

    model, data = _model(folder, Config())
    test = leave_one_out(data).test
    some = Heldout(users=test.users[:USERS], histories=test.histories[:USERS], targets=test.targets[:USERS])
    started = time.perf_counter()
    evaluate(model.eval(), some, data.n_items, max_length=50)
    return time.perf_counter() - started, len(some)


def fit(folder: Path) -> tuple[float, int]:
    import bbqrec

    options = {
        "model.sampled_items": SAMPLED,
        "training.epochs": 1,
        "training.validation_users": FIT_USERS,
        "training.final_users": FIT_USERS,
    }
    started = time.perf_counter()
    run = bbqrec.fit(folder, folder.parent / "run", config=bbqrec.Config().override(options))
    return time.perf_counter() - started, len(run.data.histories.items)


STAGES: dict[str, Callable[[Path], tuple[float, int]]] = {
    "import": import_,
    "codebooks": codebooks,
    "tokenizer": tokenizer,
    "codes": codes,
    "training": training,
    "training, sampled": sampled_training,
    "evaluation": evaluation,
    "fit": fit,
}
UNITS = {"codebooks": "items", "codes": "items", "evaluation": "users"}


def _tokenizer(folder: Path):
    import torch

    from bbqrec import Config, Dataset
    from bbqrec.tokenizer import Tokenizer

    torch.manual_seed(0)
    data = Dataset.load(folder)
    return Tokenizer(data.features, data.n_items, Config().tokenizer, 50), data


def _model(folder: Path, config):
    """With random codes: what they are does not change the time."""
    import torch

    from bbqrec import Dataset
    from bbqrec.models.sequence_model import SequenceModel
    from bbqrec.tokenizer.item_encoder import catalogue_features
    from bbqrec.tokenizer.semantic_ids import SemanticIDs

    torch.manual_seed(0)
    data, options = Dataset.load(folder), config.tokenizer
    found = torch.randint(options.codebook_size, (data.n_items, 1, options.levels))
    books = torch.randn(1, options.levels, options.codebook_size, options.dim)
    ids, features = SemanticIDs(("text",), found, books), catalogue_features(data.features)
    model = SequenceModel(data.n_items, config.model, ids, features)
    model.similarity_weight.fill_(1)
    return model, data


def _batches(data, tokens: int):
    from bbqrec.data.batches import TrainingBatches
    from bbqrec.data.splits import leave_one_out

    return TrainingBatches(leave_one_out(data).train, 50, tokens, seed=0)


def _timed_steps(step: Callable, batches: Iterable) -> float:
    """Seconds of an epoch, from the median step."""
    times = []
    for batch in islice(batches, STEPS):
        started = time.perf_counter()
        step(batch)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * len(batches)


def run(stage: str, folder: Path) -> tuple[float, int, int]:
    """Seconds, units, and MB at most; to be called in a fresh process."""
    seconds, units = STAGES[stage](folder)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return seconds, units, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def plot(rows: list[dict], path: Path) -> None:
    """Seconds and memory of each step over the size of the catalogue; a straight line of slope 1 is linear growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (column, label) in zip(
        figure.subplots(1, 2), (("seconds", "seconds"), ("peak_mb", "peak memory, MB")), strict=True
    ):
        for stage in dict.fromkeys(row["step"] for row in rows):
            of_stage = [row for row in rows if row["step"] == stage]
            axes.loglog([row["items"] for row in of_stage], [row[column] for row in of_stage], marker=".", label=stage)
        axes.set(xlabel=f"items, with {rows[0]['interactions'] // rows[0]['items']} interactions each", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="catalogue sizes")
    parser.add_argument("--interactions-per-item", type=int, default=10)
    parser.add_argument("--steps", nargs="+", choices=STAGES, default=list(STAGES), metavar="STEP", help="default: all")
    parser.add_argument("--csv", type=Path, help="where the rows go, beside those of other steps, and a plot of all")
    arguments = parser.parse_args()

    import torch

    from benchmarks.machine import commit

    made = {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}
    rows: list[dict] = []
    if arguments.csv and arguments.csv.is_file():  # of other steps and sizes, which stay
        measured = {(n_items, stage) for n_items in arguments.items for stage in arguments.steps}
        rows = [row for row in pl.read_csv(arguments.csv).to_dicts() if (row["items"], row["step"]) not in measured]
    for n_items in arguments.items:
        n_interactions = n_items * arguments.interactions_per_item
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "data"
            generate(folder, n_items, n_interactions)
            for stage in arguments.steps:
                if stage == "training" and n_items > FULL_SOFTMAX:
                    continue
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    seconds, units, peak = pool.submit(run, stage, folder).result()
                what = {"units": units, "of": UNITS.get(stage, "interactions")}
                costs = {"seconds": round(seconds, 2), "per_million": round(seconds / units * 1e6, 1), "peak_mb": peak}
                rows.append({"items": n_items, "interactions": n_interactions, "step": stage, **what, **costs, **made})
                rows.sort(key=lambda row: (row["items"], list(STAGES).index(row["step"])))
                print(
                    f"{n_items:>9,} items  {stage:<18} {seconds:9.2f} s  "
                    f"{costs['per_million']:9.1f} s a million {what['of']:<12} {peak:6} MB",
                    flush=True,
                )
                if arguments.csv:
                    plot(rows, arguments.csv.with_suffix(".png"))
                    with arguments.csv.open("w", newline="") as file:
                        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
                        writer.writeheader()
                        writer.writerows(rows)


if __name__ == "__main__":
    main()
