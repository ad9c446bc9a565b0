"""`fit`: from a data set to a finished run folder, resuming where an earlier call stopped."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from bbqrec.config import Config
from bbqrec.data.batches import TrainingBatches
from bbqrec.data.dataset import Dataset, Features
from bbqrec.data.splits import Split, leave_one_out
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.tokenizer.model import Tokenizer
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training import plots
from bbqrec.training.modules import VALIDATION_METRIC, EpochSeeded, SequenceModule, TokenizerModule
from bbqrec.training.run import Run, save_model, versions, write_json


def fit(
    data: Dataset | str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    config: Config | None = None,
    progress: bool | None = None,
) -> Run:
    """Trains a recommender and writes its run folder (see `bbqrec.training.run`).

    Args:
        data: a data set, or the path of one.
        out: the run folder. If it holds an unfinished run of the same data and options, that run is resumed; a
            finished one is returned as it is.
        model: "bbqrec" or "sasrec"; overrides `config.model_name`.
        config: options; the defaults of `Config` otherwise.
        progress: show progress bars; by default only on a terminal.

    Returns:
        The finished `Run`.

    Raises:
        ValueError: the data cannot be used, `out` holds another run, or the options do not fit the data.
    """
    if not isinstance(data, Dataset):
        data = Dataset.load(data)
    config = config or Config()
    if model is not None:
        config = config.override({"model_name": model})
    folder = Path(out)
    run = _claim(folder, data, config)
    if run.finished:
        return run

    started = time.perf_counter()
    split = leave_one_out(data)
    trainers = _Trainers(folder, sys.stderr.isatty() if progress is None else progress)
    semantic_ids = _fit_tokenizer(data, split, config, trainers) if config.model_name == "bbqrec" else None
    titles = [data.title(i) for i in range(data.n_items)]
    if semantic_ids is None:
        semantic_ids_table = SemanticIDs((), torch.empty(data.n_items, 0, 0, dtype=torch.int64), torch.empty(0, 0, 0, 0))
    else:
        semantic_ids_table = semantic_ids
    semantic_ids_table.save_table(folder / "semantic_ids.parquet", data.item_ids, titles)
    sequence_model = _fit_sequence_model(data, split, config, semantic_ids, trainers)

    save_model(sequence_model, folder / "model.safetensors")
    plots.save_curves(folder / "curves.png", folder / "logs")
    if semantic_ids is not None:
        plots.save_codebook_usage(folder / "codebooks.png", semantic_ids)
    metrics = _final_metrics(run, data, split, sequence_model, semantic_ids)
    facts = {**run.facts, "seconds": round(run.facts.get("seconds", 0) + time.perf_counter() - started, 1)}
    write_json(folder / "run.json", facts)
    write_json(folder / "metrics.json", metrics)  # last: it says that the run is finished
    return Run(folder, data)
