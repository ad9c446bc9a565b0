"""Lines of item numbers, with tables of items and codes."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbqrec.data import Dataset


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Tiny.txt").write_text("1 10 2 10\n07 3\n2  2 3 \n")
    (tmp_path / "Tiny_items.tsv").write_text(
        'item_id\ttitle\tasin\tbrand\n10\t"Ten"\tX10\tA|B\n2\t\tX2\tläs\n3\tThree\tX3\t\n4\tNever\tX4\tC\n',
        encoding="utf-8",
    )
    np.savez(tmp_path / "codes.npz", text_v1=np.array([[2, 0], [3, 0], [4, 0], [10, 0]]))
    (tmp_path / "README.txt").write_text("Tiny 1 2 3\n")
    (tmp_path / "Tiny_item2attributes.json").write_text('{"10": [1]}\n')
    return tmp_path


def test_reads_lines_items_and_codes(folder):
    data = Dataset.load(folder)
    assert data.name == f"Tiny ({folder.name})"
    assert data.user_ids == ["1", "7", "2"]
    assert data.item_ids == ["X2", "X3", "X4", "X10"]  # in the order of their numbers
    assert [h.tolist() for h in data.histories] == [[3, 0, 3], [1], [0, 1]]
    assert data.histories.timestamps is None
    assert data.texts == {"title": ["", "Three", "Never", '"Ten"'], "brand": ["läs", "", "C", "A|B"]}
    assert data.features["text"].values[:, :4].tolist() == np.eye(4).tolist()
    assert not data.features["text"].derived


def test_a_byte_order_mark_is_no_part_of_the_first_number(folder):
    expected = Dataset.load(folder).fingerprint()
    path = folder / "Tiny.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Dataset.load(folder).fingerprint() == expected


def test_items_are_named_by_their_number_without_asin(folder):
    (folder / "Tiny_items.tsv").rename(folder / "items.tsv")
    (folder / "items.tsv").write_text("id\ttitle\n10\tTen\n2\tTwo\n3\tThree\n04\tFour\n")
    data = Dataset.load(folder)
    assert data.item_ids == ["2", "3", "4", "10"]
    assert data.texts == {"title": ["Two", "Three", "Four", "Ten"]}


def test_items_named_by_item2id(folder):
    (folder / "Tiny_items.tsv").unlink()
    (folder / "Tiny.item2id").write_text("X10\t10\nX4\t4\nX2\t2\nX3\t3\n")
    data = Dataset.load(folder)
    assert (data.item_ids, data.texts) == (["X2", "X3", "X4", "X10"], {})
    assert [h.tolist() for h in data.histories] == [[3, 0, 3], [1], [0, 1]]


def test_items_of_the_lines_without_a_table(folder):
    (folder / "Tiny_items.tsv").unlink()
    (folder / "codes.npz").unlink()
    data = Dataset.load(folder)
    assert (data.item_ids, data.texts, data.features) == (["2", "3", "10"], {}, {})
    assert [h.tolist() for h in data.histories] == [[2, 0, 2], [1], [0, 1]]


def test_a_line_an_interaction(folder):
    (folder / "Tiny.txt").write_text("5 10\n5 2\n1 3\n5 3\n1 2\n")
    data = Dataset.load(folder)
    assert data.user_ids == ["5", "1"]
    assert [h.tolist() for h in data.histories] == [[3, 0, 1], [1, 0]]


def test_features_join_by_asin(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "interactions.csv").write_text("user,item\nu,X10\nu,X2\nu,2\n")
    (other / "features").mkdir()
    np.save(other / "features" / "image.npy", np.array([[1.0], [2.0], [3.0]]))
    (other / "features" / "image.items.txt").write_text("X10\n2\nX2\n")
    image = Dataset.load(folder).with_features_of(Dataset.load(other), "image").features["image"]
    assert image.values.tolist() == [[3], [0], [0], [1]]


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


ITEMS = "item_id\tasin\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write("Other.txt", "1 2\n"), r"holds Other\.txt and Tiny\.txt; keep one"),
        (write("items.tsv", "item_id\n1\n"), r"holds Tiny_items\.tsv and items\.tsv; keep the one"),
        (lambda folder: np.savez(folder / "b.npz"), r"holds b\.npz and codes\.npz; keep the one"),
        (write("Tiny.txt", "x 1\n"), "which is no known format"),
        (write("Tiny.txt", ""), "which is no known format"),
        (write("Tiny.txt", "1 2\n3\n"), r"Tiny\.txt: line 2 has no item, expected a user and at least one item"),
        (write("Tiny.txt", "1 2\n\n3 2\n"), r"Tiny\.txt: line 2 has nothing in it"),
        (write("Tiny.txt", "1 2 3\n2 3 x\n"), r"Tiny\.txt: line 2 has 'x' where a number"),
        (write("Tiny.txt", "1 2 3\n2 3 -2\n"), r"Tiny\.txt: line 2 has '-2' where a number"),
        (write("Tiny.txt", "1 2 3\n2 3 2.0\n"), r"Tiny\.txt: line 2 has '2\.0' where a number"),
        (write("Tiny.txt", "1 2 3\n2 3\n3 2 11 2\n"), r"Tiny\.txt: line 3 has item 11, which Tiny_items\.tsv does"),
        (write("Tiny.txt", "1 2 3\n2 3\n3 2 5 2\n"), r"Tiny\.txt: line 3 has item 5, which Tiny_items\.tsv does"),
        (write("Tiny.txt", "1 2\n2 9\n1 3\n"), r"Tiny\.txt: line 2 has item 9, which Tiny_items\.tsv does"),
        (write("Tiny.txt", "4 2 3\n5 3\n4 2\n"), r"Tiny\.txt: line 3 has user 4, which line 1 has as well"),
        (write("Tiny_items.tsv", ITEMS), r"Tiny_items\.tsv: has no lines below its header"),
        (write("Tiny_items.tsv", ITEMS + "1\tA\n2\n"), r"Tiny_items\.tsv: line 3 has 1 columns, expected 2"),
        (write("Tiny_items.tsv", ITEMS + "1\tA\nx\tB\n"), r"Tiny_items\.tsv: line 3 has 'x' where a number"),
        (write("Tiny_items.tsv", ITEMS + "1\tA\n2\tB\n1\tC\n"), r"Tiny_items\.tsv: line 4 has item 1, as an earlier"),
        (write("Tiny_items.tsv", ITEMS + "1\tA\n2\tA\n"), r"Tiny_items\.tsv: 'A' appears twice, in rows 1 and 2"),
        (write("Tiny_items.tsv", ITEMS + "1\tA\n2\t\n"), r"Tiny_items\.tsv: column 'asin' is empty in line 3"),
        (lambda folder: np.savez(folder / "codes.npz", text=np.ones((3, 2), int)), r"codes\.npz: text has 3 rows, exp"),
    ],
)
def test_faults_name_the_file_and_the_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        Dataset.load(folder)
    assert "\n" not in str(raised.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["Tiny.txt", "Tiny_items.tsv"]), data=st.data())
def test_a_changed_file_is_read_or_refused_by_name(folder, survives, name, data):
    survives(folder / name, data, (b" ", b"\\t", b"\\n", b"\\x1c", b"\\xff", b"-1", b"9" * 30))
