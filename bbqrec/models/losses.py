"""The softmax over the whole catalogue, without a matrix of tokens by items."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_SCORES = 2**19  # 2 MB of scores: they stay in a core's cache between the products that make and use them


def catalogue_cross_entropy(hidden: Tensor, vectors: Tensor, targets: Tensor) -> Tensor:
    """Mean of `-log softmax(hidden @ vectors.T)[target]` over tokens, exact; memory `O(T·d + n_items·d)`.

    The gradient is found along with the loss, chunk by chunk of tokens, so scores are computed once and kept nowhere.

    Args:
        hidden: `(T, d)` float32, T ≥ 1.
        vectors: `(n_items, d)` float32.
        targets: `(T,)` int64 item indices.

    Returns a scalar, differentiable once in `hidden` and `vectors`.
    """
    return _CatalogueCrossEntropy.apply(hidden, vectors, targets)


class _CatalogueCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, vectors: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, min(len(hidden), CHUNK_SCORES // len(vectors)))
        scores, shares = (hidden.new_empty(rows, len(vectors)) for _ in range(2))  # reused by all chunks
        loss = hidden.new_zeros((), dtype=torch.float64)
        grad_hidden, grad_vectors = torch.empty_like(hidden), torch.zeros_like(vectors)
        for start in range(0, len(hidden), rows):
            chunk, target = hidden[start : start + rows], targets[start : start + rows, None]
            score = torch.mm(chunk, vectors.T, out=scores[: len(chunk)])
            share = torch.softmax(score, 1, out=shares[: len(chunk)])
            logsumexp = score.amax(1) - share.amax(1).log()  # the largest share is the exp of that difference
            loss += (logsumexp - score.gather(1, target)[:, 0]).sum(dtype=torch.float64)
            share.scatter_add_(1, target, share.new_full(target.shape, -1))  # now the gradient of the scores
            torch.mm(share, vectors, out=grad_hidden[start : start + rows])
            grad_vectors.addmm_(share.T, chunk)
        ctx.save_for_backward(grad_hidden, grad_vectors)
        return (loss / len(hidden)).to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_vectors = ctx.saved_tensors
        grad = grad / len(grad_hidden)
        return grad * grad_hidden, grad * grad_vectors, None
