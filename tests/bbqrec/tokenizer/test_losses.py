"""CLUB and InfoNCE against their formulas, written out pair by pair."""

import pytest
import torch
from torch.distributions import Normal

from bbqrec.tokenizer.losses import GaussianNetwork, info_nce


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_log_likelihood_is_the_gaussians_up_to_a_constant():
    q = GaussianNetwork(5, 4, 8)
    z, u = torch.randn(6, 5), torch.randn(6, 4)
    density = Normal(q.mean(z), (0.5 * q.log_variance(z)).exp()).log_prob(u).sum(-1)
    constant = density - q.log_likelihood(z, u)
    torch.testing.assert_close(constant, torch.full((6,), -2 * torch.log(torch.tensor(2 * torch.pi)).item()))


def test_upper_bound_is_the_mean_over_all_pairs():
    q = GaussianNetwork(5, 4, 8)
    z, u = torch.randn(7, 5), torch.randn(7, 4)
    pairs = [[q.log_likelihood(z[i : i + 1], u[j : j + 1]).item() for j in range(7)] for i in range(7)]
    expected = sum(pairs[i][i] for i in range(7)) / 7 - sum(map(sum, pairs)) / 49
    assert q.upper_bound(z, u).item() == pytest.approx(expected, rel=1e-4)


def test_upper_bound_gives_no_gradient_to_its_estimator():
    q = GaussianNetwork(5, 4, 8)
    z, u = torch.randn(7, 5, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    q.upper_bound(z, u).backward()
    assert all(p.grad is None for p in q.parameters())
    assert z.grad.abs().sum() > 0
    assert u.grad.abs().sum() > 0


def test_a_trained_estimator_tells_dependent_from_independent():
    q = GaussianNetwork(3, 3, 16)
    z, noise = torch.randn(256, 3), torch.randn(256, 3)
    bounds = []
    for u in (z + 0.3 * noise, noise):
        optimizer = torch.optim.Adam(q.parameters(), lr=3e-2)
        for _ in range(50):
            optimizer.zero_grad()
            (-q.log_likelihood(z, u).mean()).backward()
            optimizer.step()
        bounds.append(q.upper_bound(z, u).item())
    assert bounds[0] > 1 > 0.3 > bounds[1]


def test_info_nce_with_positives_is_cross_entropy_over_the_keys():
    queries, keys, positives = torch.randn(4, 6), torch.randn(5, 6), torch.tensor([3, 0, 0, 4])
    expected = 0.0
    for n in range(4):
        scores = torch.tensor([cosine(queries[n], key) / 0.2 for key in keys])
        expected -= scores.log_softmax(0)[positives[n]].item() / 4
    assert info_nce(queries, keys, 0.2, positives).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_of_pairs_is_the_mean_of_both_directions():
    left, right = torch.randn(4, 6), torch.randn(4, 6)
    own = torch.arange(4)
    expected = 0.5 * (info_nce(left, right, 0.2, own) + info_nce(right, left, 0.2, own))
    torch.testing.assert_close(info_nce(left, right, 0.2), expected)
    assert info_nce(left, left, 0.05) < info_nce(left, left.flip(0), 0.05)


def test_info_nce_of_nothing_is_zero_with_a_gradient():
    empty = torch.zeros(0, 6, requires_grad=True)
    loss = info_nce(empty, empty, 0.2)
    loss.backward()
    assert loss.item() == 0
