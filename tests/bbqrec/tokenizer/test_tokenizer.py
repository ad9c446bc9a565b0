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


def test_reconstruction_and_quantization_are_their_formulas(batch):
    model = tokenizer()
    losses = model.losses(ITEMS, batch)
    reconstruction = quantization = 0.0
    with torch.no_grad():
        for m in (TEXT, IMAGE):
            x = model.features(m)[ITEMS]
            added, rests = quantize(model.encoders[m](x), model.codebook(m))
            guess = model.decoders[m](torch.cat([added, model.specific[m](x)], 1))
            reconstruction += (guess - x).square().mean().item()
            quantization += 1.25 * sum(rests).item()
        quantization += 1.25 * sum(quantize(model.behaviour_vectors()[ITEMS], model.codebook(BEHAVIOUR))[1]).item()
    assert losses["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-4)
    assert losses["quantization"].item() == pytest.approx(quantization, rel=1e-4)


def test_contrasts_and_club_are_their_formulas(batch):
    model = tokenizer()
    losses = model.losses(ITEMS, batch)
    options = model.config
    with torch.no_grad():
        behaviour = model.behaviour_vectors()[ITEMS]
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
    model = tokenizer()
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
    assert model.codebooks.shape == (3, 2, 4, 8)
    text, image, behaviour = model.codebooks
    assert torch.equal(model.codebook(TEXT), text)
    assert torch.equal(model.codebook(IMAGE), image)
    assert torch.equal(model.codebook(BEHAVIOUR), behaviour)
    assert not torch.equal(text, image)
    assert not torch.equal(image, behaviour)
    assert tokenizer().codebooks.shape == (1, 2, 4, 8)
    semantic_ids = model.semantic_ids()
    assert torch.equal(semantic_ids.codebooks, model.codebooks[:2])
    z = model.encoders[IMAGE](model.features(IMAGE))
    assert torch.equal(quantize(z, model.codebook(IMAGE))[0], quantize(z, semantic_ids.codebooks[1])[0])


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
