"""Times a training epoch of BBQRec against one of SASRec of equal width: the same batches, step by step in turns.

    python -m benchmarks.accuracy.epoch_time --data DATA [--steps 40]

Prints seconds per epoch of both, from the median step, and their ratio. The codes are those of a tokenizer before its
training: their values do not change the time of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from bbqrec import Config, Dataset
from bbqrec.data.batches import PackedBatch, TrainingBatches
from bbqrec.data.splits import leave_one_out
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.tokenizer import Tokenizer
from bbqrec.tokenizer.item_encoder import catalogue_features, principal_directions
from bbqrec.training.optimizer import RowwiseAdamW


def step(model: SequenceModel, optimizer: torch.optim.Optimizer, batch: PackedBatch) -> float:
    """Seconds of a training step."""
    started = time.perf_counter()
    optimizer.zero_grad()
    model.loss(batch).backward()
    optimizer.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set")
    parser.add_argument("--steps", type=int, default=40, help="batches to time, at most an epoch")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options")
    arguments = parser.parse_args()

    config, data = Config().override(arguments.set), Dataset.load(arguments.data)
    train = leave_one_out(data).train
    torch.manual_seed(0)
    tokenizer = Tokenizer(data.features, data.n_items, config.tokenizer, config.model.max_length)
    tokenizer.initialize_codebooks(torch.Generator().manual_seed(0))
    batches = TrainingBatches(train, config.model.max_length, config.training.batch_tokens, seed=0)
    features = catalogue_features(data.features, principal_directions(data.features, config.model.feature_width))
    models = {
        "SASRec": SequenceModel(data.n_items, config.override({"model_name": "sasrec"}).model),
        "BBQRec": SequenceModel(data.n_items, config.model, tokenizer.eval().semantic_ids(), features),
    }
    options = {"lr": config.training.learning_rate, "weight_decay": config.training.weight_decay}
    optimizers = {name: RowwiseAdamW(model.parameters(), [], **options) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for n, batch in enumerate(batches):
        if n > arguments.steps:
            break
        for name, model in models.items():
            seconds[name].append(step(model.train(), optimizers[name], batch))
    epoch = {name: len(batches) * statistics.median(times[1:]) for name, times in seconds.items()}
    print(f"{data.name}: " + ", ".join(f"{name} {value:.2f} s an epoch" for name, value in epoch.items()), end="; ")
    print(f"ratio {epoch['BBQRec'] / epoch['SASRec']:.2f} ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
