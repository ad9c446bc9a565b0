"""The alignment network: every loss against its formula, every switch, missing modalities."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bbqrec.config import TokenizerConfig
from bbqrec.data.dataset import Features
from bbqrec.tokenizer.losses import info_nce
from bbqrec.tokenizer.model import BEHAVIOUR, Tokenizer, standardize

N_ITEMS = 20
TEXT, IMAGE = 0, 1  # indices in `features()`
WEIGHTS = {
    "reconstruction": "reconstruction_weight",
    "quantization": "quantization_weight",
    "club": "club_weight",
    "item_contrast": "item_contrast_weight",
    "sequence_contrast": "sequence_contrast_weight",
}


def features(seed=0, absent=()):
    rng = np.random.default_rng(seed)
    present = np.ones(N_ITEMS, dtype=bool)
    present[list(absent)] = False
    text = Features(rng.normal(size=(N_ITEMS, 7)).astype(np.float32), np.ones(N_ITEMS, dtype=bool))
    image = rng.normal(size=(N_ITEMS, 5)).astype(np.float32)
    image[~present] = 0
    return {"text": text, "image": Features(image, present)}


def tokenizer(absent=(), names=("text", "image"), **options):
    torch.manual_seed(0)
    options = {"levels": 2, "codebook_size": 4, "dim": 8, "hidden": 16, **options}
    named = dict(zip(names, features(absent=absent).values(), strict=True))
    made = Tokenizer(named, N_ITEMS, TokenizerConfig(**options), max_length=12)
    made.initialize_codebooks(torch.Generator().manual_seed(0))
    return made.eval()


@pytest.fixture
def batch(training_batch):
    return training_batch([0, 3, 5, 2], [7, 7, 1])


ITEMS = torch.tensor([0, 1, 2, 3, 5, 7, 9, 12])


def quantize(z, codebook):
    """Nearest codewords level by level: what was added, and the squared rest after each level."""
    added, rests = torch.zeros_like(z), []
    for level in codebook:
        nearest = torch.cdist(z - added, level).argmin(1)
        added = added + level[nearest]
        rests.append((z - added).square().mean())
    return added, rests


@pytest.mark.parametrize(("ema_decay", "factor"), [(None, 1.25), (0.9, 0.25)])
def test_reconstruction_and_quantization_are_their_formulas(ema_decay, factor, batch):
    model = tokenizer(ema_decay=ema_decay)
    losses = model.losses(ITEMS, batch)
    reconstruction = quantization = 0.0
    with torch.no_grad():
        for m in (TEXT, IMAGE):
            x = model.features(m)[ITEMS]
            added, rests = quantize(model.encoders[m](x), model.codebook(m))
            guess = model.decoders[m](torch.cat([added, model.specific[m](x)], 1))
            reconstruction += (guess - x).square().mean().item()
            quantization += factor * sum(rests).item()
        quantization += factor * sum(quantize(model.behaviour_vectors(ITEMS), model.codebook(BEHAVIOUR))[1]).item()
    assert losses["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-4)
    assert losses["quantization"].item() == pytest.approx(quantization, rel=1e-4)


def test_contrasts_and_club_are_their_formulas(batch):
    model = tokenizer()
    losses = model.losses(ITEMS, batch)
    options = model.config
    with torch.no_grad():
        behaviour = model.behaviour_vectors(ITEMS)
        z = [model.encoders[m](model.features(m)[ITEMS]) for m in (TEXT, IMAGE)]
        text, image = (quantize(z[m], model.codebook(m))[0] for m in (TEXT, IMAGE))
        pairs = [(text, image), (text, behaviour), (image, behaviour)]
        item = sum(info_nce(left, right, options.temperature) for left, right in pairs) / 3
        content = text + image + behaviour
        row = {item: n for n, item in enumerate(ITEMS.tolist())}
        inputs = torch.stack([content[row[i]] for i in batch.items.tolist()])
        history = model.history_encoder(inputs, batch)
        scores = F.normalize(history, dim=1) @ F.normalize(content, dim=1).T / options.temperature
        sequence = F.cross_entropy(scores, torch.tensor([row[i] for i in batch.targets.tolist()]))
        club = sum(
            model.mutual_information[m].upper_bound(z[m], model.specific[m](model.features(m)[ITEMS])).relu()
            for m in (TEXT, IMAGE)
        )
    assert losses["item_contrast"].item() == pytest.approx(options.item_contrast_weight * item.item(), rel=1e-4)
    assert losses["sequence_contrast"].item() == pytest.approx(
        options.sequence_contrast_weight * sequence.item(), rel=1e-4
    )
    assert losses["club"].item() == pytest.approx(options.club_weight * club.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_scales_its_loss_and_zero_removes_it(name, batch):
    base = tokenizer().losses(ITEMS, batch)
    assert set(base) == set(WEIGHTS)
    weight = WEIGHTS[name]
    default = getattr(TokenizerConfig(), weight)
    doubled = tokenizer(**{weight: 2 * default}).losses(ITEMS, batch)
    assert doubled[name].item() == pytest.approx(2 * base[name].item(), rel=1e-5)
    without = tokenizer(**{weight: 0}).losses(ITEMS, batch)
    assert name not in without or without[name].item() == 0
    if name != "club":  # without its estimators, the other networks start from other random numbers
        for other in set(WEIGHTS) - {name}:
            assert without[other].item() == pytest.approx(base[other].item(), rel=1e-5)


def test_the_losses_and_the_estimators_train_apart(batch):
    model = tokenizer(ema_decay=None)
    sum(model.losses(ITEMS, batch).values()).backward()
    estimators = {id(p) for p in model.mutual_information.parameters()}
    assert estimators
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in estimators), name
    model.zero_grad()
    model.estimator_loss(ITEMS).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in estimators), name


def test_disentangling_off_has_no_specific_part(batch):
    model = tokenizer(disentangle=False)
    assert not model.specific
    assert not model.mutual_information
    assert "club" not in model.losses(ITEMS, batch)


def test_separate_codebooks():
    model = tokenizer(shared_codebooks=False)
    text, image, behaviour = (quantizer.codebooks for quantizer in model.quantizers)
    assert text.shape == (2, 4, 8)
    assert model.codebook(TEXT) is text
    assert model.codebook(IMAGE) is image
    assert model.codebook(BEHAVIOUR) is behaviour
    assert not torch.equal(text, image)
    assert not torch.equal(image, behaviour)
    assert len(tokenizer().quantizers) == 1
    semantic_ids = model.semantic_ids()
    assert torch.equal(semantic_ids.codebooks, torch.stack([text, image]))
    z = model.encoders[IMAGE](model.features(IMAGE))
    assert torch.equal(quantize(z, model.codebook(IMAGE))[0], quantize(z, semantic_ids.codebooks[1])[0])


def test_separate_codebooks_have_the_losses_of_their_sources(batch):
    model = tokenizer(shared_codebooks=False)
    with torch.no_grad():
        z = [encode(model.features(m)[ITEMS]) for m, encode in enumerate(model.encoders)]
        z.append(model.behaviour_vectors(ITEMS))
        expected = sum(
            sum(quantize(rows, model.codebook(m))[1]) for m, rows in zip((TEXT, IMAGE, BEHAVIOUR), z, strict=True)
        )
    assert model.losses(ITEMS, batch)["quantization"].item() == pytest.approx(0.25 * expected.item(), rel=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_averages_follow_training_and_rest_in_evaluation(shared, batch):
    model = tokenizer(absent=[3, 9], shared_codebooks=shared, ema_decay=0.0)
    before = [quantizer.codebooks.clone() for quantizer in model.quantizers]
    with torch.no_grad():
        rows = model._quantized_rows(ITEMS)
    model.losses(ITEMS, batch)
    assert all(torch.equal(q.codebooks, b) for q, b in zip(model.quantizers, before, strict=True))
    model.train().losses(ITEMS, batch)
    for quantizer, codebooks, x in zip(model.quantizers, before, rows, strict=True):
        nearest = torch.cdist(x, codebooks[0]).argmin(1)
        for code in range(4):  # without memory, a codeword is the mean of what chose it, or stays
            mean = x[nearest == code].mean(0) if (nearest == code).any() else codebooks[0, code]
            torch.testing.assert_close(quantizer.codebooks[0, code], mean)


def test_codebooks_start_at_the_k_means_of_present_vectors():
    model, other = tokenizer(absent=[3, 9]), tokenizer(absent=[3, 9], kmeans_iterations=0)
    assert model.initialized
    with torch.no_grad():
        [rows] = model._quantized_rows(torch.arange(N_ITEMS))
    assert len(rows) == 3 * N_ITEMS - 2
    words = other.codebook(TEXT)[0]  # without iterations: rows as they are
    assert (torch.cdist(words, rows).amin(1) < 1e-5).all()
    rest = [(rows - quantize(rows, made.codebook(TEXT))[0]).square().sum() for made in (model, other)]
    assert rest[0] < rest[1]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_codewords_without_use_move_to_items(ema_decay):
    model = tokenizer(absent=[3, 9], ema_decay=ema_decay, revive_after=5)
    [quantizer] = model.quantizers
    quantizer.codebooks.data[0, 2] = 100.0
    assert not model.revive_codewords()[0].any()
    quantizer.steps_unused[0, 2] = 5
    [moved] = model.revive_codewords()
    assert moved.nonzero().tolist() == [[0, 2]]
    with torch.no_grad():
        [rows] = model._quantized_rows(torch.arange(N_ITEMS))
    assert torch.cdist(quantizer.codebooks[0, 2][None], rows).min() < 1e-5
    assert quantizer.steps_unused[0, 2] == 0
    if ema_decay is not None:
        assert torch.equal(quantizer.ema_sums[0, 2], quantizer.codebooks[0, 2])
        assert quantizer.ema_counts[0, 2] == 1


@pytest.mark.parametrize("disentangle", [True, False])
def test_fidelity_is_of_present_items(disentangle):
    model = tokenizer(absent=[3, 9], disentangle=disentangle)
    figures = model.fidelity()
    with torch.no_grad():
        x = model.features(IMAGE)[model.present(IMAGE)]
        z = model.encoders[IMAGE](x)
        added, rests = quantize(z, model.codebook(IMAGE))
        parts = [added, model.specific[IMAGE](x)] if disentangle else [added]
        error = (model.decoders[IMAGE](torch.cat(parts, 1)) - x).square().sum() / x.square().sum()
    assert figures["residual"]["image"] == pytest.approx([(r / z.square().mean()).item() for r in rests], rel=1e-4)
    assert figures["reconstruction"]["image"] == pytest.approx(1 - error.item(), abs=1e-5)
    assert set(figures["reconstruction"]) == {"text", "image"}


def test_nothing_is_left_to_reconstruct_of_features_without_variance():
    alike = Features(np.ones((N_ITEMS, 5), np.float32), np.arange(N_ITEMS) == 4)
    options = TokenizerConfig(levels=2, codebook_size=4, dim=8, hidden=16)
    made = Tokenizer({**features(), "image": alike}, N_ITEMS, options, max_length=12)
    made.initialize_codebooks(torch.Generator().manual_seed(0))
    found = made.eval().fidelity()["reconstruction"]
    assert found["image"] is None
    assert found["text"] < 1


def test_a_missing_modality_has_no_codes_and_no_say(batch):
    absent = [3, 9]
    model = tokenizer(absent=absent)
    semantic_ids = model.semantic_ids()
    assert (semantic_ids.codes[absent, 1] == -1).all()
    assert (semantic_ids.codes[:, 0] >= 0).all()
    before = {name: loss.item() for name, loss in model.losses(ITEMS, batch).items()}
    model.features(IMAGE)[absent] = 1e3
    after = {name: loss.item() for name, loss in model.losses(ITEMS, batch).items()}
    assert before == after
    model.features(IMAGE)[0] += 1
    assert model.losses(ITEMS, batch)["reconstruction"].item() != before["reconstruction"]


@pytest.mark.parametrize("names", [("clip.v1", "type"), ("values", "train"), ("behaviour", ""), ("title", "item")])
def test_names_of_modalities_change_nothing(names, batch):
    usual, made = tokenizer(shared_codebooks=False), tokenizer(names=names, shared_codebooks=False)
    assert made.semantic_ids().modalities == names
    assert torch.equal(made.semantic_ids().codes, usual.semantic_ids().codes)
    assert made.losses(ITEMS, batch) == usual.losses(ITEMS, batch)


def test_a_batch_without_any_image_is_fine(batch):
    model = tokenizer(absent=range(15))
    losses = model.losses(ITEMS, batch)
    assert all(loss.isfinite() for loss in losses.values()), losses


def test_a_step_without_any_content_is_fine(batch):
    model = tokenizer(absent=range(15))
    for m in range(len(model.modalities)):
        model.present(m)[ITEMS] = False
    for loss in (model.estimator_loss(ITEMS), sum(model.losses(ITEMS, batch).values())):
        assert loss.isfinite()
        loss.backward()
    assert all(not parameter.grad.any() for parameter in model.mutual_information.parameters())
    assert model.behaviour.weight.grad.coalesce().values().any()


def test_standardize_centres_present_rows_only():
    values, present = standardize(features(absent=[3, 9])["image"])
    torch.testing.assert_close(values[present].mean(0), torch.zeros(5), atol=1e-6, rtol=0)
    assert values[present].square().mean().item() == pytest.approx(1, rel=1e-5)
    assert (values[~present] == 0).all()


@pytest.mark.parametrize("magnitude", [1e-25, 1, 1e25, 1e38])
def test_standardize_features_of_any_magnitude(magnitude):
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (N_ITEMS, 3))
    usual, made = (
        standardize(Features((scale * values).astype(np.float32), np.ones(N_ITEMS, bool)))[0]
        for scale in (1, magnitude)
    )
    torch.testing.assert_close(made, usual, rtol=1e-5, atol=1e-5)
    assert made.square().mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e25])
def test_standardize_keeps_constant_dimensions_at_zero(constant):
    values = np.full((N_ITEMS, 2), constant, np.float32)
    values[1] = np.nextafter(values[1], np.float32(2 * constant))  # noise of the last digit
    assert (standardize(Features(values, np.ones(N_ITEMS, bool)))[0] == 0).all()
    values[:, 1] = np.random.default_rng(0).normal(size=N_ITEMS)
    made, _ = standardize(Features(values, np.ones(N_ITEMS, bool)))
    assert (made[:, 0] == 0).all()
    assert made[:, 1].square().mean().item() == pytest.approx(2, rel=1e-5)


def test_divergence_is_not_taken_for_missing_modalities():
    model = tokenizer(absent=[3, 9])
    model.semantic_ids()
    model.encoders[IMAGE][0].weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"vectors of modality 'image' are not finite, .* lower tokenizer\.learning_rate"
    ):
        model.semantic_ids()


def test_standardized_block_by_block(monkeypatch):
    feature = features(absent=[3, 9])["image"]
    feature.values[:, 1] = 7
    whole, _ = standardize(feature)
    monkeypatch.setattr("bbqrec.tokenizer.model.ROWS_AT_ONCE", 4)
    torch.testing.assert_close(standardize(feature)[0], whole, rtol=1e-6, atol=0)
    assert (whole[:, 1] == 0).all()
