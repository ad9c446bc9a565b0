"""The files that say what to measure on a data set, and the rows that were measured."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import polars as pl
import yaml
from pydantic import BaseModel, ConfigDict, Field

from bbqrec.data.files import atomically

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))  # of data sets
RESULTS = FOLDER.parent / "results" / "accuracy"

GRID = {"model.dropout": (0.2, 0.35, 0.5, 0.65), "training.weight_decay": (0.05, 0.5)}
POINTS = [
    [f"{key}={value}" for key, value in zip(GRID, point, strict=True)] for point in itertools.product(*GRID.values())
]
IN_GRID = ("sasrec", "sasrec-features", "bbqrec")  # runs that are measured at each of its points


class Entry(BaseModel):
    """One line of a table."""

    model_config = ConfigDict(extra="forbid")

    model: Literal["most_popular", "item_knn", "sasrec", "tiger", "bbqrec"]
    options: list[str] = []
    seeds: int = Field(1, ge=1)
    in_parts: bool = False  # whether the table of parts has it


class Published(BaseModel):
    """What others report."""

    model_config = ConfigDict(extra="forbid")

    model: str
    recall: float
    ndcg: float
    source: str


class Runs(BaseModel):
    """A YAML file of this folder, and its rows."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    title: str
    published: list[Published] = []
    runs: dict[str, Entry]
    name: str
    csv: Path
    rows: pl.DataFrame

    @classmethod
    def load(cls, name: str, csv: Path | None = None) -> Runs:
        """Reads `<name>.yaml` here, and the rows of a CSV file, by default that of the results."""
        csv = csv or RESULTS / f"{name}.csv"
        values: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        return cls(**values, name=name, csv=csv, rows=_rows_of(csv))

    @classmethod
    def load_grid(cls, name: str, csv: Path | None = None) -> Runs:
        """The same models at each point of the grid, as runs called `bbqrec model.dropout=0.2 ...`."""
        runs = cls.load(name, csv or RESULTS / f"{name}-grid.csv")
        entries = [(run, runs.runs[run], point) for run in IN_GRID if run in runs.runs for point in POINTS]
        runs.runs = {
            " ".join([run, *point]): Entry(model=entry.model, options=[*entry.options, *point])
            for run, entry, point in entries
        }
        return runs

    def has(self, run: str, seed: int) -> bool:
        return not self.rows.is_empty() and not self.rows.filter(run=run, seed=seed).is_empty()

    def of(self, run: str, split: str) -> pl.DataFrame:
        """The rows of a run, one a seed."""
        return self.rows if self.rows.is_empty() else self.rows.filter(run=run, split=split).sort("seed")

    def add(self, rows: list[dict[str, object]]) -> None:
        """Adds rows to the file, to which another call may have added since: stopped later, it has lost none."""
        new = pl.DataFrame(rows, infer_schema_length=None)
        there = _rows_of(self.csv)
        self.rows = new if there.is_empty() else pl.concat([there, new], how="diagonal_relaxed")
        order = {run: place for place, run in enumerate(self.runs)}
        by_file = pl.col("run").replace_strict(order, default=len(order), return_dtype=pl.Int64)
        self.rows = self.rows.sort(by_file, "seed", "split")
        self.csv.parent.mkdir(parents=True, exist_ok=True)
        atomically(self.csv, self.rows.write_csv)


def _rows_of(csv: Path) -> pl.DataFrame:
    return pl.read_csv(csv, infer_schema_length=None) if csv.is_file() else pl.DataFrame()
