"""MovieLens .dat files."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbqrec.data import Dataset
from bbqrec.data.formats import tables


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::20::5::30\n1::10::0.5::20\n2::10::3::5\n")
    (tmp_path / "movies.dat").write_bytes(
        "10::Amélie: The Film (2001)::Comedy|Romance\n15::Unseen (1990)::War\n20::Heat (1995)::Crime\n".encode(
            "latin-1"
        )
    )
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n")
    return tmp_path


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_reads_ratings_and_rated_movies(folder, encoding):
    path = folder / "movies.dat"
    path.write_bytes(path.read_bytes().decode("latin-1").encode(encoding))
    data = Dataset.load(folder)
    assert (data.user_ids, data.item_ids) == (["1", "2"], ["10", "20"])
    assert [h.tolist() for h in data.histories] == [[0, 1], [0]]
    assert data.histories.timestamps.tolist() == [20, 30, 5]
    assert data.texts == {
        "title": ["Amélie: The Film (2001)", "Heat (1995)"],
        "genres": ["Comedy, Romance", "Crime"],
    }


def test_movies_are_optional_and_lines_may_end_in_crlf(folder):
    (folder / "movies.dat").unlink()
    (folder / "ratings.dat").write_bytes(b"1::20::5::30\r\n1::10::0.5::20\r\n")
    data = Dataset.load(folder)
    assert (data.item_ids, data.texts) == (["20", "10"], {})
    assert data.histories[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ratings.dat", "", r"ratings\.dat: has no lines, expected at least one"),
        ("ratings.dat", "1::2::3\n", r"ratings\.dat: line 1 has 3 columns, expected 4 \('::' between\)"),
        ("ratings.dat", "1::10::5::1\n1::::5::1\n", r"ratings\.dat: column 'item' is empty in line 2"),
        ("ratings.dat", "1::10::5::1\n1::10::5::\n", r"ratings\.dat: column 'timestamp' is empty in line 2"),
        ("ratings.dat", "1::10::5::noon\n", r"ratings\.dat: line 1 has timestamp 'noon'"),
        ("ratings.dat", "1::10::5::-1e19\n", r"ratings\.dat: line 1 has timestamp '-1e19'"),
        ("ratings.dat", "1::10::5::1\n1::11::5::1\n", r"ratings\.dat: line 2 has item '11', which movies\.dat does"),
        ("movies.dat", "10::A::B\n10::A::B\n", r"movies\.dat: '10' appears twice"),
        ("movies.dat", "10::A\n", r"movies\.dat: line 1 has 2 columns, expected 3"),
    ],
)
def test_faults_name_the_file_and_the_line(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        Dataset.load(folder)
    assert "\n" not in str(raised.value)


def test_blocks_end_anywhere(folder, monkeypatch):
    expected = Dataset.load(folder).fingerprint()
    path, lines = folder / "ratings.dat", ["1::20::5::30", "1::10::0.5::20", "2::10::3::5"]
    for size in range(1, 60):
        monkeypatch.setattr(tables, "BLOCK_BYTES", size)
        path.write_bytes(("\r\n".join(lines) + "\r\n" * 5).encode("utf-8-sig"))
        assert Dataset.load(folder).fingerprint() == expected
        for wrong, message in (
            ([*lines, "", "", "3::10::3::5", ""], "line 4 has 1 columns, expected 4"),
            ([lines[0], "", *lines[1:]], "line 2 has 1 columns, expected 4"),
            ([*lines, "3::10::3"], "line 4 has 3 columns, expected 4"),
        ):
            path.write_text("\n".join(wrong))
            with pytest.raises(ValueError, match=message):
                Dataset.load(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["ratings.dat", "movies.dat"]), data=st.data())
def test_a_changed_file_is_read_or_refused_by_name(folder, survives, name, data):
    survives(folder / name, data, (b"::", b"\\n", b"\\r\\n", b"\\xff", b"1e300", b"nan", b"2000-01-01"))
