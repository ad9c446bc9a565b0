"""The sequence model: what a score may depend on, what each switch does, and that zero tables change nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bbqrec.config import ModelConfig
from bbqrec.data.batches import pack_histories
from bbqrec.models.sequence_model import SequenceModel, attention_channels
from bbqrec.tokenizer.semantic_ids import SemanticIDs

N_ITEMS = 30
HISTORIES = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [4, 6]]


def semantic_ids(modalities=("text", "image")):
    codes = torch.randint(0, 4, (N_ITEMS, len(modalities), 3), generator=torch.Generator().manual_seed(1))
    codes[5, -1] = -1  # an item without the last modality
    return SemanticIDs(tuple(modalities), codes, torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(2)))


def model(ids="both", trained_tables=True, features=None, **options):
    torch.manual_seed(0)
    options = {"dim": 16, "layers": 2, "heads": 2, "max_length": 12, **options}
    options |= {"features": features is not None}
    made = SequenceModel(N_ITEMS, ModelConfig(**options), semantic_ids() if ids == "both" else ids, features).eval()
    for tables in (made.tables, made.position_tables, made.time_tables):
        if tables is not None and trained_tables:
            torch.nn.init.normal_(tables)
    return made


def packed(*histories, max_length=12):
    return pack_histories([np.array(history) for history in histories], max_length)


@pytest.mark.parametrize("ids", ["both", None])
def test_a_history_scores_the_same_alone_and_packed(ids):
    ranker = model(ids)
    together = ranker.score(packed(*HISTORIES))
    for n, history in enumerate(HISTORIES):
        torch.testing.assert_close(ranker.score(packed(history))[0], together[n], rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("ids", ["both", None])
def test_hidden_states_see_no_later_item(ids):
    ranker = model(ids)
    before = ranker(packed([3, 1, 4, 1, 5, 9]))
    after = ranker(packed([3, 1, 4, 1, 2, 9]))
    torch.testing.assert_close(before[:4], after[:4], rtol=1e-5, atol=1e-6)
    assert ((before[4:] - after[4:]).abs().amax(1) > 1e-3).all()


def test_only_the_latest_items_count():
    ranker = model()
    long = [*range(10, 20), *HISTORIES[2]]
    assert torch.equal(ranker.score(packed(long)), ranker.score(packed(HISTORIES[2])))


def test_order_matters():
    ranker = model()
    assert not torch.allclose(ranker.score(packed([3, 1, 4])), ranker.score(packed([1, 3, 4])), atol=1e-3)


def test_sasrec_has_no_content_and_no_terms():
    ranker = model(None)
    assert {name.split(".")[0] for name, _ in ranker.named_parameters()} == {"item_id", "transformer"}
    assert ranker.tables is None
    assert torch.equal(ranker.item_vectors(), ranker.item_id)


def test_features_are_added_to_item_vectors(training_batch):
    features = torch.randn(N_ITEMS, 5)
    options = ModelConfig(dim=16, max_length=12, features=True)
    ranker = SequenceModel(N_ITEMS, options, semantic_ids(), features)
    plain = SequenceModel(N_ITEMS, ModelConfig(dim=16, max_length=12), semantic_ids())
    plain.load_state_dict(ranker.state_dict(), strict=False)
    added = ranker.item_vectors() - plain.item_vectors()
    torch.testing.assert_close(added, features @ ranker.of_features.weight.T, rtol=1e-4, atol=1e-5)
    ranker.loss(training_batch(*HISTORIES[2:])).backward()
    assert ranker.of_features.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"cosine_output": True}])
@pytest.mark.parametrize("added", [0, 2])
def test_scores_are_raised_by_how_like_the_history_features_are(added, options):
    features = torch.randn(N_ITEMS + added, 5)
    plain, ranker = (model(features=features[:N_ITEMS], **options) for _ in range(2))
    for each in (plain, ranker):
        each.add_items(semantic_ids().codes[:added], features[N_ITEMS:])
    ranker.similarity_weight.fill_(2)
    ranker.similarity_decay.fill_(0.7)
    assert ranker.adds_similarity
    assert not plain.adds_similarity
    expected = plain.score(packed(*HISTORIES))
    for row, history in zip(expected, HISTORIES, strict=True):
        for age, item in enumerate(reversed(history)):
            row += 2 * 0.7**age * (features @ features[item])
    torch.testing.assert_close(ranker.score(packed(*HISTORIES)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"features": None}, {"features": torch.randn(N_ITEMS, 5), "similarity_output": False}]
)
def test_without_features_or_by_choice_there_is_no_similarity(options):
    ranker = model(**options)
    assert not ranker.adds_similarity
    assert not [name for name in ranker.state_dict() if name.startswith("similarity")]


def test_features_alone_are_vectors_enough():
    options = ModelConfig(dim=16, max_length=12, features=True, item_id=False)
    ranker = SequenceModel(N_ITEMS, options, None, torch.eye(N_ITEMS))
    assert torch.equal(ranker.item_vectors(), ranker.of_features.weight.T)


def test_zero_tables_attached_to_a_trained_sasrec_change_no_score():
    sasrec = model(None)
    attached = model(content=False, trained_tables=False)
    missing, unexpected = attached.load_state_dict(sasrec.state_dict(), strict=False)
    assert set(missing) == {"tables", "codes", "codebooks"}
    assert not unexpected
    assert torch.equal(attached.score(packed(*HISTORIES)), sasrec.score(packed(*HISTORIES)))
    torch.nn.init.normal_(attached.tables)
    assert not torch.allclose(attached.score(packed(*HISTORIES)), sasrec.score(packed(*HISTORIES)), atol=1e-3)


def test_loss_is_the_mean_cross_entropy_of_every_next_item(training_batch):
    ranker = model()
    expected, n = 0.0, 0
    for history in HISTORIES:
        for end in range(1, len(history)):
            scores = ranker.score(packed(history[:end]))[0]
            expected, n = expected - scores.log_softmax(0)[history[end]].item(), n + 1
    batch = training_batch(*[history for history in HISTORIES if len(history) > 1])
    assert ranker.loss(batch).item() == pytest.approx(expected / n, rel=1e-5)


def test_everything_learns(training_batch):
    ranker = model().train()
    ranker.loss(training_batch(*HISTORIES[2:])).backward()
    for name, parameter in ranker.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "options",
    [
        {"item_id": False},
        {"content": False},
        {"reweighting": False},
        {"cross_modal": False},
        {"cosine_output": True},
        {"layers": 1},
        {"heads": 4},
        {"max_length": 5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_switch_changes_the_scores(options):
    usual, switched = model(), model(**options)
    copy_shared_weights(usual, switched)
    batch = packed(HISTORIES[2], max_length=options.get("max_length", 12))
    assert not torch.allclose(switched.score(batch), usual.score(packed(HISTORIES[2])), atol=1e-4)


def copy_shared_weights(usual, switched):
    """Gives `switched` the weights of `usual`, so that they differ by what the switch does alone."""
    weights = usual.state_dict()
    if switched.tables is not None:
        kept = [usual.channels.index(channel) for channel in switched.channels]
        tables = weights["tables"][: switched.config.layers, kept]
        weights["tables"] = tables.repeat_interleave(switched.config.heads // usual.config.heads, dim=2)
    weights["transformer.positions"] = weights["transformer.positions"][: switched.config.max_length]
    switched.load_state_dict({name: weights[name] for name in switched.state_dict()})


@pytest.mark.parametrize("ids", ["both", None])
@pytest.mark.parametrize("history", [HISTORIES[2], [4]], ids=["longer than heads are wide", "one item"])
def test_attention_is_the_softmax_of_scores_and_tables(ids, history):
    ranker = model(ids, relative_position=True)
    batch = packed(history)
    length = len(history)
    first, last = ranker.transformer.blocks
    vectors = ranker.item_vectors()[batch.items] + ranker.transformer.positions[:length]
    hidden = first(vectors, batch, ranker._terms(batch)[0])
    projected = last.attention.qkv(last.attention_norm(hidden)).view(length, 3, 2, 8)
    query, keys = projected[-1, 0], projected[:, 1]
    plain = torch.einsum("hd,thd->ht", query, keys) / 8**0.5

    bias = torch.zeros(2, length)
    for j, item in enumerate(history):
        bias[:, j] += ranker.position_tables[1, 0, :, min((length - 1 - j).bit_length(), 4)]
        for channel, (left, right) in enumerate(ranker.channels if ids else ()):
            ours, theirs = ranker.codes[history[-1], left].tolist(), ranker.codes[item, right].tolist()
            agree = 0
            while agree < 3 and ours[agree] == theirs[agree] >= 0:
                agree += 1
            bias[:, j] += ranker.tables[1, channel, :, agree]

    weights, without = ranker.attention(batch)
    torch.testing.assert_close(weights, (plain + bias).softmax(1).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(without, plain.softmax(1).detach(), rtol=1e-4, atol=1e-6)
    assert not last.attention.qkv._forward_hooks


def test_dropout_is_for_training_only():
    ranker, batch = model(dropout=0.5), packed(HISTORIES[0])
    assert torch.equal(ranker.score(batch), ranker.score(batch))
    ranker.train()
    assert not torch.equal(ranker.score(batch), ranker.score(batch))


def test_without_content_the_codebooks_stay_as_they_are(training_batch):
    ranker = model(content=False)
    ranker.loss(training_batch(*HISTORIES[2:])).backward()
    assert ranker.codebooks.grad is None
    assert ranker.tables.grad.abs().sum() > 0


def test_item_vectors_are_content_and_id():
    ranker, ids = model(), semantic_ids()
    for item in (0, 5):
        content = torch.zeros(8)
        for m in range(2):
            for level, code in enumerate(ids.codes[item, m].tolist()):
                if code >= 0:
                    content = content + ranker.codebooks[0, level, code]
        expected = ranker.content.weight @ content + ranker.item_id[item]
        torch.testing.assert_close(ranker.item_vectors()[item], expected)


def test_attention_channels():
    def channels(modalities, **options):
        return attention_channels(modalities, ModelConfig(**options), is_shared=True)

    assert channels(2) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert channels(2, cross_modal=False) == [(0, 0), (1, 1)]
    assert channels(3) == [(0, 0), (1, 1), (2, 2)]  # nine do not fit the operator
    assert attention_channels(2, ModelConfig(), is_shared=False) == [(0, 0), (1, 1)]
    apart = semantic_ids()
    apart = replace(apart, codebooks=apart.codebooks.repeat(2, 1, 1, 1))
    assert model(apart).channels == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("most", "options"),
    [
        (8, {"relative_position": False}),
        (7, {"relative_position": True}),
        (6, {"relative_position": True, "relative_time": True}),
    ],
)
def test_more_modalities_than_attention_compares(most, options):
    as_many, too_many = (semantic_ids([f"m{m}" for m in range(n)]) for n in (most, most + 1))
    batch = replace(packed([3, 1]), timestamps=torch.tensor([100, 160]))
    assert model(as_many, **options).score(batch).isfinite().all()
    with pytest.raises(ValueError, match=rf"tokenizer\.modalities: got {most + 1}, expected at most {most} "):
        model(too_many, **options)
    assert model(too_many, reweighting=False, **options).score(batch).isfinite().all()


@pytest.mark.parametrize("ids", ["both", None])
def test_places_between_items_change_the_scores(ids):
    usual, made = model(ids, layers=1), model(ids, layers=1, relative_position=True, trained_tables=False)
    made.load_state_dict(usual.state_dict(), strict=False)
    batch = packed(*HISTORIES)
    assert torch.equal(made.score(batch), usual.score(batch))  # tables of zeros
    with torch.no_grad():
        made.position_tables[..., 2:] = -torch.inf  # nothing but the item itself and the one before
    made.transformer.positions.data[:] = 0
    torch.testing.assert_close(made(packed([3, 1, 4, 1]))[-2:], made(packed([5, 1, 4, 1]))[-2:])
    assert not torch.allclose(made(packed([3, 1, 4, 1]))[1], made(packed([5, 1, 4, 1]))[1], atol=1e-3)


def test_times_between_items_change_the_scores():
    ranker = model(relative_time=True)
    batch = packed([3, 1, 4])
    with pytest.raises(ValueError, match=r"timestamps: got none, expected the time of every interaction"):
        ranker.score(batch)
    near, shifted, far = (replace(batch, timestamps=torch.tensor(t)) for t in ([0, 5, 9], [7, 12, 16], [0, 5, 9000]))
    assert torch.equal(ranker.score(near), ranker.score(shifted))
    assert not torch.allclose(ranker.score(near), ranker.score(far), atol=1e-3)


def test_a_cosine_knows_no_length(training_batch):
    ranker = model(cosine_output=True, output_scale=7.0)
    batch = packed(*HISTORIES)
    scores = ranker.score(batch)
    hidden = ranker(batch)[batch.last]
    cosines = torch.nn.functional.cosine_similarity(hidden[:, None], ranker.item_vectors()[None], dim=-1)
    torch.testing.assert_close(scores, 7 * cosines)
    assert scores.abs().max() <= 7.0001
    torch.testing.assert_close(model(cosine_output=True, output_scale=14.0).score(batch), 2 * scores)
    ranker.loss(training_batch(*HISTORIES[2:])).backward()
    assert ranker.item_id.grad.abs().sum() > 0


@pytest.mark.parametrize("ids", ["both", None])
def test_items_without_a_vector_are_refused(ids):
    with pytest.raises(ValueError, match=r"model\.item_id: got false without content"):
        model(ids, item_id=False, content=False)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="got 16, expected a multiple of heads=3"):
        model(heads=3)


def test_channels_compare_the_modality_of_the_query_with_that_of_the_key():
    batch = packed(*HISTORIES)
    codes = semantic_ids().codes[batch.items]
    ranker = model()
    for layer, [term] in enumerate(ranker._terms(batch)):
        assert torch.equal(term.query, codes[:, [0, 0, 1, 1]])
        assert torch.equal(term.key, codes[:, [0, 1, 0, 1]])
        assert torch.equal(term.bias, ranker.tables[layer])


@pytest.mark.parametrize("options", [{}, {"item_id": False}, {"features": torch.randn(N_ITEMS, 5)}])
def test_a_sample_of_the_catalogue_has_its_vectors(options, monkeypatch):
    """Each item drawn once: the loss is the full one."""
    batch = replace(packed(*HISTORIES), targets=torch.arange(21) % N_ITEMS)
    sampled, expected = model(sampled_items=N_ITEMS - 1, **options), model(**options).loss(batch)
    monkeypatch.setattr(torch, "randint", lambda high, shape, device: torch.arange(high))
    torch.testing.assert_close(sampled.loss(batch), expected, rtol=1e-5, atol=1e-5)


def test_sampled_losses_come_near_the_full_one_and_learn_the_same():
    batch = replace(packed(*HISTORIES), targets=torch.arange(21) % N_ITEMS)
    full, sampled = model(None), model(None, sampled_items=20)
    for made in (full, sampled):
        made.item_id.data *= 0.3  # the logarithm of an estimate lags where a few items have most of the sum
    assert sampled.samples
    assert not model(sampled_items=N_ITEMS).samples
    torch.manual_seed(1)
    losses = []
    for _ in range(100):
        losses.append(sampled.loss(batch))
        losses[-1].backward()
    full.loss(batch).backward()
    assert torch.stack(losses).mean().item() == pytest.approx(full.loss(batch).item(), rel=0.05)
    found, true = sampled.item_id.grad.to_dense() / 100, full.item_id.grad
    assert torch.cosine_similarity(found.flatten(), true.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("options", [{}, {"content": False, "features": torch.randn(N_ITEMS, 5)}])
def test_items_without_training_are_what_their_content_says(options):
    ranker = model(**options)
    before, ids = ranker.item_vectors(), ranker.item_id.detach().clone()
    seen = np.setdiff1d(np.arange(N_ITEMS), [4, 17])
    ranker.forget_ids(seen)
    after = ranker.item_vectors()
    assert torch.equal(after[seen], before[seen])
    torch.testing.assert_close(after[[4, 17]], (before - ids)[[4, 17]], rtol=1e-5, atol=1e-5)


def test_items_without_training_and_without_content_keep_their_ids():
    ids = semantic_ids()
    ids.codes[[4, 17]] = -1
    features = torch.randn(N_ITEMS, 5)
    features[17] = 0
    ranker = model(ids, features=features)
    before = ranker.item_id.detach().clone()
    ranker.forget_ids(np.setdiff1d(np.arange(N_ITEMS), [4, 9, 17]))
    assert (ranker.item_id != before).any(1).nonzero()[:, 0].tolist() == [4, 9]


@pytest.mark.parametrize("options", [{"ids": None}, {"content": False}, {"item_id": False}])
def test_what_has_ids_alone_or_none_is_left_as_it_is(options):
    ranker = model(**options)
    before = ranker.item_vectors()
    ranker.forget_ids(np.arange(3))
    assert torch.equal(ranker.item_vectors(), before)
