"""AdamW for a table of which a step touches few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bbqrec.models.shards import own_rows


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW that, of the tables given as `tables`, changes only the rows with a gradient, weight decay included.

    A row's averages are over the steps that have it, so it goes as if the others had not been, with one exception: in
    the mean of squares they count, as steps whose gradient is zero. AdamW moves a row on for some steps after one that
    has it; here it goes all that way at once. Otherwise rows that are seldom there would learn far less.

    With sparse gradients a step costs what it touches; with several processes they are dense. Neither
    `torch.optim.SparseAdam` does: it has no weight decay, and corrects rows for the steps of all.

    Args:
        parameters: all that AdamW trains as ever.
        tables: `(N, dim)` each; of a distributed one, each process moves its own rows.
        options: those of `torch.optim.AdamW`.
    """

    def __init__(self, parameters: Iterable[Tensor], tables: Iterable[Tensor], **options: Any):
        super().__init__([{"params": list(parameters)}], fused=True, **options)  # in a fifth of the time on a CPU
        self.tables = list(tables)
        if self.tables:
            self.add_param_group({"params": self.tables})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for table in self.tables:
            if table.grad is not None:
                self._step_of_rows(table, self.param_groups[-1])
                table.grad = None  # done: what is left is for AdamW
        super().step()
        return loss

    def _step_of_rows(self, table: Tensor, options: dict[str, Any]) -> None:
        rows, gradient = _rows_with_gradient(own_rows(table.grad))
        state = self.state[table]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
            state["step"] = torch.zeros_like(table[:, :1])
            state["steps_of_all"] = torch.zeros((), device=table.device)
        state["steps_of_all"] += 1
        table, state = own_rows(table), {name: own_rows(value) for name, value in state.items()}
        (first, second), rate = options["betas"], options["lr"]
        steps = state["step"][rows] + 1
        mean = state["exp_avg"][rows].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"][rows].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        for name, value in (("step", steps), ("exp_avg", mean), ("exp_avg_sq", square)):
            state[name].index_copy_(0, rows, value)
        # Of AdamW's mean of squares for a row that every r-th step has: (1 - b) (1 + b^r + b^2r + ...) = share.
        share = (1 - second) / (1 - second ** (state["steps_of_all"] / steps))
        size = (square / (1 - second**steps) * share).sqrt_().add_(options["eps"])
        moved = table[rows] * (1 - rate * options["weight_decay"]) - rate * (mean / (1 - first**steps)) / size
        table.index_copy_(0, rows, moved)


def _rows_with_gradient(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers `(R,)` of the rows that are not all zero, and these `(R, dim)`."""
    if not gradient.is_sparse:
        rows = gradient.any(1).nonzero()[:, 0]
        return rows, gradient[rows]
    gradient = gradient.coalesce()
    there = gradient.values().any(1)
    return gradient.indices()[0, there], gradient.values()[there]
