"""RecBole atomic files."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbqrec.data import Dataset

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tyear:float\tclass:token_seq\tmovie_title:token\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.inter").write_text(INTER + "u\ta\t5\t1.5e9\nu\tb\t1\t7.0\nv\t007\t3\t2.9\nv\ta\t3\t2.1\n")
    (tmp_path / "tiny.item").write_text(
        ITEM + 'a\t1995\tDrama War\t"Amélie"\n007\t1996\t\tGoldenEye\nz\t2000\tWar\tZ\nb\t\tWar\t\n', encoding="utf-8"
    )
    (tmp_path / "tiny.user").write_text("user_id:token\tage:float\nu\t7\n")
    return tmp_path


def test_reads_interactions_and_items(folder):
    data = Dataset.load(folder)
    assert data.name == "tiny"
    assert (data.user_ids, data.item_ids) == (["u", "v"], ["a", "007", "z", "b"])
    assert [h.tolist() for h in data.histories] == [[3, 0], [0, 1]]
    assert data.histories.timestamps.tolist() == [7, 1_500_000_000, 2, 2]
    assert data.texts == {
        "title": ['"Amélie"', "GoldenEye", "Z", ""],
        "class": ["Drama War", "", "War", "War"],
    }
    assert list(data.features) == ["text"]


def test_items_and_times_are_optional(folder):
    (folder / "tiny.item").unlink()
    (folder / "tiny.inter").write_text("item_id:token\tuser_id:token\nb\tu\nc\tv\na\tu\n\n")
    data = Dataset.load(folder)
    assert (data.item_ids, data.texts, data.histories.timestamps) == (["b", "c", "a"], {}, None)
    assert [h.tolist() for h in data.histories] == [[0, 2], [1]]


def test_a_column_called_title_comes_before_others(folder):
    (folder / "tiny.item").write_text("item_id:token\tbrand:token\ttitle:token\na\tX\tT\nb\tX\t\n007\tX\t\n")
    assert Dataset.load(folder).texts == {"title": ["T", "", ""], "brand": ["X", "X", "X"]}


def inter(text, header=INTER):
    return lambda folder: (folder / "tiny.inter").write_text(header + text)


def item(text, header=ITEM):
    return lambda folder: (folder / "tiny.item").write_text(header + text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "b.inter").touch(), r"holds b\.inter and tiny\.inter; put all"),
        (inter("", header=""), r"tiny\.inter: has no lines below its header"),
        (inter(""), r"tiny\.inter: has no lines below its header"),
        (inter("u\ta\n", header="user_id\titem_id\n"), r"tiny\.inter: line 1 has 'user_id', expected name:type"),
        (
            inter("u\ta\n", header="user_id:token\titem_id:int\n"),
            r"tiny\.inter: line 1 has 'item_id:int', expected name:type",
        ),
        (inter("u\n", header="user_id:token\n"), r"tiny\.inter: got columns user_id, expected a column 'item_id'"),
        (
            inter("u\tu\ta\n", header="user_id:token\tuser_id:float\titem_id:token\n"),
            r"tiny\.inter: two columns have the same name, got user_id, user_id",
        ),
        (
            inter("u\ta b\tc\n", header="user_id:token\titem_id_list:token_seq\titem_id:token\n"),
            r"tiny\.inter: holds histories",
        ),
        (inter("u\ta\t1\t1\nu\ta\t1\n"), r"tiny\.inter: line 3 has 3 columns, expected 4 \('\\t' between\)"),
        (inter("u\ta\t1\t1\n\tb\t1\t1\n"), r"tiny\.inter: column 'user_id' is empty in line 3"),
        (inter("u\ta\t1\tnoon\n"), r"tiny\.inter: line 2 has timestamp 'noon'"),
        (inter("u\ta\t1\t1e300\n"), r"tiny\.inter: line 2 has timestamp '1e300'"),
        (inter("u\n", header="a\rb:token\n"), r"tiny\.inter: got columns a b, expected a column 'user_id'"),
        (inter("u\ta\t1\t1\nu\ty\t1\t1\n"), r"tiny\.inter: line 3 has item 'y', which tiny\.item does not list"),
        (item("a\t1\tx\ty\na\t1\tx\ty\n"), r"tiny\.item: 'a' appears twice"),
        (item("a\t1\tx\ty\n\t1\tx\ty\n"), r"tiny\.item: column 'item_id' is empty in line 3"),
    ],
)
def test_faults_name_the_file_and_the_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as raised:
        Dataset.load(folder)
    assert "\n" not in str(raised.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["tiny.inter", "tiny.item"]), data=st.data())
def test_a_changed_file_is_read_or_refused_by_name(folder, survives, name, data):
    survives(folder / name, data, (b"\\t", b"\\n", b"\\r", b"\\xff", b":", b":token", b"1e300", b"nan"))
