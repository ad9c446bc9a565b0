"""Integer codes as features."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bbqrec.data.formats.codes import one_hot_codes, read_codes


def test_similarity_is_that_of_the_levels_in_which_codes_agree():
    codes = np.array([[3, 255, 0], [3, 7, 0], [9, 255, 1], [-1, -1, -1], [3, 255, 0]])
    features = one_hot_codes(codes)
    assert features.values.shape == (5, 2 + 2 + 2)
    assert features.present.tolist() == [True, True, True, False, True]
    expected = [[1.75, 1.25, 0.5, 0, 1.75], [1.25, 1.75, 0, 0, 1.25], [0.5, 0, 1.75, 0, 0.5], [0] * 5]
    np.testing.assert_allclose((features.values @ features.values.T)[:4], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_any_kind_of_integer_and_size_of_code(dtype):
    codes = np.array([[100, 0], [0, 100], [100, 100]], dtype)
    np.testing.assert_allclose(np.square(one_hot_codes(codes).values).sum(1), 1.5, rtol=1e-6)


def test_so_many_codes_that_features_would_fill_the_memory_are_refused(tmp_path):
    codes = np.stack([np.arange(50_000)] * 2, 1)
    message = r"codes: got 100,000 different ones for 50,000 items, whose features would be 18\.6 GiB, expected at"
    with pytest.raises(ValueError, match="^" + message):
        one_hot_codes(codes)
    np.savez(tmp_path / "c.npz", text_v1=codes)
    with pytest.raises(ValueError, match=r"c\.npz: text_v1: " + message):
        read_codes(tmp_path / "c.npz", 50_000)


def test_codes_take_the_memory_of_their_features():
    codes = np.arange(2000)[:, None]
    tracemalloc.start()
    features = one_hot_codes(codes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * features.values.nbytes  # and a quarter, where they are looked through for NaN


def test_the_first_array_of_each_modality_counts(tmp_path):
    text, image, other = np.array([[1], [2]]), np.array([[0, 0], [-1, -1]]), np.array([[5], [5]])
    np.savez(tmp_path / "c.npz", text_llama__v2=text, image_vit=image, text_llama__v1=other, text=other)
    features = read_codes(tmp_path / "c.npz", 2)
    assert list(features) == ["text", "image"]
    assert features["text"].values.tolist() == [[1, 0], [0, 1]]
    assert features["image"].present.tolist() == [True, False]
    assert not features["text"].derived


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (np.ones((2, 1)), TypeError, r"codes: got float64, expected integers"),
        (np.ones(2, int), ValueError, r"codes: got shape \(2,\), expected \(n_items, levels\)"),
        (np.ones((2, 0), int), ValueError, r"codes: got shape \(2, 0\)"),
        (np.array([[0, 1], [0, -1]]), ValueError, r"codes: row 2 \(counted from 1\) has -1"),
        (np.array([[-2, -2], [0, 1]]), ValueError, r"codes: row 1 \(counted from 1\) has -2"),
        (np.array([[-1], [-1]]), ValueError, r"no item has any"),
    ],
)
def test_faults_name_file_and_array(tmp_path, codes, error, message):
    with pytest.raises(error, match=message):
        one_hot_codes(codes)
    np.savez(tmp_path / "c.npz", text_v1=codes)
    with pytest.raises(error, match=r"c\.npz: text_v1: .*" + message):
        read_codes(tmp_path / "c.npz", 2)


def test_faults_of_the_file(tmp_path):
    path = tmp_path / "c.npz"
    np.savez(path, text=np.ones((2, 3), int))
    with pytest.raises(ValueError, match=r"c\.npz: text has 2 rows, expected 3 \(one for each item\)"):
        read_codes(path, 3)
    np.savez(path)
    with pytest.raises(ValueError, match=r"c\.npz: holds no arrays"):
        read_codes(path, 3)
    np.savez(path, text=np.array([[None]]))
    with pytest.raises(ValueError, match=r"c\.npz: holds an array that cannot be read"):
        read_codes(path, 1)
    np.savez(path, text=np.ones((20, 3), int))
    path.write_bytes(path.read_bytes().replace(b"\1\0\0\0\0\0\0\0\1", b"\2\0\0\0\0\0\0\0\1", 1))
    with pytest.raises(ValueError, match=r"c\.npz: holds an array that cannot be read \(Bad CRC"):
        read_codes(path, 20)
    np.save(tmp_path / "plain.npy", np.ones((2, 3), int))
    for content in (b"", b"no archive", path.read_bytes()[:40], (tmp_path / "plain.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.npz: is no \.npz file"):
            read_codes(path, 1)


@pytest.mark.parametrize("shape", [(2, 10**8), (10**6, 10**6), (2, 2**62), (2, 2**70), (2, -3)])
@pytest.mark.parametrize("lies", [False, True], ids=["", "the archive's index lies as well"])
def test_a_header_that_claims_more_than_there_is_allocates_nothing(tmp_path, shape, lies, monkeypatch):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": shape})
    path = tmp_path / "c.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("text.npy", stream.getvalue() + bytes(64))
    if lies:
        size = len(stream.getvalue()) + 64
        claimed = path.read_bytes().replace(struct.pack("<II", size, size), struct.pack("<II", size, 2**32 - 2))
        path.write_bytes(claimed)
    monkeypatch.setattr(np, "ndarray", None)  # what allocates as the header says
    with pytest.raises(ValueError, match=r"c\.npz: holds an array that cannot be read"):
        read_codes(path, 2)


def changed(content, at, value):
    """With the bytes from `at` on replaced."""
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file, index, end: changed(file, index + 10, b"\x63\0"), "compression"),  # an unknown way of packing
        (lambda file, index, end: changed(file, index + 8, b"\1\0"), "encrypted"),
        (lambda file, index, end: changed(file, end + 16, struct.pack("<I", index + 9999)), ""),  # before the start
    ],
)
def test_what_zip_says_of_a_broken_file_becomes_a_sentence(tmp_path, damage, reason):
    path = tmp_path / "c.npz"
    np.savez(path, text=np.array([[1], [2]]))
    whole = path.read_bytes()
    content = damage(whole, whole.index(b"PK\1\2"), whole.index(b"PK\5\6"))
    assert content != whole
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"c\.npz: holds an array that cannot be read \(.*{reason}.*\); write it"):
        read_codes(path, 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"(2, 1), }", b"(2, 1,(((("), (b"'<i8'", b"'?i8'"), (b"(2, 1), }", b"(2, 1)))}"), (b"\x93NUM", b"\x93num")],
)
def test_what_numpy_says_of_a_broken_header_becomes_a_sentence(tmp_path, old, new):
    stream = io.BytesIO()
    np.save(stream, np.array([[1], [2]]))
    content = stream.getvalue().replace(old, new)
    assert content != stream.getvalue()
    path = tmp_path / "c.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("text.npy", content)
    with pytest.raises(ValueError, match=r"c\.npz: holds an array that cannot be read \(.+\); write it") as refused:
        read_codes(path, 2)
    assert "\n" not in str(refused.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_files_with_bytes_changed_load_or_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("codes") / "c.npz"
    save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
    save(path, text_v1=np.arange(12).reshape(4, 3), image=np.ones((4, 2), np.uint8))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        features = read_codes(path, 4)
    except (ValueError, TypeError) as refused:
        message = str(refused)
    else:
        message = "c.npz: " * all(len(each.values) == 4 for each in features.values())
    assert "c.npz: " in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["../text.npy", "/text.npy", "..\\\\text.npy"])
def test_nothing_is_unpacked_where_a_name_leads_out(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    stream = io.BytesIO()
    np.save(stream, np.array([[1], [2]]))
    with zipfile.ZipFile(folder / "c.npz", "w") as file:
        file.writestr(name, stream.getvalue())
    read_codes(folder / "c.npz", 2)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "c.npz"]


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_codes_that_would_unpickle_are_refused(tmp_path):
    np.savez(tmp_path / "c.npz", text=np.array([[Trap()], [Trap()]]))
    with pytest.raises(ValueError, match=r"c\.npz: holds an array that cannot be read"):
        read_codes(tmp_path / "c.npz", 2)
