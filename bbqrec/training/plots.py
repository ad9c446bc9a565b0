"""Pictures of a run: learning curves and use of the codebooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bbqrec.data.files import atomically, panics_raised
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training.run import damage_named

STAGES = ("tokenizer", "sequence_model")


def read_log(folder: Path) -> pl.DataFrame:
    """The CSV logs of one stage as one row an epoch: every start of a run wrote a `version_*`, the latest counts."""
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    frames = []
    for path in versions:
        lines = path.read_bytes().splitlines(keepends=True)
        whole = b"".join(line for line in lines if line.endswith(b"\n"))  # a stop may have cut the last one off
        if whole:
            with damage_named(path):
                frames.append(_read(whole))
    if not frames:
        return pl.DataFrame({"epoch": []})
    rows = pl.concat(frames, how="diagonal_relaxed")
    return rows.group_by("epoch").agg(pl.all().drop_nulls().last()).sort("epoch")


def _read(content: bytes) -> pl.DataFrame:
    """All columns are numbers."""
    with panics_raised():
        frame = pl.read_csv(content, infer_schema=False)
        return frame.select(pl.col("epoch").cast(pl.Int64), pl.exclude("epoch").cast(pl.Float64))


def save_curves(path: Path, logs: Path) -> None:
    """Training losses of every stage, and the validation metrics, over epochs."""
    tables = {stage: read_log(logs / stage) for stage in STAGES if (logs / stage).is_dir()}
    panels = []  # (title, log, columns)
    for stage, table in tables.items():
        title = stage.replace("_", " ")
        for prefix, what in (("train/", "training loss"), ("validation/", "validation")):
            columns = [name for name in table.columns if name.startswith(prefix)]
            if columns:
                panels.append((f"{title}: {what}", table, columns))
    figure = Figure(figsize=(5 * max(1, len(panels)), 3.6), layout="constrained")
    for n, (title, table, columns) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), n)
        for name in columns:
            axes.plot(
                table["epoch"] + 1, table[name], label=name.split("/", 1)[1], marker="." if len(table) < 3 else ""
            )
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.legend(fontsize="small")
        if "loss" in title:
            _log_scale_if_positive(axes, table, columns)
    _save(figure, path)


def save_codebook_usage(path: Path, semantic_ids: SemanticIDs) -> None:
    """For every level, how often each codeword is used, the most used first, by modality."""
    levels = semantic_ids.codes.shape[2]
    figures = semantic_ids.figures()
    figure = Figure(figsize=(3.4 * levels, 3.2), layout="constrained")
    for level, axes in enumerate(figure.subplots(1, levels, squeeze=False, sharey=True)[0]):
        for m, name in enumerate(semantic_ids.modalities):
            codes = semantic_ids.codes[:, m, level].numpy()
            counts = np.bincount(codes[codes >= 0], minlength=semantic_ids.codebook_size)
            axes.plot(np.sort(counts)[::-1], label=name.replace("$", r"\$"), drawstyle="steps-mid")
        axes.set_title(
            f"level {level}: {figures['usage'][level]:.0%} used, perplexity {figures['perplexity'][level]:.0f}"
        )
        axes.set_xlabel("codeword, by rank")
    figure.axes[0].set_ylabel("items")
    figure.axes[0].legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _log_scale_if_positive(axes: Axes, table: pl.DataFrame, columns: list[str]) -> None:
    if all((table[name].drop_nulls() > 0).all() for name in columns):
        axes.set_yscale("log")
