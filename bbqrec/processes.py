"""Several processes that train one model together: who this one is, and what only the first of them does.

`torchrun` starts them, on one host or several; each holds the whole model (but see `bbqrec.models.shards`), and takes
its share of the batches and of the users that are ranked. Without it, all of this is about one process, and does
nothing.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(hours=4)  # for one that writes a large checkpoint; where one dies, torchrun ends the others


def rank_and_world() -> tuple[int, int]:
    """Number of this process, from 0, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_first() -> bool:
    return rank_and_world()[0] == 0


def local_world() -> int:
    """How many of the processes are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if rank_and_world()[1] > 1 else 1


@contextmanager
def together() -> Iterator[None]:
    """Joins the processes that `torchrun` started, with NCCL where there are GPUs and gloo otherwise.

    Does nothing where there is one process, or where they have joined already: whoever joins first leaves last.

    Raises `ConnectionError` where another process ended while this one waited for it.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    if not started or distributed.is_initialized():
        yield
        return
    has_gpus = torch.cuda.is_available()
    if has_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or "gloo/" in str(error)):  # gloo's are of no type of its own
            raise
        raise ConnectionError(
            f"processes: process {distributed.get_rank()} lost another of {distributed.get_world_size()}, whose own "
            "message says why; start all of them again to resume"
        ) from error
    finally:
        _forget_groups()
        distributed.destroy_process_group()


def _forget_groups() -> None:
    """Whoever keeps a group keeps threads of gloo, and those may abort a process that exits."""
    if "torch.distributed.tensor" in sys.modules:  # its cache holds the group of every tensor that was shared out
        from torch.distributed.tensor import debug

        # PyTorch's own name for it is private: where it has another one, the threads stay, and all else is the same.
        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()
        gc.collect()  # models in cycles hold it too


def first_does(do: Callable[[], object]) -> None:
    """Does it in the first process, while the others wait; what it raises, all raise."""
    if rank_and_world()[1] == 1:
        do()
        return
    outcome: list[Exception | None] = [None]
    if is_first():
        try:
            do()
        except Exception as error:  # whatever it is, the others must not wait for ever
            outcome[0] = error
    distributed.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]


def summed(value: Tensor) -> Tensor:
    """The sum over all processes; the same tensor where there is one."""
    if rank_and_world()[1] > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def gathered(part: Tensor, sizes: list[int] | None = None) -> list[Tensor]:
    """The parts `(sizes[r], ...)` of all processes r, on each of them; without `sizes` they ask each other for them."""
    world = rank_and_world()[1]
    if sizes is None:
        sizes = torch.cat(gathered(torch.tensor([len(part)], device=part.device), [1] * world)).tolist()
    if len(sizes) == 1:
        return [part]
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return [rows[:size] for rows, size in zip(parts, sizes, strict=True)]
