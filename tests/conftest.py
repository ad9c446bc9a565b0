"""Fixtures of all tests: fixed seeds, threads that fit the workers, the folder of real data."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Shares the cores among the workers of pytest-xdist; a test of threading sets its own number."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global state
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: BBQREC_SHARED_DATA, or shared/data beside the project."""
    folder = Path(os.environ.get("BBQREC_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; BBQREC_SHARED_DATA names another folder")
    return folder
