"""Losses of the tokenizer that are not an operator's: CLUB and InfoNCE."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GaussianNetwork(nn.Module):
    """`q(u | z)`, a diagonal Gaussian whose mean and variance are networks of `z`: the estimator inside CLUB.

    Source: Cheng et al. 2020, CLUB: a contrastive log-ratio upper bound of mutual information, equation 14.
    """

    def __init__(self, dim_z: int, dim_u: int, hidden: int):
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(dim_z, hidden), nn.ReLU(), nn.Linear(hidden, dim_u))
        self.log_variance = nn.Sequential(nn.Linear(dim_z, hidden), nn.ReLU(), nn.Linear(hidden, dim_u), nn.Tanh())

    def log_likelihood(self, z: Tensor, u: Tensor) -> Tensor:
        """`log q(u_i | z_i)` up to a constant: `(N, dim_z)`, `(N, dim_u)` → `(N,)`."""
        log_variance = self.log_variance(z)
        return -0.5 * ((u - self.mean(z)).square() / log_variance.exp() + log_variance).sum(-1)

    def upper_bound(self, z: Tensor, u: Tensor) -> Tensor:
        """`E_i[log q(u_i | z_i)] - E_i E_j[log q(u_j | z_i)]`, the estimator's own parameters held fixed.

        The second expectation needs no pair: `E_j (u_j - μ)² = (E u - μ)² + Var u`.
        """
        mean, log_variance = _frozen(self.mean, z), _frozen(self.log_variance, z)
        own = (u - mean).square()
        others = (u.mean(0) - mean).square() + u.var(0, correction=0)
        return 0.5 * ((others - own) / log_variance.exp()).sum(-1).mean()


def info_nce(queries: Tensor, keys: Tensor, temperature: float, positives: Tensor | None = None) -> Tensor:
    """InfoNCE on cosine similarities: each of `(N, d)` queries against all `(K, d)` keys.

    Args:
        positives: `(N,)` the key that belongs to each query; by default query `n` belongs to key `n`, and the loss
            is the mean over both directions.

    Returns a scalar, zero where there is no query.
    """
    if len(queries) == 0:
        return queries.sum()
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / temperature
    if positives is not None:
        return F.cross_entropy(logits, positives)
    own = torch.arange(len(queries), device=queries.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def _frozen(network: nn.Module, x: Tensor) -> Tensor:
    """`network(x)` with its parameters held fixed: the gradient goes to `x` only."""
    return torch.func.functional_call(network, {name: p.detach() for name, p in network.named_parameters()}, (x,))
