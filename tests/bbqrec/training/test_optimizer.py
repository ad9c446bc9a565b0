"""`RowwiseAdamW` against `torch.optim.AdamW` on the rows that a step touches."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bbqrec.training.optimizer import RowwiseAdamW

OPTIONS = {"lr": 0.1, "weight_decay": 0.3, "eps": 1e-8}
STEPS = [[0, 3], [3], [3, 1], [0, 3]]  # rows of each step; 2 and 4 have none


def step_alone(optimizer: torch.optim.AdamW, options: dict, steps: int, steps_of_all: int) -> None:
    """A step whose mean of squares counts those without this row as well: it is as much smaller."""
    _, beta = options.get("betas", (0.9, 0.999))
    factor = ((1 - beta ** (steps_of_all / steps)) / (1 - beta)) ** 0.5
    (group,) = optimizer.param_groups
    group |= {"lr": options["lr"] * factor, "weight_decay": options["weight_decay"] / factor}
    group["eps"] = options["eps"] * factor
    optimizer.step()


@pytest.fixture(params=[True, False], ids=["sparse", "dense"])
def trained(request):
    """A table and a matrix, trained together, and the gradients of the table."""
    torch.manual_seed(0)
    table, matrix = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 4))
    start = table.detach().clone(), matrix.detach().clone()
    optimizer, gradients = RowwiseAdamW([matrix], [table], **OPTIONS), []
    for rows in STEPS:
        values = nn.functional.embedding(torch.tensor(rows), table, sparse=request.param) @ matrix

        def loss(values=values):
            optimizer.zero_grad()
            (values**3).sum().backward()
            gradients.append((table.grad.to_dense().clone(), matrix.grad.clone()))
            return values.sum()

        assert optimizer.step(loss) is not None
    return start, (table, matrix), optimizer, gradients


def test_each_row_goes_as_if_it_were_alone_but_faster_where_it_is_seldom(trained):
    start, (table, _matrix), _, gradients = trained
    for row in range(5):
        alone, steps = nn.Parameter(start[0][row].clone()), 0
        optimizer = torch.optim.AdamW([alone], **OPTIONS)
        for n, (rows, (gradient, _)) in enumerate(zip(STEPS, gradients, strict=True), 1):
            if row in rows:
                alone.grad, steps = gradient[row], steps + 1
                step_alone(optimizer, OPTIONS, steps, n)
        torch.testing.assert_close(table[row], alone)
    assert torch.equal(table[[2, 4]], start[0][[2, 4]])


def test_other_parameters_go_as_with_adamw(trained):
    start, (_table, matrix), _, gradients = trained
    alone = nn.Parameter(start[1])
    optimizer = torch.optim.AdamW([alone], **OPTIONS)
    for _, gradient in gradients:
        alone.grad = gradient
        optimizer.step()
    assert torch.equal(matrix, alone)


def test_a_restored_state_is_where_its_table_is(trained):
    _, (table, matrix), optimizer, _ = trained
    elsewhere = [nn.Parameter(tensor.detach().to("meta")) for tensor in (table, matrix)]
    other = RowwiseAdamW([elsewhere[1]], [elsewhere[0]], **OPTIONS)
    other.load_state_dict(optimizer.state_dict())
    assert {name: value.device.type for name, value in other.state[elsewhere[0]].items()} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "step", "steps_of_all"), "meta"
    )


def test_a_restored_state_goes_on_alike(trained):
    _, (table, matrix), optimizer, _ = trained
    copies = [nn.Parameter(each.detach().clone()) for each in (table, matrix)]
    restored = RowwiseAdamW(copies[1:], copies[:1], **OPTIONS)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, (own, other) in ((optimizer, (table, matrix)), (restored, copies)):
        one.zero_grad()
        (own[[1, 4]] @ other).square().sum().backward()
        one.step()
    assert torch.equal(table, copies[0])
    assert torch.equal(matrix, copies[1])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_rows_in_any_order(data):
    n_rows = data.draw(st.integers(1, 5))
    steps = data.draw(st.lists(st.lists(st.integers(0, n_rows - 1), max_size=4), max_size=5))
    rate, beta = (st.floats(1e-3, 1), st.floats(0, 0.99))
    options = {
        "lr": data.draw(rate),
        "weight_decay": data.draw(rate),
        "betas": (data.draw(beta), data.draw(beta)),
        "eps": 1e-8,
    }
    sparse = data.draw(st.booleans())
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(n_rows, 3))
    optimizer = RowwiseAdamW([], [table], **options)
    rows = [nn.Parameter(row.clone()) for row in table.detach()]
    alone = [torch.optim.AdamW([row], **options) for row in rows]
    counts, steps_of_all = [0] * n_rows, 0
    for step in steps:
        optimizer.zero_grad()
        for each in alone:
            each.zero_grad()
        weights = torch.randn(len(step), 3)  # a row that is there twice has the sum of both gradients
        if step:
            (nn.functional.embedding(torch.tensor(step), table, sparse=sparse) * weights).sum().backward()
            sum((rows[row] * weight).sum() for row, weight in zip(step, weights, strict=True)).backward()
        optimizer.step()
        steps_of_all += bool(step)
        for row in set(step):
            counts[row] += 1
            step_alone(alone[row], options, counts[row], steps_of_all)
    torch.testing.assert_close(table.detach(), torch.stack([row.detach() for row in rows]), rtol=1e-4, atol=1e-5)


def test_seldom_seen_rows_end_where_adam_takes_them():
    """Each row is in one step of eight, with gradients of about the same size and sign."""
    torch.manual_seed(0)
    direction, noise = torch.randn(16, 4), 1 + 0.3 * torch.randn(400, 2, 4)

    def end(optimizer_of) -> torch.Tensor:
        table = nn.Parameter(torch.zeros(16, 4))
        optimizer = optimizer_of(table)
        for step in range(400):
            rows = torch.arange(2) + 2 * (step % 8)
            optimizer.zero_grad()
            (table[rows] * direction[rows] * noise[step]).sum().backward()
            optimizer.step()
        return table.detach()

    options = {"lr": 0.01, "weight_decay": 0.0}
    rowwise = end(lambda table: RowwiseAdamW([], [table], **options))
    torch.testing.assert_close(rowwise, end(lambda table: torch.optim.AdamW([table], **options)), rtol=0.1, atol=0)


def test_a_row_first_seen_late_goes_no_further_than_adam_takes_it():
    """AdamW's mean of squares forgets: after thousands of steps without the row it is what one step makes it."""

    def end(optimizer_of, steps_after: int) -> torch.Tensor:
        table = nn.Parameter(torch.zeros(2, 1))
        optimizer = optimizer_of(table)
        for step in range(5000 + steps_after):
            optimizer.zero_grad()
            table[[0 if step != 4999 else 1]].sum().backward()
            optimizer.step()
        return table.detach()[1]

    options = {"lr": 0.01, "weight_decay": 0.0}
    rowwise = end(lambda table: RowwiseAdamW([], [table], **options), 0)
    adam = end(lambda table: torch.optim.AdamW([table], **options), 100)
    torch.testing.assert_close(rowwise, adam, rtol=0.03, atol=0)
