"""Training goes the same way whatever computes it, and the way that it went when these numbers were written down."""

import warnings

import pytest
import torch

from bbqrec import Config
from bbqrec.data import TrainingBatches, leave_one_out
from bbqrec.data.demo import make_demo_dataset
from bbqrec.models import SequenceModel
from bbqrec.tokenizer import Tokenizer
from bbqrec.tokenizer.item_encoder import catalogue_features
from bbqrec_kernels import _dispatch
from bbqrec_kernels.testing import simd_target, simd_targets

STEPS = 40
BAND = 1e-4  # relative difference of a loss: rounding has made 8e-6, table gradients 10 % off make 3e-3

# Losses of steps 1, 10 and 40, by the reference.
GOLDEN = {"tokenizer": (18.17, 13.26, 11.89), "sequence model": (16.12, 11.59, 4.405)}


@pytest.fixture(scope="module")
def data():
    return make_demo_dataset(n_users=200, n_items=120)


@pytest.fixture(scope="module")
def config():
    # No dropout: what is drawn is the same for all implementations, but it hides what differs.
    return Config().override({"model.dropout": 0, "tokenizer.codebook_size": 16, "tokenizer.dim": 32, "model.dim": 32})


def losses(model, step_loss, learning_rate, data):
    batches = TrainingBatches(leave_one_out(data).train, max_length=50, batch_tokens=256, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)  # Adam would hide gradients of a wrong size
    found = []
    while len(found) < STEPS:
        for batch in batches:
            loss = step_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found[:STEPS]


def curves(data, config):
    """Losses of both stages; the sequence model has the codes that the tokenizer starts with."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(data.features, data.n_items, config.tokenizer, max_length=50)
    tokenizer.initialize_codebooks(torch.Generator().manual_seed(0))
    semantic_ids = tokenizer.eval().semantic_ids()
    items = torch.arange(data.n_items)
    of_tokenizer = losses(tokenizer.train(), lambda batch: sum(tokenizer.losses(items, batch).values()), 0.02, data)
    torch.manual_seed(1)
    model = SequenceModel(data.n_items, config.model, semantic_ids, catalogue_features(data.features))
    return {"tokenizer": of_tokenizer, "sequence model": losses(model, model.loss, 0.1, data)}


@pytest.fixture(scope="module")
def reference(data, config):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the reference is slow
        patch.setattr(_dispatch, "_blockers", lambda tensor: {"reference": None, "cpu": "this is a test"})
        return curves(data, config)


@pytest.mark.parametrize("target", simd_targets() or [None])
def test_kernels_train_as_the_reference_does(target, reference, data, config):
    if target is None:
        pytest.skip("no CPU library: there is the reference alone")
    with simd_target(target):
        found = curves(data, config)
    for stage, expected in reference.items():
        assert found[stage] == pytest.approx(expected, rel=BAND), stage
        assert found[stage] != expected, stage  # it was another implementation


def test_losses_are_what_they_were(reference):
    for stage, expected in GOLDEN.items():
        found = reference[stage]
        assert [found[0], found[9], found[-1]] == pytest.approx(expected, rel=0.02), stage
