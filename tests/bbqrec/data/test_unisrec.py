"""Folders of UniSRec and MISSRec, generated and real."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbqrec.data import Dataset, leave_one_out


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Tiny.item2index").write_text("X1\t1\nX0\t0\nX2\t2\n")
    (tmp_path / "Tiny.test.inter").write_text(
        "user_id:token\titem_id_list:token_seq\titem_id:token\n7\t0 1 0\t2\n3\t2\t1\n", encoding="utf-8"
    )
    (tmp_path / "Tiny.text").write_text(
        "item_id:token\ttext:token_seq\nX2\tA 1.5 m rope. Outdoor. \nX0\tOne\u2028line\n", encoding="utf-8"
    )
    np.arange(6, dtype="<f4").tofile(tmp_path / "Tiny.feat1CLS")
    np.arange(3, dtype="<f4").tofile(tmp_path / "Tiny.feat3CLS")
    return tmp_path


def test_reads_every_file(folder):
    data = Dataset.load(folder)
    assert data.item_ids == ["X0", "X1", "X2"]
    assert data.user_ids == ["7", "3"]
    assert [h.tolist() for h in data.histories] == [[0, 1, 0, 2], [2, 1]]
    assert data.features["text"].values.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert data.features["image"].values.tolist() == [[0], [1], [2]]
    assert [data.title(i) for i in range(3)] == ["One\u2028line", "X1", "A 1.5 m rope"]
    assert data.text(2) == "A 1.5 m rope. Outdoor"


def test_features_and_texts_are_optional(folder):
    for name in ("Tiny.feat1CLS", "Tiny.feat3CLS", "Tiny.text"):
        (folder / name).unlink()
    data = Dataset.load(folder)
    assert (data.features, data.texts) == ({}, {})


def test_round_trip_through_the_native_format(folder, tmp_path):
    data = Dataset.load(folder)
    data.save(tmp_path / "native")
    assert Dataset.load(tmp_path / "native").fingerprint() == data.fingerprint()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def features(*values):
    return lambda folder: np.array(values, "<f4").tofile(folder / "Tiny.feat1CLS")


HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "Tiny.test.inter").unlink(), r"Tiny\.test\.inter: is missing"),
        (write("Other.item2index", "X\t0\n"), r"holds Other\.item2index and Tiny\.item2index"),
        (write("Tiny.item2index", ""), r"Tiny\.item2index: has no lines"),
        (write("Tiny.item2index", "X0\t0\nX1\t2\n"), r"Tiny\.item2index: no item has index 1, expected 0 to 1"),
        (write("Tiny.item2index", "X0\t0\nX1\t0\n"), r"Tiny\.item2index: line 2 has index 0, which an earlier"),
        (write("Tiny.item2index", "X0\t0\nX0\t1\n"), r"Tiny\.item2index: 'X0' appears twice"),
        (write("Tiny.item2index", "X0\t-1\n"), r"Tiny\.item2index: line 1 has '-1' where an index"),
        (write("Tiny.item2index", "X0 0\n"), r"Tiny\.item2index: line 1 has 1 columns, expected 2"),
        (lambda folder: (folder / "Tiny.text").write_bytes(b"h\th\n\xff"), r"Tiny\.text: is not UTF-8 \(byte 4\)"),
        (write("Tiny.item2index", "X0\t" + "0" * 5000), r"Tiny\.item2index: line 1 has '0{60}' where an index"),
        (write("Tiny.test.inter", HEADER), r"Tiny\.test\.inter: has no lines below its header"),
        (write("Tiny.test.inter", HEADER + "1\t0 1\n"), r"Tiny\.test\.inter: line 2 has 2 columns, expected 3"),
        (write("Tiny.test.inter", HEADER + "1\t0 x\t1\n"), r"Tiny\.test\.inter: line 2 has 'x' where an index"),
        (
            write("Tiny.test.inter", HEADER + "1\t0\t1\n2\t0 3\t1\n"),
            r"test\.inter: line 3 has item 3, expected one below 3",
        ),
        (write("Tiny.test.inter", HEADER + "1\t0\t1\n1\t0\t1\n"), r"test\.inter: '1' appears twice, in rows 1 and 2"),
        (
            write("Tiny.text", "item_id:token\ttext:token_seq\nX9\tHi\n"),
            r"Tiny\.text: line 2 has item 'X9', which item2",
        ),
        (write("Tiny.text", "h\th\nX0\tHi\nX0\tHo\n"), r"Tiny\.text: line 3 has item 'X0', which an earlier"),
        (features(1, 2), r"Tiny\.feat1CLS: got 8 bytes, expected a multiple of 4 x 3"),
        (features(), r"Tiny\.feat1CLS: got 0 bytes"),
        (features(1, 2, np.nan), r"Tiny\.feat1CLS: row 3 .* NaN"),
    ],
)
def test_faults_name_the_file_and_the_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        Dataset.load(folder)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def scientific(shared_data):
    return shared_data / "amazon2018_scientific"


def test_real_data_with_text_and_image(scientific):
    data = Dataset.load(scientific / "mm_subset")
    assert (data.n_users, data.n_items, len(data.histories.items)) == (2928, 1585, 19712)
    assert {name: f.values.shape for name, f in data.features.items()} == {"text": (1585, 512), "image": (1585, 512)}
    assert all(f.present.all() and not f.derived for f in data.features.values())
    assert data.title(data.item_index("B00O47ILVA")) == data.title(0) != ""


def test_real_splits_are_those_of_its_own_files(scientific):
    split = leave_one_out(Dataset.load(scientific / "mm_subset"))
    for name, heldout in (("valid", split.validation), ("test", split.test)):
        lines = (scientific / "mm_subset" / f"Scientific.{name}.inter").read_text().splitlines()[1:]
        expected = [line.split("\t")[1:] for line in lines]
        found = [
            [" ".join(map(str, history)), str(target)]
            for history, target in zip(heldout.histories, heldout.targets, strict=True)
        ]
        assert found == expected


def test_real_data_with_images_of_another_folder(scientific):
    full = Dataset.load(scientific / "full")
    assert (full.n_users, full.n_items, len(full.histories.items)) == (8442, 4385, 59384)
    assert full.features["text"].derived
    assert full.features["text"].values.shape == (4385, 128)
    images = full.with_features_of(Dataset.load(scientific / "mm_subset"), "image").features["image"]
    assert images.present.sum() == 1585


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["Tiny.item2index", "Tiny.test.inter", "Tiny.text", "Tiny.feat1CLS"]), data=st.data())
def test_a_changed_file_is_read_or_refused_by_name(folder, survives, name, data):
    survives(folder / name, data, (b"\\t", b"\\n", b"\\xff", b"7" * 5000, "٣".encode(), b" "))
