"""Lightning as `fit` uses it: checkpoints of the best and the latest epoch, early stopping, logs, and no chatter."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy

from bbqrec.data.files import Sink, atomically, storage_faults_named
from bbqrec.processes import local_world, rank_and_world
from bbqrec.training.modules import VALIDATION_METRIC, EpochSeeded
from bbqrec.training.run import damage_named


@dataclass(frozen=True)
class Stage:
    """One training of a run: where it keeps its files and when it ends.

    Attributes:
        folder: the run folder.
        name: of the stage, for `logs/<name>` and `checkpoints/<name>`.
        epochs: upper limit.
        patience: epochs without a better validation metric before stopping; None trains all epochs.
        decay_after: after every so many of them, the learning rate falls to a third.
    """

    folder: Path
    name: str
    epochs: int
    patience: int | None = None
    decay_after: int = 1

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / self.name

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """Of the epoch that counts: without patience that is the last one."""
        return self.last if self.patience is None else self.checkpoints / "best.ckpt"


def train(
    module: EpochSeeded, stage: Stage, *, bars: bool = False, say: Callable[[str], object] | None = None
) -> dict[str, Any]:
    """Trains a module, from its latest checkpoint where there is one, or from the best one where that is damaged.

    Args:
        bars: show progress bars.
        say: is told where training goes on from an earlier epoch than the latest.

    Returns:
        `state_dict` and `epoch` (from 0) of the best epoch (of the last one, without patience), and `epochs_run`.

    Raises:
        ValueError: there is no checkpoint that is whole, though there are some; or training diverges.
        OSError: the disk is full; the checkpoints of the epochs before stay.
        KeyboardInterrupt: the user stopped it; likewise.
    """
    callbacks: list[Callback] = [TQDMProgressBar(leave=True)] if bars else []
    if stage.patience is not None:
        callbacks.append(_Patience(stage.decay_after, monitor=VALIDATION_METRIC, mode="max", patience=stage.patience))
        callbacks.append(_keep(stage, "best", monitor=VALIDATION_METRIC, mode="max"))
    callbacks.append(_keep(stage, "last"))  # `save_last` would keep it only of the epochs that are best
    csv = CSVLogger(stage.folder / "logs", name=stage.name)  # every start writes a new version
    tensorboard = TensorBoardLogger(stage.folder / "logs", name=stage.name, version=f"version_{csv.version}")
    with _silent_lightning(), storage_faults_named(stage.folder, "logs and checkpoints"):
        trainer = L.Trainer(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",  # Apple's MPS has no float64, nor our kernels
            **_processes(module),
            max_epochs=stage.epochs,
            callbacks=callbacks,
            plugins=[_AtomicCheckpoints()],
            logger=[csv, tensorboard],
            enable_progress_bar=bars,
            enable_model_summary=False,
            reload_dataloaders_every_n_epochs=1,  # a new loader: its batches are those of the epoch
        )
        _fit_interruptibly(trainer, module, stage, _latest_whole(stage, say))
        trainer.strategy.barrier()  # the first process writes checkpoints
    best = read_checkpoint(stage.best)
    return {"state_dict": best["state_dict"], "epoch": best["epoch"], "epochs_run": trainer.current_epoch}


def _processes(module: L.LightningModule) -> dict[str, Any]:
    """Options of a trainer: one device for each process on each host."""
    _, world = rank_and_world()
    if world == 1:
        return {"devices": 1}
    # Buffers are equal everywhere: codebooks by summed statistics, the rest from the start. CLUB's estimators have a
    # backward of their own: in each, the parameters of the others get no gradient.
    strategy = DDPStrategy(broadcast_buffers=False, find_unused_parameters=not module.automatic_optimization)
    nodes, here = world // local_world(), local_world()
    return {"devices": here, "num_nodes": nodes, "strategy": strategy, "use_distributed_sampler": False}


class _AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside the former checkpoint and then replaces it.

    Lightning's own writes in the folder for temporary files, often on another disk: moving it from there is a copy,
    and who is killed in the middle of it has half a checkpoint and no former one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        del storage_options
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda temporary: _save(checkpoint, temporary))


class _Patience(EarlyStopping):
    """Early stopping that lowers the learning rate while it waits.

    It stays stopped when a run is resumed between its last epoch and its end.
    """

    def __init__(self, decay_after: int, **options: Any):
        super().__init__(**options)
        self.decay_after = decay_after

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del pl_module
        trainer.should_stop = self.wait_count >= self.patience

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Comes after the validation of the epoch, and before its checkpoint, which keeps the learning rate."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.wait_count and self.wait_count % self.decay_after == 0:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] /= 3


def _save(checkpoint: dict[str, Any], path: str) -> None:
    with Sink(path) as file:
        torch.save(checkpoint, file)


def _latest_whole(stage: Stage, say: Callable[[str], object] | None) -> Path | None:
    """The checkpoint to go on from, None where there is none yet: damage is told from what goes wrong in training."""
    if not stage.last.is_file():
        return None
    try:
        read_checkpoint(stage.last)
    except ValueError as error:
        if stage.best == stage.last or not stage.best.is_file():
            raise
        epoch = read_checkpoint(stage.best)["epoch"] + 1
        if say is not None:
            say(f"{str(error).partition(';')[0]}; goes on from {stage.best.name}, after epoch {epoch}")
        return stage.best
    if stage.best.is_file():
        read_checkpoint(stage.best)  # the end needs it, if no later epoch is better
    return stage.last


def read_checkpoint(path: Path) -> dict[str, Any]:
    with damage_named(path, f"delete the folder {path.parent}, and fit trains this stage anew"):
        with ZipFile(path) as file:  # it has checksums, and PyTorch does not look at them
            if spoiled := file.testzip():
                raise ValueError(f"{spoiled} in it has another checksum")
        return torch.load(path, map_location="cpu", weights_only=True)  # written on a GPU, read without one


class _Keeper(ModelCheckpoint):
    """Knows which epoch was the best in a run folder that was moved or copied, too: Lightning forgets it there."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return path and str(Path(self.dirpath) / Path(path).name)

        moved = {name: here(path) for name, path in state_dict.items() if name.endswith("_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath})


def _keep(stage: Stage, name: str, **monitor: str) -> ModelCheckpoint:
    """Keeps the checkpoint `<name>.ckpt` of the best epoch where a metric is monitored, otherwise of the latest."""
    return _Keeper(stage.checkpoints, filename=name, enable_version_counter=False, **monitor)


def _fit_interruptibly(trainer: L.Trainer, module: EpochSeeded, stage: Stage, checkpoint: Path | None) -> None:
    """`trainer.fit`, but Ctrl-C raises KeyboardInterrupt; Lightning would exit, and ignore Ctrl-C from then on."""
    try:
        handler = signal.getsignal(signal.SIGINT)
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        what = f"in epoch {trainer.current_epoch + 1} of the {stage.name.replace('_', ' ')}"
        raise KeyboardInterrupt(f"{what}; {module.last_good_checkpoint()}") from None


@contextmanager
def _silent_lightning() -> Iterator[None]:
    """Keeps Lightning's tips and its warnings about choices that are deliberate here from the user."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
