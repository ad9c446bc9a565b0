"""Amazon reviews and metadata of three years."""

import gzip
import json
import re
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbqrec.data import Dataset
from bbqrec.data.formats import amazon

REVIEWS_2018 = [
    {"reviewerID": "U", "asin": "B1", "unixReviewTime": 30, "overall": 5.0, "style": {"Color:": "red"}},
    {"overall": 1.0, "reviewerID": "V", "asin": "B2", "unixReviewTime": 7, "vote": "3"},
    {"reviewerID": "U", "asin": "B2", "unixReviewTime": 20, "image": ["x"]},
    {"reviewerID": "U", "asin": "B2", "unixReviewTime": 20},
]
METADATA_2018 = [
    {"asin": "B9", "title": "Of no one"},
    {
        "asin": "B2",
        "title": "Mug &amp; bowl",
        "brand": "Clay",
        "category": ["Home", "Kitchen"],
        "feature": [],
        "price": 1,
    },
    {"asin": "B2", "title": "Second line"},
]


def lines(objects):
    return "".join(json.dumps(o) + "\n" for o in objects).encode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Tiny_5.json.gz").write_bytes(gzip.compress(lines(REVIEWS_2018)))
    (tmp_path / "meta_Tiny.json.gz").write_bytes(gzip.compress(lines(METADATA_2018)))
    (tmp_path / "config.json").write_text("{\n}\n")
    (tmp_path / "other.json").write_text('{"4": [1, 2]}\n')
    return tmp_path


def test_2018_keeps_all_reviews(folder):
    data = Dataset.load(folder)
    assert data.name == "Tiny_5"
    assert (data.user_ids, data.item_ids) == (["U", "V"], ["B1", "B2"])
    assert [h.tolist() for h in data.histories] == [[1, 1, 0], [1]]
    assert data.histories.timestamps.tolist() == [20, 20, 30, 7]
    assert data.texts == {"title": ["", "Mug & bowl"], "brand": ["", "Clay"], "categories": ["", "Home, Kitchen"]}
    assert data.features["text"].present.tolist() == [False, True]


def test_metadata_is_optional_and_files_may_be_unpacked(folder):
    (folder / "meta_Tiny.json.gz").unlink()
    (folder / "Tiny_5.json.gz").rename(folder / "Tiny.jsonl")
    (folder / "Tiny.jsonl").write_bytes(lines(REVIEWS_2018))
    data = Dataset.load(folder)
    assert (data.name, data.item_ids, data.texts) == ("Tiny", ["B1", "B2"], {})


def test_large_files_are_read_in_blocks(folder, monkeypatch):
    expected = Dataset.load(folder).fingerprint()
    monkeypatch.setattr(amazon, "BLOCK_BYTES", 100)
    assert Dataset.load(folder).fingerprint() == expected


def test_2023_has_milliseconds_and_parents(tmp_path):
    reviews = [
        {"user_id": "U", "asin": "C1", "parent_asin": "P1", "timestamp": 1_600_000_000_900, "rating": 5.0},
        {"user_id": "U", "asin": "C2", "parent_asin": "P2", "timestamp": 1_600_000_000_100},
        {"user_id": "U", "asin": "C3", "parent_asin": "P1", "timestamp": 1_500_000_000_999},
    ]
    metadata = [
        {
            "parent_asin": "P2",
            "title": "Pot",
            "store": "Clay",
            "features": ["Blue", "Big"],
            "description": ["A", "pot\n here"],
            "categories": [],
            "details": {"Weight": "1"},
        },
    ]
    (tmp_path / "Tiny.jsonl.gz").write_bytes(gzip.compress(lines(reviews)))
    (tmp_path / "meta_Tiny.jsonl.gz").write_bytes(gzip.compress(lines(metadata)))
    data = Dataset.load(tmp_path)
    assert data.item_ids == ["P1", "P2"]
    assert data.histories[0].tolist() == [0, 1, 0]
    assert data.histories.timestamps.tolist() == [1_500_000_000, 1_600_000_000, 1_600_000_000]
    assert data.texts == {
        "title": ["", "Pot"],
        "brand": ["", "Clay"],
        "details": ["", "Blue, Big"],
        "description": ["", "A, pot here"],
    }


def test_metadata_of_2014_is_python(folder):
    (folder / "meta_Tiny.json.gz").write_bytes(
        gzip.compress(b"{'asin': 'B1', 'title': \"Bo's mug\", 'categories': [['Home', 'Cups'], ['Gifts']]}\n")
    )
    assert Dataset.load(folder).texts == {"title": ["Bo's mug", ""], "categories": ["Home, Cups, Gifts", ""]}


def reviews(*changes):
    """Reviews of which the second is changed so."""
    content = lines([REVIEWS_2018[0]]) + b"".join(
        c if isinstance(c, bytes) else lines([{**REVIEWS_2018[1], **c}]) for c in changes
    )
    return lambda folder: (folder / "Tiny_5.json.gz").write_bytes(gzip.compress(content))


def metadata(content):
    return lambda folder: (folder / "meta_Tiny.json.gz").write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "b.json").write_bytes(lines(REVIEWS_2018)),
            r"Tiny_5\.json\.gz and b\.json, both rev",
        ),
        (lambda folder: (folder / "m.json").write_bytes(lines(METADATA_2018)), r"m\.json and meta_Tiny\S+, both meta"),
        (lambda folder: (folder / "Tiny_5.json.gz").unlink(), "which is no known format"),
        (lambda folder: (folder / "Tiny_5.json.gz").write_bytes(b""), "which is no known format"),
        (reviews(b"{\n"), r"Tiny_5\.json\.gz: line 2 is no JSON object"),
        (reviews(b"[1]\n"), r"Tiny_5\.json\.gz: line 2 is no JSON object"),
        (reviews({}, {"unixReviewTime": "noon"}), r"Tiny_5\.json\.gz: line 3 has unixReviewTime 'noon'"),
        (reviews({"unixReviewTime": None}), r"Tiny_5\.json\.gz: row 2 .* has timestamp None"),
        (reviews({"reviewerID": ""}), r"Tiny_5\.json\.gz: column 'user' is empty in row 2"),
        (reviews({"asin": None}), r"Tiny_5\.json\.gz: column 'item' is empty in row 2"),
        (metadata(b""), r"meta_Tiny\.json\.gz: has no lines"),
        (metadata(lines(METADATA_2018) + b"oops\n"), r"meta_Tiny\.json\.gz: line 4 is no JSON object"),
        (metadata(lines(METADATA_2018) + b'{"title": "x"}\n'), r"meta_Tiny\.json\.gz: line 4 names no item"),
        (metadata(b'{"asin": ["B2"]}\n'), r"meta_Tiny\.json\.gz: line 1 names no item"),
        (metadata(lines(METADATA_2018[:1])), r"meta_Tiny\.json\.gz: describes no item that the reviews name"),
        (
            lambda folder: (folder / "meta_Tiny.json.gz").write_bytes(gzip.compress(lines(METADATA_2018))[:-20]),
            r"meta_Tiny\.json\.gz: is no whole gzip file",
        ),
        (
            lambda folder: (folder / "Tiny_5.json.gz").write_bytes(gzip.compress(lines(REVIEWS_2018 * 999))[:-20]),
            r"Tiny_5\.json\.gz: is no whole gzip file",
        ),
        (
            lambda folder: (folder / "meta_Tiny.json.gz").write_bytes(b"no gzip"),
            r"meta_Tiny\.json\.gz: is no whole gzip",
        ),
    ],
)
def test_faults_name_the_file_and_the_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        Dataset.load(folder)
    assert "\n" not in str(raised.value)


HALF = '{"asin": "B2", "title": "half \\ud800 a character"}\n'


def test_half_of_a_character_becomes_a_question_mark(folder):
    metadata(HALF.encode())(folder)
    data = Dataset.load(folder)
    assert data.texts == {"title": ["", "half ? a character"]}
    data.fingerprint()


def test_a_byte_order_mark_and_empty_lines_are_no_reviews(folder):
    expected = Dataset.load(folder).fingerprint()
    path = folder / "Tiny_5.json.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + content.replace(b"\n", b"\n\n")))
    assert Dataset.load(folder).fingerprint() == expected


def test_lists_in_lists_and_numbers_without_end_are_no_text(folder):
    numeral = "&#" + "9" * 5000 + ";"
    nested = "[" * 200 + "]" * 200
    metadata(f'{{"asin": "B2", "title": "{numeral}", "category": ["a", {nested}]}}\n'.encode())(folder)
    assert Dataset.load(folder).texts == {"title": ["", numeral], "categories": ["", "a"]}


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b"{[]: 1}", b"(" * 100_000, b"-" * 100_000, b"{'asin': __import__('os')}"]
)
def test_what_neither_json_nor_python_reads_is_refused(line, folder):
    metadata(lines(METADATA_2018) + line)(folder)
    with pytest.raises(ValueError, match=r"meta_Tiny\.json\.gz: line 4 is no JSON object"):
        Dataset.load(folder)


@pytest.mark.parametrize("name", ["Tiny_5.json.gz", "meta_Tiny.json.gz"])
def test_a_packed_line_without_end_is_not_unpacked(name, folder, monkeypatch):
    monkeypatch.setattr(amazon, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(amazon, "BLOCK_BYTES", 1 << 10)
    path = folder / name
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b" " * (1 << 26)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: has a line of more than 1 MB"):
        Dataset.load(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


@pytest.fixture
def unpacked(tmp_path):
    (tmp_path / "Tiny_5.json").write_bytes(lines(REVIEWS_2018))
    (tmp_path / "meta_Tiny.json").write_bytes(lines(METADATA_2018))
    return tmp_path


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["Tiny_5.json", "meta_Tiny.json"]), data=st.data())
def test_a_changed_file_is_read_or_refused_by_name(unpacked, survives, name, data):
    pieces = (b"[", b"{", b"null", b"[]", b"\\ud800", b"\n", b"'", b"NaN", b"9" * 30, b"&#9;", b"\xff")
    survives(unpacked / name, data, pieces)
