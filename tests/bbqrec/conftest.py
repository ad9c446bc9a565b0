"""A tiny data set, batches written out by hand, and finished runs that tests share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bbqrec import Config, Dataset, Run, fit
from bbqrec.data.batches import PackedBatch, pack_histories
from bbqrec.data.demo import make_demo_dataset
from bbqrec.training.plots import Figure

TINY = {
    "tokenizer.levels": 3,
    "tokenizer.codebook_size": 8,
    "tokenizer.dim": 16,
    "tokenizer.hidden": 16,
    "tokenizer.epochs": 3,
    "tokenizer.batch_tokens": 256,
    "tokenizer.batch_items": 32,
    "model.dim": 16,
    "model.max_length": 12,
    "training.epochs": 4,
    "training.patience": 2,
    "training.batch_tokens": 256,
    "training.learning_rate": 0.01,
}


@pytest.fixture(scope="session")
def training_batch() -> Callable[..., PackedBatch]:
    """What training sees of histories: all but the last item of each, with the item that follows as target."""

    def make(*histories: list[int]) -> PackedBatch:
        packed = pack_histories([np.array(history[:-1]) for history in histories], max_length=12)
        return replace(packed, targets=torch.tensor([item for history in histories for item in history[1:]]))

    return make


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return Config().override(TINY)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_demo_dataset(n_users=150, n_items=60).save(folder)
    return Dataset.load(folder)


@pytest.fixture(scope="session")
def timed_data(tiny_data: Dataset) -> Dataset:
    """The same with timestamps: minutes to months between one interaction and the next."""
    gaps = np.exp(np.random.default_rng(0).uniform(4, 17, len(tiny_data.histories.items)))
    times = gaps.astype(np.int64).cumsum()
    return replace(tiny_data, histories=replace(tiny_data.histories, timestamps=times))


@pytest.fixture(scope="session")
def bbqrec_run(tiny_data: Dataset, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run("bbqrec", tiny_data, tiny_config, tmp_path_factory)


@pytest.fixture(scope="session")
def sasrec_run(tiny_data: Dataset, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run("sasrec", tiny_data, tiny_config, tmp_path_factory)


@pytest.fixture(scope="session")
def tiger_run(tiny_data: Dataset, tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run("tiger", tiny_data, tiny_config.override({"model.beam": 30}), tmp_path_factory)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files: drawing them is over half of a tiny run. tests/bbqrec/training/test_plots.py draws."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **options: Path(path).touch())


def _run(model: str, data: Dataset, config: Config, folders: pytest.TempPathFactory) -> Run:
    out: Path = folders.mktemp("runs") / model
    return fit(data, out, model=model, config=config, progress=False)
