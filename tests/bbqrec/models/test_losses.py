"""The chunked softmax against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from bbqrec.models import losses
from bbqrec.models.losses import catalogue_cross_entropy


def tensors(tokens, items, dim=8, scale=1.0):
    hidden, vectors = torch.randn(tokens, dim) * scale, torch.randn(items, dim) * scale
    return hidden, vectors, torch.randint(0, items, (tokens,))


@pytest.mark.parametrize(("tokens", "items", "chunk"), [(1, 1, 1), (7, 5, 1), (7, 5, 10), (7, 5, 15), (64, 33, 2**19)])
@pytest.mark.parametrize("scale", [0.1, 1, 30])
def test_equals_the_cross_entropy_of_all_logits(tokens, items, chunk, scale, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SCORES", chunk)
    hidden, vectors, targets = tensors(tokens, items, scale=scale)
    ours = [t.clone().requires_grad_() for t in (hidden, vectors)]
    exact = [t.double().requires_grad_() for t in (hidden, vectors)]
    plain = [t.clone().requires_grad_() for t in (hidden, vectors)]
    (3 * catalogue_cross_entropy(*ours, targets)).backward()
    for left, right in (exact, plain):
        (3 * F.cross_entropy(left @ right.T, targets)).backward()
    loss, truth = catalogue_cross_entropy(*ours, targets), F.cross_entropy(exact[0] @ exact[1].T, targets)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-6)
    for our, true, usual in zip(ours, exact, plain, strict=True):
        error, allowed = (our.grad - true.grad).abs().max(), (usual.grad - true.grad).abs().max()
        assert error <= 3 * allowed + 1e-6 * true.grad.abs().max()


def test_the_gradient_of_one_side_alone():
    hidden, vectors, targets = tensors(7, 5)
    vectors.requires_grad_()
    catalogue_cross_entropy(hidden, vectors, targets).backward()
    alone = vectors.grad.clone()
    hidden.requires_grad_()
    catalogue_cross_entropy(hidden, vectors, targets).backward()
    assert torch.equal(vectors.grad, 2 * alone)
    assert hidden.grad.abs().sum() > 0


def test_nan_stays_nan():
    hidden, vectors, targets = tensors(7, 5)
    hidden[3, 2] = torch.nan
    assert catalogue_cross_entropy(hidden, vectors, targets).isnan()
