"""TIGER: beam search against the likelihood of every item, what scores may depend on, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bbqrec.config import ModelConfig
from bbqrec.data import Histories, PrefixBatches, pack_histories
from bbqrec.evaluation import ranks
from bbqrec.models import Tiger
from bbqrec.tokenizer import SemanticIDs

N_ITEMS, K = 60, 3
HISTORIES = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [4, 6]]


def semantic_ids(n_items=N_ITEMS, modalities=2):
    """Many items share codes: there are 9 in a modality."""
    codes = torch.randint(0, K, (n_items, modalities, 2), generator=torch.Generator().manual_seed(1))
    codes[5, -1] = -1  # an item without the last modality
    return SemanticIDs(tuple("ab"[:modalities]), codes, torch.randn(1, 2, K, 8))


def model(ids=None, **options):
    """With weights large enough for scores to differ."""
    options = {"dim": 16, "layers": 2, "heads": 2, "max_length": 12, "dropout": 0.1, **options}
    made = Tiger(ModelConfig(**options), ids or semantic_ids()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def packed(*histories, max_length=12):
    return pack_histories([np.array(history) for history in histories], max_length)


def likelihoods(ranker, batch):
    """Log-probability `(B, n_items)` of every item, by teacher forcing."""
    n = len(batch.last)
    with torch.no_grad():
        return torch.stack([ranker.log_likelihood(batch, torch.full((n,), i)) for i in range(N_ITEMS)], 1)


def decoded_token_by_token(ranker, history, item):
    """The likelihood once more, from hidden states of one sequence without cache or padding."""
    total, tokens = 0.0, ranker.tree.tokens[item]
    memory = ranker._remember(packed(history))
    for depth, token in enumerate(tokens.tolist()):
        inputs = ranker.steps[: depth + 1].clone()
        for k in range(depth):
            inputs[k + 1] += ranker.vocabulary[ranker.offsets[k] + tokens[k]]
        hidden = ranker._decode(inputs[None, None], memory)[0][0, 0, -1]
        start = sum(ranker.tree.sizes[:depth])
        table = ranker.vocabulary[start : start + ranker.tree.sizes[depth]]
        total = total + (table @ hidden).log_softmax(0)[token]
    return total


def test_a_wide_beam_finds_every_item_with_its_likelihood():
    ranker, batch = model(beam=N_ITEMS), packed(*HISTORIES)
    expected = likelihoods(ranker, batch)
    found = ranker.score(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.argsort(1, descending=True)[:, :10], expected.argsort(1, descending=True)[:, :10])
    assert (expected.amax(1) - expected.amin(1)).min() > 1


@pytest.mark.parametrize("beam", [1, 7, 20])
def test_a_narrow_beam_finds_that_many_items_with_their_likelihood(beam):
    ranker, batch = model(beam=beam), packed(*HISTORIES)
    found = ranker.score(batch)
    assert (found > -torch.inf).sum(1).tolist() == [beam] * len(HISTORIES)
    reached = found.isfinite()
    torch.testing.assert_close(found[reached], likelihoods(ranker, batch)[reached], rtol=1e-5, atol=1e-5)


def test_a_narrow_beam_is_best_first_search_in_the_tree():
    beam, history = 4, HISTORIES[0]
    ranker = model(beam=beam)
    tokens = ranker.tree.tokens.tolist()
    memory, kept = ranker._remember(packed(history)), [((), 0.0)]
    for depth in range(ranker.tree.depth):
        candidates = []
        for path, score in kept:
            inputs = ranker.steps[: depth + 1].clone()
            for k, token in enumerate(path):
                inputs[k + 1] += ranker.vocabulary[ranker.offsets[k] + token]
            log_probs = ranker._logits(ranker._decode(inputs[None, None], memory)[0][0, 0, -1], depth).log_softmax(0)
            following = {row[depth] for row in tokens if tuple(row[:depth]) == path}
            candidates += [((*path, token), score + log_probs[token].item()) for token in following]
        kept = sorted(candidates, key=lambda candidate: -candidate[1])[:beam]
    found = ranker.score(packed(history))[0]
    items = found.argsort(descending=True)[:beam].tolist()
    assert [tuple(tokens[item]) for item in items] == [path for path, _ in kept]
    assert found[items].tolist() == pytest.approx([score for _, score in kept], rel=1e-5)


@pytest.mark.parametrize("item", [0, 5, 30])
def test_likelihood_is_the_product_over_tokens(item):
    ranker = model()
    for history in HISTORIES:
        expected = decoded_token_by_token(ranker, history, item)
        got = ranker.log_likelihood(packed(history), torch.tensor([item]))[0]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_probabilities_of_all_ids_existing_or_not_sum_to_one():
    ids = SemanticIDs(("a",), torch.cartesian_prod(torch.arange(K), torch.arange(K))[:, None], torch.zeros(1, 2, K, 4))
    ranker = model(replace(ids, codes=torch.cat([ids.codes, -torch.ones(1, 1, 2).long()])))
    # All nine pairs, and one missing: of 4 x 4 pairs of tokens six do not exist.
    first = ranker._logits(ranker._decode(ranker.steps[None, None], ranker._remember(packed([3])))[0][0, 0, 0], 0)
    assert first.shape == (K + 1,)
    total = sum(ranker.log_likelihood(packed([3]), torch.tensor([i])).exp().item() for i in range(10))
    assert 0.1 < total < 1


def test_a_history_scores_the_same_alone_and_packed():
    ranker = model(beam=10)
    together = ranker.score(packed(*HISTORIES))
    for n, history in enumerate(HISTORIES):
        torch.testing.assert_close(ranker.score(packed(history))[0], together[n], rtol=1e-5, atol=1e-5)
    assert not torch.equal(together[0], together[1])


def test_only_the_latest_items_count():
    ranker = model()
    assert torch.equal(ranker.score(packed([*range(10, 20), *HISTORIES[2]])), ranker.score(packed(HISTORIES[2])))


def test_order_matters_and_so_does_every_item():
    ranker = model(beam=N_ITEMS)
    usual = ranker.score(packed([3, 1, 4]))
    for other in ([1, 3, 4], [7, 1, 4], [3, 1, 7]):
        assert not torch.allclose(ranker.score(packed(other)), usual, atol=1e-3)


def test_the_encoder_sees_both_ways():
    ranker = model()
    first, changed = (ranker._remember(packed(history)).layers[0][0][0, :, 0] for history in ([3, 1, 4], [3, 1, 7]))
    assert (first - changed).abs().max() > 1e-3


def test_items_of_equal_codes_differ_by_their_last_token():
    ids = semantic_ids()
    ids.codes[7] = ids.codes[8] = ids.codes[9]
    ranker = model(ids, beam=N_ITEMS)
    numbers = ranker.tree.tokens[[7, 8, 9], -1].tolist()
    assert numbers == sorted(set(numbers))
    scores = ranker.score(packed(HISTORIES[0]))[0]
    assert len(set(scores[[7, 8, 9]].tolist())) == 3
    assert not torch.allclose(ranker.score(packed([7])), ranker.score(packed([8])), atol=1e-3)  # and as input


def test_loss_is_of_the_items_after_the_last_positions():
    ranker, batch = model(), packed(*HISTORIES)
    targets = torch.arange(len(batch.items)) % N_ITEMS
    expected = -likelihoods(ranker, batch)[range(4), targets[batch.last]].mean()
    assert ranker.loss(replace(batch, targets=targets)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_everything_learns():
    ranker, batch = model().train(), packed(*HISTORIES)
    ranker.loss(replace(batch, targets=torch.arange(len(batch.items)))).backward()
    for name, parameter in ranker.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "options", [{"layers": 1}, {"heads": 4}, {"max_length": 5}, {"dim": 8}, {"beam": 3}], ids=lambda o: next(iter(o))
)
def test_each_option_changes_the_scores(options):
    usual = model().score(packed(HISTORIES[2]))
    batch = packed(HISTORIES[2], max_length=options.get("max_length", 12))
    assert not torch.allclose(model(**options).score(batch), usual, atol=1e-3)


def test_dropout_is_for_training_only():
    ranker, batch = model(dropout=0.5), packed(HISTORIES[0])
    assert torch.equal(ranker.score(batch), ranker.score(batch))
    ranker.train()
    assert not torch.equal(ranker.score(batch), ranker.score(batch))


def test_a_diverged_model_is_not_ranked_as_if_nothing_was_found():
    ranker = model()
    with torch.no_grad():
        ranker.vocabulary[0, 0] = torch.nan
    assert ranker.score(packed(HISTORIES[0])).isnan().any()


def test_what_always_follows_is_learned():
    """Item `3 i + 1` follows item `i`, for every item: a rule that the tokens alone do not give away."""
    torch.manual_seed(0)
    rows = [[i] for i in range(N_ITEMS)]
    for row in rows:
        while len(row) < 6:
            row.append((3 * row[-1] + 1) % N_ITEMS)
    histories = Histories.from_lists(rows)
    ranker = Tiger(ModelConfig(dim=32, layers=1, max_length=6, dropout=0.0, beam=5), semantic_ids(modalities=1)).train()
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=3e-3)
    batches = PrefixBatches(histories, 6, batch_tokens=256, seed=0)
    for epoch in range(45):
        batches.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            ranker.loss(batch).backward()
            optimizer.step()
    inputs = [row[:-1] for row in rows]
    scores = ranker.eval().score(pack_histories([np.array(row) for row in inputs], 6))
    found = ranks(scores, torch.tensor([row[-1] for row in rows]))
    assert (found == 1).double().mean() > 0.9
