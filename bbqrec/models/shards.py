"""Tables of items that processes share out among them, as PyTorch's distributed tensors, and what crosses over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

from bbqrec.processes import gathered, rank_and_world, summed


class ItemShards:
    """Which rows of the tables of items this process holds, and how it gets what depends on others.

    Every process holds a run of consecutive rows, all equally long but the last one: `Shard(0)` of a
    `torch.distributed.tensor.DTensor`, which the tables are. All processes have to call `look_up` and `whole` together.

    Args:
        n_items: size of the catalogue.

    Attributes:
        rank: number of this process.
        sizes: rows of each process.
        first: number of the first row of this one.

    Raises `ValueError` where a process would have no row.
    """

    def __init__(self, n_items: int):
        self.rank, world = rank_and_world()
        self.sizes = shard_sizes(n_items, world)
        self.first = self.rank * self.sizes[0]
        self._mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world,))

    def share(self, table: Tensor) -> Tensor:
        """A distributed tensor of the same values `(n_items, ...)`, of which this process keeps its rows alone."""
        from torch.distributed.tensor import DTensor, Shard  # takes a second, which few who read models need

        own = table.detach()[self.first : self.first + self.sizes[self.rank]].clone()
        options = {"run_check": False, "shape": table.shape, "stride": table.stride()}
        return DTensor.from_local(own, self._mesh, [Shard(0)], **options)

    def whole(self, table: Tensor) -> Tensor | None:
        """The whole of a distributed table, in the memory of the first process's host; None for the others.

        It crosses over share by share, so that no device ever holds more than its own.
        """
        own = own_rows(table.detach()).cpu()
        if self.rank:
            distributed.send(own, 0)
            return None
        whole = own.new_empty(table.shape)
        for rank, rows in enumerate(whole.split(self.sizes)):
            if rank:
                distributed.recv(rows, rank)
            else:
                rows.copy_(own)
        return whole

    def look_up(self, items: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What is made of the rows of `items`, in the processes that hold them: `(T, ...)`, differentiable.

        Args:
            items: `(T,)` int64, which this process asks for; others have questions of their own, any number of them.
            make: what `(N,)` own rows, counted from `first`, are to give: `(N, ...)`. They are those that anybody asks
                for, and their gradients are sums over all who do.
        """
        asked = gathered(items)
        rows = torch.cat(asked) - self.first
        is_own = (rows >= 0) & (rows < self.sizes[self.rank])
        return _Exchange.apply(make(rows[is_own]), is_own, [len(part) for part in asked])


class _Exchange(torch.autograd.Function):
    """Answers of the processes to questions of all of them, in turn: each gets those to its own."""

    @staticmethod
    def forward(ctx, answers: Tensor, is_own: Tensor, questions: list[int]) -> Tensor:
        ctx.save_for_backward(is_own)
        ctx.questions = questions
        found = answers.new_zeros(len(is_own), *answers.shape[1:])
        found[is_own] = answers
        return summed(found).split(questions)[rank_and_world()[0]].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (is_own,) = ctx.saved_tensors
        return torch.cat(gathered(grad, ctx.questions))[is_own], None, None


def shard_sizes(n_items: int, processes: int) -> list[int]:
    """Rows that each of the processes holds. Raises `ValueError` where one would have none."""
    size = -(-n_items // processes)
    if size * (processes - 1) >= n_items:
        raise ValueError(
            f"model.sharded_items: got true for {n_items} items and {processes} processes, one of which would have no "
            "item; start fewer, or set it to false"
        )
    return [min(size, n_items - start) for start in range(0, n_items, size)]


def own_rows(table: Tensor) -> Tensor:
    """The rows that this process holds: all of them, if it is no distributed tensor. Gradients go to the table."""
    return table.to_local() if hasattr(table, "to_local") else table
