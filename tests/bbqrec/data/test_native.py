"""The native format: what is read, the round trip, and every fault in the files."""

import io
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbqrec.data import Dataset


def test_reads_files_as_people_write_them(folder):
    data = Dataset.load(folder)
    assert (data.name, data.path) == (folder.name, folder)
    assert (data.user_ids, data.item_ids) == (["u", "v"], ["a", "b", "c"])
    assert [h.tolist() for h in data.histories] == [[1, 2, 0], [2]]
    assert data.histories.timestamps.tolist() == [1, 2, 3, 2]
    assert [data.title(i) for i in range(3)] == ["Apple", "b", "Cherry"]
    assert data.features["image"].values.tolist() == [[3, 4], [0, 0], [1, 2]]
    assert data.features["image"].present.tolist() == [True, False, True]


def test_texts_of_other_kinds_in_parquet(folder):
    (folder / "items.csv").unlink()
    columns = {
        "item": ["a", "b", "c"],
        "brand": pl.Series(["x", None, "y"], dtype=pl.Categorical),
        "kind": pl.Series(["x", "y", "x"], dtype=pl.Enum(["x", "y"])),
        "genres": [["red", "blue"], [], ["green", None]],
        "price": [1.0, 2.0, 3.0],
    }
    pl.DataFrame(columns).write_parquet(folder / "items.parquet")
    texts = Dataset.load(folder).texts
    assert texts == {"brand": ["x", "", "y"], "kind": ["x", "y", "x"], "genres": ["red, blue", "", "green"]}


def test_without_items_and_times(folder):
    (folder / "items.csv").unlink()
    (folder / "interactions.csv").write_text("item,user,rating\nb,u,1\n007,v,2\na,u,3\n")
    data = Dataset.load(folder)
    assert data.item_ids == ["b", "007", "a"]
    assert [h.tolist() for h in data.histories] == [[0, 2], [1]]
    assert data.histories.timestamps is None
    assert data.features["image"].present.tolist() == [False, False, True]


def test_numbers_as_ids_stay_as_they_are_written(tmp_path):
    (tmp_path / "interactions.csv").write_text("user,item\n01,7\n1,007\n")
    data = Dataset.load(tmp_path)
    assert (data.user_ids, data.item_ids) == (["01", "1"], ["7", "007"])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["3", "-1"], [3, -1]),
        (["3.9", "4"], [3, 4]),
        (["1970-01-01", "1970-01-02"], [0, 86400]),
        (["1970-01-01 00:00:05", "1970-01-01 00:01:00"], [5, 60]),
        (["1970-01-01T00:00:05", "1970-01-01T00:01:00"], [5, 60]),
    ],
)
def test_timestamps_in_csv(folder, written, expected):
    lines = [f"u,a,{written[0]}", f"v,b,{written[1]}"]
    (folder / "interactions.csv").write_text("\n".join(["user,item,timestamp", *lines]))
    assert Dataset.load(folder).histories.timestamps.tolist() == expected


@pytest.mark.parametrize(
    "written",
    [
        ["0.9", "0.1", "0.5"],
        ["1970-01-01T00:00:00.900", "1970-01-01T00:00:00.100", "1970-01-01T00:00:00.500"],
        ["1970-01-01 00:00:00.009", "1970-01-01 00:00:00.001", "1970-01-01 00:00:00.005"],
    ],
)
def test_order_within_a_second_in_csv(folder, written):
    lines = [f"u,{item},{time}" for item, time in zip("abc", written, strict=True)]
    (folder / "interactions.csv").write_text("\n".join(["user,item,timestamp", *lines]))
    histories = Dataset.load(folder).histories
    assert histories[0].tolist() == [1, 2, 0]
    assert histories.timestamps.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "times",
    [
        pl.Series([7.9, 7.1, 7.5]),
        pl.Series([7.9, 7.1, 7.5], dtype=pl.Float32),
        pl.Series([7.9, 7.1, 7.5]).cast(pl.Decimal(10, 1)),
        pl.Series([7_900, 7_100, 7_500]).cast(pl.Datetime("ms", "Asia/Tokyo")),
        pl.Series([7_000_000_009, 7_000_000_001, 7_000_000_005]).cast(pl.Datetime("ns")),
    ],
    ids=lambda times: str(times.dtype),
)
def test_order_within_a_second_in_parquet(folder, times):
    (folder / "interactions.csv").unlink()
    pl.DataFrame({"user": ["u"] * 3, "item": ["a", "b", "c"], "timestamp": times}).write_parquet(
        folder / "interactions.parquet"
    )
    histories = Dataset.load(folder).histories
    assert histories[0].tolist() == [1, 2, 0]
    assert histories.timestamps.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    "written",
    [b"\xef\xbb\xbfc\na\n", b"c\r\na\r\n", b"c  \n\ta", b"c\na\n\n\n"],
    ids=["byte order mark", "CRLF", "blanks", "empty lines at the end"],
)
def test_items_of_features_as_editors_write_them(folder, written):
    (folder / "features" / "image.items.txt").write_bytes(written)
    assert Dataset.load(folder).features["image"].values.tolist() == [[3, 4], [0, 0], [1, 2]]


def test_features_of_more_items_than_the_catalogue_has(folder):
    np.save(folder / "features" / "image.npy", np.ones((4, 2)))
    (folder / "features" / "image.items.txt").write_text("c\nx\ny\na\n")  # half of them: fine
    assert Dataset.load(folder).features["image"].present.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [pl.Int32, pl.Float64, pl.Datetime("ms"), pl.Datetime("ns", "UTC"), pl.Date])
def test_timestamps_in_parquet(folder, dtype):
    day = 1 if dtype == pl.Date else 86400
    seconds = pl.Series([day, 2 * day])
    scale = {"ms": 10**3, "ns": 10**9}.get(getattr(dtype, "time_unit", None), 1)
    (folder / "interactions.csv").unlink()
    table = {"user": [1, 2], "item": ["a", "b"], "timestamp": (seconds * scale).cast(dtype)}
    pl.DataFrame(table).write_parquet(folder / "interactions.parquet")
    data = Dataset.load(folder)
    assert data.histories.timestamps.tolist() == [86400, 172800]
    assert data.user_ids == ["1", "2"]


def test_round_trip(tmp_path, tiny):
    tiny.save(tmp_path / "saved")
    loaded = Dataset.load(tmp_path / "saved")
    assert loaded.fingerprint() == tiny.fingerprint()
    assert loaded.item_ids == tiny.item_ids
    assert loaded.texts == tiny.texts
    assert loaded.histories.timestamps.tolist() == tiny.histories.timestamps.tolist()
    with pytest.raises(ValueError, match="saved is not empty"):
        tiny.save(tmp_path / "saved")


def test_round_trip_of_ids_with_odd_characters(tmp_path, tiny):
    odd = replace(tiny, item_ids=["mug\u2028", "bo\x85wl", " lamp\t", "be\x0cnch"], user_ids=["ann\n", "bo", "c,y"])
    odd.save(tmp_path / "saved")
    loaded = Dataset.load(tmp_path / "saved")
    assert loaded.item_ids == odd.item_ids
    assert loaded.fingerprint() == odd.fingerprint()


def test_a_text_column_in_the_place_of_the_ids_is_not_saved(tmp_path, tiny):
    data = replace(tiny, texts={"item": ["x"] * tiny.n_items})
    with pytest.raises(ValueError, match="texts: got a column 'item'"):
        data.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", "a\0b", ".x", ".."])
def test_features_whose_name_is_none_of_a_file_are_not_saved(tmp_path, tiny, name):
    with pytest.raises(ValueError, match=r"features: got the name .*, expected one without slashes"):
        replace(tiny, features={name: tiny.features["text"]}).save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("newline", ["\n", "\r"])
def test_item_ids_with_newlines_are_not_saved(tmp_path, tiny, newline):
    bad = replace(tiny, item_ids=["mug", f"bo{newline}wl", "lamp", "bench"])
    with pytest.raises(ValueError, match=r"item_ids: 'bo\\[nr]wl' in row 2 .* has a newline"):
        bad.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_round_trip_derives_text_features_again(tmp_path, folder):
    data = Dataset.load(folder)
    assert data.features["text"].derived
    assert data.features["text"].present.tolist() == [True, False, True]
    data.save(tmp_path / "saved")
    loaded = Dataset.load(tmp_path / "saved")
    assert loaded.fingerprint() == data.fingerprint()
    np.testing.assert_array_equal(loaded.features["text"].values, data.features["text"].values)


def test_timestamps_of_another_kind(folder):
    (folder / "interactions.csv").unlink()
    pl.DataFrame({"user": ["u"], "item": ["a"], "timestamp": [[1]]}).write_parquet(folder / "interactions.parquet")
    with pytest.raises(TypeError, match=r"interactions\.parquet: column 'timestamp' is of List"):
        Dataset.load(folder)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def save(array):
    return lambda folder: np.save(folder / "features" / "image.npy", array)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write("interactions.csv", ""), r"interactions\.csv: cannot be read"),
        (write("interactions.csv", "user,item\n"), r"interactions\.csv: has no rows"),
        (
            write("interactions.csv", "user,thing\nu,a\n"),
            r"interactions\.csv: got columns user, thing, expected a .*'item'",
        ),
        (write("interactions.csv", "user,item\nu,a\n,b\n"), r"interactions\.csv: column 'user' is empty in row 2"),
        (
            write("interactions.csv", "user,item\nu,a\nu,z\n"),
            r"interactions\.csv: row 2 .* has item 'z', which items\.csv",
        ),
        (write("interactions.csv", "user,item,timestamp\nu,a,1\nu,b,noon\n"), r"csv: row 2 .* has timestamp 'noon'"),
        (
            write("interactions.csv", "user,item,timestamp\nu,a,1970-01-01\nu,a,1970-01-02\nu,b,7\n"),
            r"csv: row 3 .* has timestamp '7'",
        ),
        (write("interactions.csv", "user,item,timestamp\nu,a,1\nu,b,\n"), r"csv: row 2 .* has timestamp None"),
        (
            lambda folder: (folder / "interactions.csv").rename(folder / "interactions.parquet"),
            r"interactions\.parquet: cannot be read",
        ),
        (write("items.csv", "item\na\nb\nc\nb\n"), r"items\.csv: 'b' appears twice, in rows 2 and 4"),
        (write("items.csv", ""), r"items\.csv: cannot be read"),
        (
            write("features/image.items.txt", "c\n"),
            r"image\.npy: got 2 rows, expected 1 \(one for each line of image\.it",
        ),
        (write("features/image.items.txt", "c\nc\n"), r"image\.items\.txt: 'c' appears twice, in rows 1 and 2"),
        (
            write("features/image.items.txt", "x\ny\n"),
            r"image\.items\.txt: 2 of 2 lines name no item of this data set, e\.g\. 'x'",
        ),
        (
            lambda folder: (save(np.ones((3, 2)))(folder), write("features/image.items.txt", "c\nx\ny\n")(folder)),
            r"image\.items\.txt: 2 of 3 lines name no item of this data set, e\.g\. 'x'; .* e\.g\. 'a'",
        ),
        (
            lambda folder: (folder / "features/image.items.txt").write_bytes(b"c\n\xff\n"),
            r"image\.items\.txt: is not UTF-8 \(byte 2\)",
        ),
        (write("features/image.items.txt", ""), r"image\.npy: got 2 rows, expected 0"),
        (write("interactions.csv", "user,item,timestamp\nu,a,1.5\nu,b,nan\n"), r"csv: row 2 .* has timestamp 'nan'"),
        (write("items.parquet", "x"), r"holds items\.parquet and items\.csv; keep one of them"),
        (lambda folder: (folder / "features/image.items.txt").unlink(), r"image\.npy: image\.items\.txt is missing"),
        (save(np.array([[1, 2], [3, np.nan]])), r"image\.npy: row 2 .* NaN"),
        (save(np.ones(2)), r"image\.npy: got float64 of shape \(2,\)"),
        (save(np.ones((2, 0))), r"image\.npy: got float64 of shape \(2, 0\)"),
        (save(np.array([["a"], ["b"]])), r"image\.npy: got <U1"),
        (save(np.array([[None], [None]])), r"image\.npy: is no NumPy array of numbers"),
        (write("features/image.npy", ""), r"image\.npy: is no NumPy array of numbers"),
        (write("features/image.npy", "no array"), r"image\.npy: is no NumPy array of numbers"),
    ],
)
def test_faults_name_the_file_and_the_row(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        Dataset.load(folder)
    assert "\n" not in str(raised.value)


def npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("shape", [(2**60, 4), (2**62, 2**62), (10**9, 64), (10**30, 1)])
def test_features_of_absurd_shape_are_refused_before_allocation(folder, shape, monkeypatch):
    path = next(folder.glob("features/*.npy"))
    path.write_bytes(npy_header(shape) + bytes(64))
    monkeypatch.setattr(np, "fromfile", None)  # what allocates as the header says
    with pytest.raises(ValueError, match=r"\.npy: is no NumPy array of numbers"):
        Dataset.load(folder)


def test_truncated_features_are_named(folder):
    path = next(folder.glob("features/*.npy"))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"\.npy: is no NumPy array of numbers"):
            Dataset.load(folder)


def test_features_that_are_an_archive_are_named(folder):
    path = next(folder.glob("features/*.npy"))
    with path.open("wb") as file:
        np.savez(file, np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\.npy: is no NumPy array of numbers"):
        Dataset.load(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_features_with_bytes_flipped_load_or_are_refused(folder, data):
    path = folder / "features" / "mutated.npy"
    whole = bytearray(next(p for p in folder.glob("features/*.npy") if p != path).read_bytes())
    names = next(p for p in folder.glob("features/*.items.txt") if p.name != "mutated.items.txt")
    path.with_suffix(".items.txt").write_bytes(names.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(whole))
    try:
        features = Dataset.load(folder).features["mutated"]
    except ValueError as refused:
        message = str(refused)
    else:
        message = "mutated.npy: " * bool(np.isfinite(features.values).all())
    assert "mutated.npy: " in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("name", ["[2018]", "a*", "{a}", "k=v"])
def test_a_folder_of_any_name_is_read_and_no_other(name, kind, tmp_path):
    for folder, user in ((name, "own"), ("abc", "other's"), ("2", "other's")):
        (tmp_path / folder).mkdir()
        frame = pl.DataFrame({"user": [user], "item": ["a"]})
        write_table = frame.write_csv if kind == "csv" else frame.write_parquet
        with (tmp_path / folder / f"interactions.{kind}").open("wb") as file:
            write_table(file)
    assert Dataset.load(tmp_path / name).user_ids == ["own"]


@pytest.mark.parametrize(
    ("column", "kind"),
    [([["u"]], "List"), ([{"a": 1}], "Struct"), ([b"\xff"], "Binary"), (pl.Series([2**31 - 1]).cast(pl.Date), "Date")],
)
def test_users_of_another_kind(column, kind, folder):
    (folder / "interactions.csv").unlink()
    pl.DataFrame({"user": column, "item": ["a"]}).write_parquet(folder / "interactions.parquet")
    with pytest.raises(
        TypeError, match=rf"interactions\.parquet: column 'user' is of {kind}.*, expected strings or num"
    ):
        Dataset.load(folder)


@pytest.mark.parametrize(
    "time",
    [pl.Series([2**31 - 1], dtype=pl.Int32).cast(pl.Date), pl.Series([2**63], dtype=pl.UInt64), pl.Series([1e19])],
)
def test_times_that_no_int64_holds(time, folder):
    (folder / "interactions.csv").unlink()
    pl.DataFrame({"user": ["u"], "item": ["a"], "timestamp": time}).write_parquet(folder / "interactions.parquet")
    with pytest.raises(
        ValueError, match=r"interactions\.parquet: row 1 .* has timestamp .*, expected a number or a date"
    ):
        Dataset.load(folder)


def test_broken_parquet_on_which_polars_panics_is_refused(folder, monkeypatch):
    def panic(*arguments, **options):
        raise pl.exceptions.PanicException("range end index 9\nout of range")

    (folder / "interactions.csv").unlink()
    (folder / "interactions.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(pl, "read_parquet", panic)
    with pytest.raises(ValueError, match=r"interactions\.parquet: cannot be read \(range end index 9 out of range\)"):
        Dataset.load(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["interactions.csv", "items.csv"]), data=st.data())
def test_a_changed_file_is_read_or_refused_by_name(folder, survives, name, data):
    survives(folder / name, data, (b",", b"\n", b'"', b"\xff", b"\0", b"1e300", b"9" * 30, b"nan", b"2000-01-01"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_parquet_is_read_or_refused_by_name(folder, survives, data):
    pl.read_csv(folder / "items.csv").write_parquet(folder / "items.parquet")
    survives(folder / "items.parquet", data, (b"\xff", b"\0", b"PAR1"))


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_features_that_would_unpickle_are_refused(folder):
    np.save(folder / "features" / "image.npy", np.array([[Trap()], [Trap()]]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"image\.npy: is no NumPy array of numbers"):
        Dataset.load(folder)
