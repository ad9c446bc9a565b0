"""Dropout on a CPU, which draws its own masks. The blocks are tested as the models are made of them."""

import pytest
import torch

from bbqrec.models.transformer import Dropout

SHAPE = (501, 333)  # no multiple of the four elements that a word is enough for


def dropped(p: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return Dropout(p)(torch.ones(SHAPE, dtype=dtype))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.65])
def test_it_drops_this_share_and_makes_up_for_it(p):
    output = dropped(p)
    assert output.shape == SHAPE
    assert output.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
    deviation = (p * (1 - p) / output.numel()) ** 0.5
    assert abs((output == 0).float().mean() - p) < 4 * deviation


def test_elements_are_dropped_on_their_own():
    is_dropped = (dropped(0.5) == 0).float().flatten() - 0.5
    for apart in (1, 2, 3, 4, 64):
        both = (is_dropped[:-apart] * is_dropped[apart:]).mean() * 4  # correlation
        assert abs(both) < 4 / len(is_dropped) ** 0.5


def test_every_call_draws_anew_and_a_seed_repeats_it():
    first, again = dropped(0.5), dropped(0.5)
    assert torch.equal(first, again)
    assert not torch.equal(again, Dropout(0.5)(torch.ones(SHAPE)))


def test_gradients_pass_where_values_do():
    values = torch.full(SHAPE, 2.0, requires_grad=True)
    output = Dropout(0.3)(values)
    output.sum().backward()
    assert torch.equal(values.grad * 2, output)


def test_it_keeps_the_dtype():
    assert dropped(0.5, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_shares_next_to_none_and_all(p):
    assert dropped(p).isfinite().all()


@pytest.mark.parametrize("module", [Dropout(0.0), Dropout(0.5).eval()])
def test_nothing_is_dropped_without_a_share_or_in_evaluation(module):
    values = torch.randn(SHAPE)
    assert torch.equal(module(values), values)
