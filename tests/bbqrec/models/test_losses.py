"""The chunked softmax against PyTorch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bbqrec.models import losses
from bbqrec.models.losses import catalogue_cross_entropy, sampled_cross_entropy


def tensors(tokens, items, dim=8, scale=1.0):
    hidden, vectors = torch.randn(tokens, dim) * scale, torch.randn(items, dim) * scale
    return hidden, vectors, torch.randint(0, items, (tokens,))


@pytest.mark.parametrize(("tokens", "items", "chunk"), [(1, 1, 1), (7, 5, 1), (7, 5, 10), (7, 5, 15), (64, 33, 2**19)])
@pytest.mark.parametrize("scale", [0.1, 1, 30])
def test_equals_the_cross_entropy_of_all_logits(tokens, items, chunk, scale, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SCORES", {"cpu": chunk})
    monkeypatch.setattr(losses, "MIN_ROWS", 1)
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


numbers = st.integers(1, 12)


@settings(max_examples=25, deadline=None)
@given(numbers, numbers, numbers, st.integers(1, 40), st.integers(0, 99))
def test_any_shape_and_chunk(tokens, items, dim, chunk, seed):
    torch.manual_seed(seed)
    hidden, vectors, targets = tensors(tokens, items, dim)
    ours = [t.clone().requires_grad_() for t in (hidden, vectors)]
    exact = [t.double().requires_grad_() for t in (hidden, vectors)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_SCORES", {"cpu": chunk})
        patch.setattr(losses, "MIN_ROWS", 1)
        loss = catalogue_cross_entropy(*ours, targets)
    truth = F.cross_entropy(exact[0] @ exact[1].T, targets)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    for our, true in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(truth, exact), strict=True):
        torch.testing.assert_close(our.double(), true, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(numbers, numbers, st.integers(1, 20), st.integers(0, 99))
def test_any_sample_token_by_token(tokens, items, n, seed):
    torch.manual_seed(seed)
    hidden, vectors, targets = (t.double() if t.is_floating_point() else t for t in tensors(tokens, items))
    sampled, n_items = torch.randint(0, items, (n,)), items + 5
    expected = []
    for row, target in zip(hidden, targets.tolist(), strict=True):
        others = [item for item in sampled.tolist() if item != target]
        each = (n_items - 1) / max(len(others), 1)  # items that one of them stands for
        total = torch.exp(row @ vectors[target]) + sum(each * torch.exp(row @ vectors[item]) for item in others)
        expected.append(total.log() - row @ vectors[target])
    loss = sampled_cross_entropy(hidden, vectors, targets, sampled, n_items)
    torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


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


def test_float32_under_autocast():
    hidden, vectors, targets = tensors(7, 5)
    expected = catalogue_cross_entropy(hidden, vectors, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(catalogue_cross_entropy(hidden, vectors, targets), expected)
        hidden = hidden.bfloat16().requires_grad_()
        catalogue_cross_entropy(hidden, vectors, targets).backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_a_sample_of_every_other_item_is_the_whole_catalogue():
    """Each item once, the target among them: nothing is estimated."""
    hidden, vectors, targets = tensors(9, 6)
    ours = [t.clone().requires_grad_() for t in (hidden, vectors)]
    exact = [t.clone().requires_grad_() for t in (hidden, vectors)]
    loss = sampled_cross_entropy(*ours, targets, torch.arange(6), 6)
    truth = catalogue_cross_entropy(*exact, targets)
    loss.backward()
    truth.backward()
    torch.testing.assert_close(loss, truth)
    for our, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.grad, true.grad, rtol=1e-4, atol=1e-6)


def test_samples_estimate_the_sum_over_the_catalogue():
    """The exponential of the loss less the target's score is the sum's estimate: right on average."""
    hidden, vectors, targets = tensors(1, 50)
    own = hidden @ vectors[targets].T
    truth = (catalogue_cross_entropy(hidden, vectors, targets) + own).exp()
    sums = [
        (sampled_cross_entropy(hidden, vectors, targets, torch.randint(50, (40,)), 50) + own).exp() for _ in range(2000)
    ]
    found = torch.stack(sums)
    error = found.std() / len(sums) ** 0.5
    assert abs(found.mean() - truth) < 4 * error
    assert error < 0.05 * truth


def test_only_the_target_drawn():
    hidden, vectors, _ = tensors(2, 3)
    hidden.requires_grad_()
    loss = sampled_cross_entropy(hidden, vectors, torch.tensor([1, 1]), torch.tensor([1, 1]), 3)
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()
