"""What the sequence model reads of features: `principal_directions` against a singular value decomposition."""

import numpy as np
import pytest
import torch

from bbqrec.data.dataset import Features
from bbqrec.tokenizer import item_encoder
from bbqrec.tokenizer.item_encoder import catalogue_features, principal_directions


@pytest.fixture
def features():
    draw = np.random.default_rng(0)
    values = (draw.standard_normal((50, 6)) @ draw.standard_normal((6, 12)) + 3).astype(np.float32)
    present = draw.random(50) > 0.2
    values[~present] = 0
    return {
        "text": Features(values, present),
        "image": Features(draw.standard_normal((50, 4)).astype(np.float32), np.ones(50, bool)),
    }


@pytest.mark.parametrize("rows_at_once", [7, 1000])
def test_they_are_orthonormal_and_keep_the_most(features, rows_at_once, monkeypatch):
    monkeypatch.setattr(item_encoder, "ROWS_AT_ONCE", rows_at_once)
    directions = principal_directions(features, 5)
    assert directions.dtype == torch.float32
    torch.testing.assert_close(directions.T @ directions, torch.eye(5), rtol=0, atol=1e-6)
    whole, kept = catalogue_features(features), catalogue_features(features, directions)
    assert kept.shape == (50, 5)
    energies = torch.linalg.svdvals(whole.double())[:5].square()
    torch.testing.assert_close(kept.double().square().sum(0), energies, rtol=1e-5, atol=1e-8)


def test_products_of_features_stay_where_no_direction_is_lost(features):
    directions = principal_directions(features, 10)  # 6 + 4 that differ from zero
    whole, kept = catalogue_features(features), catalogue_features(features, directions)
    torch.testing.assert_close(kept @ kept.T, whole @ whole.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [16, 17, None])
def test_none_where_all_are_read(features, width):
    assert principal_directions(features, width) is None


def test_each_modality_has_the_same_part_in_it_however_wide_it_is(features):
    text, image = (block.square().sum(1) for block in catalogue_features(features).split([12, 4], dim=1))
    there = torch.from_numpy(features["text"].present)
    assert text[there].mean().item() == pytest.approx(0.5)
    assert image.mean().item() == pytest.approx(0.5)
    assert not text[~there].any()
