"""Semantic IDs: figures by hand, text, table, decoding."""

import math
from collections import Counter
from dataclasses import replace

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bbqrec.tokenizer.semantic_ids import SemanticIDs, decode

# Four items, two modalities, two levels, codebooks of four; item 3 lacks the second modality.
CODES = torch.tensor([[[0, 1], [0, 2]], [[0, 1], [0, 2]], [[1, 1], [3, 0]], [[1, 1], [-1, -1]]])


@pytest.fixture
def semantic_ids():
    return SemanticIDs(("text", "image"), CODES, torch.randn(1, 2, 4, 5))


def test_usage_and_perplexity(semantic_ids):
    usage = semantic_ids.usage()
    assert usage["usage"] == [3 / 4, 3 / 4]
    entropy = -(4 / 7 * math.log(4 / 7) + 2 / 7 * math.log(2 / 7) + 1 / 7 * math.log(1 / 7))
    assert usage["perplexity"] == pytest.approx([math.exp(entropy), math.exp(entropy)])


def test_collisions_and_agreement(semantic_ids):
    assert semantic_ids.collision_rate() == 2 / 4
    assert semantic_ids.agreement() == 2 / 3  # of the three items that have both


def test_agreement_without_complete_items_is_undefined():
    codes = torch.tensor([[[0], [-1]], [[-1], [0]]])
    assert SemanticIDs(("text", "image"), codes, torch.zeros(1, 1, 4, 5)).agreement() is None
    assert SemanticIDs(("text",), codes[:, :1], torch.zeros(1, 1, 4, 5)).agreement() is None


def test_text(semantic_ids):
    assert semantic_ids.text(2) == "text 1-1 · image 3-0 · #2"
    assert semantic_ids.text(3) == "text 1-1 · #3"


def test_table(semantic_ids, tmp_path):
    semantic_ids = replace(semantic_ids, modalities=("text", "title"))
    semantic_ids.save_table(tmp_path / "ids.parquet", list("abcd"), ["A", "B", "C", "D"])
    table = pl.read_parquet(tmp_path / "ids.parquet")
    assert table.columns == ["item", "title", "codes/text", "codes/title", "number"]
    assert table.row(3) == ("d", "D", [1, 1], [-1, -1], 3)


def test_table_without_modalities(tmp_path):
    SemanticIDs.none(2).save_table(tmp_path / "ids.parquet", ["a", "b"], ["A", "B"])
    assert pl.read_parquet(tmp_path / "ids.parquet").rows() == [("a", "A", 0), ("b", "B", 1)]


@pytest.mark.parametrize("sources", [1, 2])
def test_decode_sums_the_codewords(sources):
    codebooks = torch.randn(sources, 2, 4, 5, requires_grad=True)
    decoded = decode(CODES, codebooks)
    for item in range(4):
        expected = torch.zeros(5)
        for m in range(2):
            for level in range(2):
                if CODES[item, m, level] >= 0:
                    expected = expected + codebooks[min(m, sources - 1), level, CODES[item, m, level]]
        torch.testing.assert_close(decoded[item], expected)
    decoded.sum().backward()
    assert codebooks.grad[0, 0, 0].tolist() == [4.0 if sources == 1 else 2.0] * 5


def test_codebooks_of_their_own_are_counted_apart():
    codes = torch.tensor([[[0], [1]]] * 4)  # text uses one codeword, image another one of its own
    ids = SemanticIDs(("text", "image"), codes, torch.zeros(2, 1, 2, 5))
    assert ids.usage() == {"usage": [0.5], "perplexity": [pytest.approx(1)]}
    assert SemanticIDs(("text", "image"), codes, torch.zeros(1, 1, 2, 5)).usage()["usage"] == [1]
    same = torch.zeros(4, 2, 1, dtype=torch.int64)
    assert SemanticIDs(("text", "image"), same, torch.zeros(2, 1, 2, 5)).agreement() is None
    assert SemanticIDs(("text", "image"), same, torch.zeros(1, 1, 2, 5)).agreement() == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_figures_are_those_of_counting(n_items, modalities, levels, size, shared, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, size, (n_items, modalities, levels), generator=generator)
    codes[torch.rand(n_items, modalities, generator=generator) < 0.3] = -1
    codes[0] = 0  # every modality has an item
    names = tuple("abc"[:modalities])
    figures = SemanticIDs(names, codes, torch.zeros(1 if shared else modalities, levels, size, 2)).figures()
    items = codes.tolist()
    groups = [range(modalities)] if shared else [[m] for m in range(modalities)]
    for level in range(levels):
        usage, perplexity = [], []
        for group in groups:
            counts = Counter(item[m][level] for item in items for m in group if item[m][level] >= 0)
            total = sum(counts.values())
            usage.append(len(counts) / size)
            perplexity.append(math.exp(-sum(n / total * math.log(n / total) for n in counts.values())))
        assert figures["usage"][level] == pytest.approx(sum(usage) / len(groups))
        assert figures["perplexity"][level] == pytest.approx(sum(perplexity) / len(groups))
    same = Counter(map(str, items))
    assert figures["collision_rate"] == pytest.approx(sum(same[str(item)] > 1 for item in items) / n_items)
    complete = [[row[0] for row in item] for item in items if all(row[0] >= 0 for row in item)]
    agreeing = sum(len(set(first)) == 1 for first in complete) / len(complete)
    assert figures["agreement"] == (pytest.approx(agreeing) if shared and modalities > 1 else None)
