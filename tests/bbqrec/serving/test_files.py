"""Requests from files, and what is none."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbqrec.serving.files import read_requests

VALID = b'{"user": "u", "history": ["a"], "timestamps": [1]}\n\n["a", "b"]\n'


@pytest.fixture
def path(tmp_path):
    return tmp_path / "requests.jsonl"


def read(path, content):
    path.write_bytes(content)
    with path.open(encoding="utf-8") as file:
        return list(read_requests(file, path.name))


def test_lines_are_requests(path):
    first, second = read(path, VALID)
    assert (first.user, first.history, first.timestamps) == ("u", ["a"], [1])
    assert (second.place, second.user, second.history) == ("requests.jsonl: line 3", None, ["a", "b"])


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000, b'["a", "\\ud800"]', b'{"user": "\\udc00", "history": ["a"]}', b'{"history": {}}', b"9" * 5000],
)
def test_a_line_that_is_no_request_is_named(line, path):
    with pytest.raises(ValueError, match=r"requests\.jsonl: line 4 is .*, expected"):
        read(path, VALID + line)


def test_a_file_of_another_encoding_is_named(path):
    with pytest.raises(ValueError, match=r"requests\.jsonl: is not UTF-8"):
        read(path, VALID + "größe".encode("latin-1"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_read_or_refused_by_name(path, data):
    pieces = st.sampled_from([b"[", b"{", b"null", b"\\ud800", b"\n", b"\r", b"1e999", b"NaN", b"\xff"])
    content = VALID
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 3))
        content = content[:at] + data.draw(st.one_of(pieces, st.binary(max_size=3))) + content[at + length :]
    message = "requests.jsonl: "
    try:
        requests = read(path, content)
    except ValueError as refused:
        message = str(refused)
    else:
        json.dumps([(each.user, each.history) for each in requests], ensure_ascii=False).encode()
    assert message.startswith("requests.jsonl: ")
    assert len(message.splitlines()) == 1
