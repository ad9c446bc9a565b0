"""The softmax over the whole catalogue, without a matrix of tokens by items, and over a sample of it."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from bbqrec.models.shards import ItemShards
from bbqrec.processes import gathered, summed

# Scores of a chunk. 2 MB stay in a core's cache between the products that make and use them; GPUs want large products.
CHUNK_SCORES = {"cpu": 2**19, "cuda": 2**26}
MIN_ROWS = 16  # of a chunk: products of fewer are slow


def catalogue_cross_entropy(
    hidden: Tensor, vectors: Tensor, targets: Tensor, shards: ItemShards | None = None
) -> Tensor:
    """Mean of `-log softmax(hidden @ vectors.T)[target]` over tokens, exact; memory `O(T·d + n_items·d)`.

    The gradient is found along with the loss, chunk by chunk of tokens, so scores are computed once and kept nowhere.

    Args:
        hidden: `(T, d)`, T ≥ 1. Arithmetic is float32, under autocast too.
        vectors: `(n_items, d)`.
        targets: `(T,)` int64 item indices.
        shards: given, `vectors` are those of this process's items, and the mean is over the tokens of all processes:
            each gets it, and its gradient in its own `hidden` and `vectors`. Memory is then that of all tokens and of
            its own items.

    Returns a scalar, differentiable once in `hidden` and `vectors`.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _CatalogueCrossEntropy.apply(hidden.float(), vectors.float(), targets, shards)


def sampled_cross_entropy(hidden: Tensor, vectors: Tensor, targets: Tensor, sampled: Tensor, n_items: int) -> Tensor:
    """An estimate of `catalogue_cross_entropy`, from the vectors of the targets and of a sample of the catalogue.

    The items drawn stand for all but the target: what they add to the sum of exponentials is scaled up to as many.

    Args:
        hidden: `(T, d)`, T ≥ 1.
        vectors: `(N, d)`, of the items in question.
        targets: `(T,)` int64 rows of `vectors`.
        sampled: `(n,)` int64 rows of `vectors`, n ≥ 1: items drawn uniformly from the catalogue, with repetition.
        n_items: size of the catalogue.

    Returns a scalar, differentiable in `hidden` and `vectors`.
    """
    own = (hidden * F.embedding(targets, vectors)).sum(1, keepdim=True)
    is_target = targets[:, None] == sampled
    each = (n_items - 1) / (~is_target).sum(1, keepdim=True).clamp_min(1)  # items that one drawn stands for
    others = (hidden @ F.embedding(sampled, vectors).T + each.log()).masked_fill(is_target, -torch.inf)
    return F.cross_entropy(torch.cat([own, others], 1).float(), torch.zeros_like(targets))


class _CatalogueCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, vectors: Tensor, targets: Tensor, shards: ItemShards | None) -> Tensor:
        most, softmax = len(vectors), _softmax
        if shards is not None:
            parts = gathered(hidden)
            tokens = [len(part) for part in parts]
            hidden, targets = torch.cat(parts), torch.cat(gathered(targets, tokens)) - shards.first
            most, softmax = shards.sizes[0], _softmax_across  # the same chunks in every process
        wanted = max(MIN_ROWS, CHUNK_SCORES.get(hidden.device.type, 2**26) // most)
        rows = min(len(hidden), wanted)
        scores, shares = (hidden.new_empty(rows, len(vectors)) for _ in range(2))  # reused by all chunks
        loss = hidden.new_zeros((), dtype=torch.float64)
        grad_hidden, grad_vectors = torch.empty_like(hidden), torch.zeros_like(vectors)
        for start in range(0, len(hidden), rows):
            chunk, target = hidden[start : start + rows], targets[start : start + rows, None]
            score = torch.mm(chunk, vectors.T, out=scores[: len(chunk)])
            share = shares[: len(chunk)]
            loss += softmax(score, target, share).sum(dtype=torch.float64)
            torch.mm(share, vectors, out=grad_hidden[start : start + rows])
            grad_vectors.addmm_(share.T, chunk)
        ctx.tokens = len(hidden)
        if shards is not None:
            grad_hidden = summed(grad_hidden).split(tokens)[shards.rank].clone()
        ctx.save_for_backward(grad_hidden, grad_vectors)
        return (loss / len(hidden)).to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_vectors = ctx.saved_tensors
        grad = grad / ctx.tokens
        return grad * grad_hidden, grad * grad_vectors, None, None


def _softmax(score: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    """`-log softmax(score)[target]` of each row `(T,)`; its gradient in `score (T, N)` goes to `grad`."""
    share = torch.softmax(score, 1, out=grad)
    logsumexp = score.amax(1) - share.amax(1).log()  # the largest share is the exp of that difference
    loss = logsumexp - score.gather(1, target)[:, 0]
    share.scatter_add_(1, target, share.new_full(target.shape, -1))
    return loss


def _softmax_across(score: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    """`_softmax` over the scores of all processes, of which each has some; a target that is none of its own is outside
    of `0 ≤ target < N`."""
    top = score.amax(1, keepdim=True)
    distributed.all_reduce(top, distributed.ReduceOp.MAX)
    share = torch.sub(score, top, out=grad).exp_()
    is_own = (target >= 0) & (target < score.shape[1])
    target = target.where(is_own, 0)
    of_target = (score.gather(1, target) - top).where(is_own, 0)
    total, of_target = summed(torch.stack([share.sum(1, keepdim=True), of_target]))
    share.div_(total).scatter_add_(1, target, -is_own.to(share.dtype))
    return (total.log() - of_target)[:, 0]
