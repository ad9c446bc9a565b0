"""Gradients have the same bits every time, whatever threads do: a run is repeated by its seed."""

import pytest
import torch

from bbqrec import Config
from bbqrec.data import PrefixBatches, TrainingBatches, leave_one_out
from bbqrec.data.demo import make_demo_dataset
from bbqrec.models import SequenceModel, Tiger
from bbqrec.tokenizer import Tokenizer
from bbqrec.tokenizer.item_encoder import catalogue_features

REPEATS = 10


@pytest.fixture(scope="module")
def data():
    return make_demo_dataset(n_users=300, n_items=600)


@pytest.fixture(scope="module")
def batch(data):
    """Large enough to be shared among threads, with many items that occur more than once."""
    return next(iter(TrainingBatches(leave_one_out(data).train, max_length=50, batch_tokens=1500, seed=0)))


@pytest.fixture(autouse=True)
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def gradients_of(model, loss):
    model.zero_grad()
    loss().backward()
    return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model, loss):
    first = gradients_of(model, loss)
    assert first
    for _ in range(REPEATS):
        again = gradients_of(model, loss)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.fixture(scope="module")
def tokenizer(data):
    torch.manual_seed(0)
    tokenizer = Tokenizer(data.features, data.n_items, Config().tokenizer, max_length=50)
    tokenizer.initialize_codebooks(torch.Generator().manual_seed(0))
    return tokenizer.eval()  # no dropout


def test_tokenizer(tokenizer, batch):
    items = torch.cat([batch.items, batch.targets]).unique()
    check(tokenizer, lambda: sum(tokenizer.losses(items, batch).values()))


@pytest.mark.parametrize("with_ids", [True, False], ids=["bbqrec", "sasrec"])
def test_sequence_model(tokenizer, data, batch, with_ids):
    semantic_ids, features = (tokenizer.semantic_ids(), catalogue_features(data.features)) if with_ids else (None, None)
    config = Config(model_name="bbqrec" if with_ids else "sasrec").model
    model = SequenceModel(data.n_items, config, semantic_ids, features).eval()
    check(model, lambda: model.loss(batch))


def test_sampled_softmax(tokenizer, data, batch):
    config = Config().override({"model.sampled_items": data.n_items // 2}).model
    model = SequenceModel(data.n_items, config, tokenizer.semantic_ids(), catalogue_features(data.features)).eval()

    def loss():
        torch.manual_seed(0)
        return model.loss(batch)

    check(model, loss)


def test_tiger(tokenizer, data):
    batch = next(iter(PrefixBatches(leave_one_out(data).train, max_length=50, batch_tokens=1500, seed=0)))
    model = Tiger(Config().override({"model_name": "tiger", "model.max_length": 50}).model, tokenizer.semantic_ids())
    check(model.eval(), lambda: model.loss(batch))
