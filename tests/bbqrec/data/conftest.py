"""A tiny data set with everything in it: times, an item without interaction, an item without image, texts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from bbqrec.data import Dataset, Features, Histories, formats


@pytest.fixture
def tiny() -> Dataset:
    return Dataset(
        name="tiny",
        item_ids=["mug", "bowl", "lamp", "bench"],
        user_ids=["ann", "bo", "cy"],
        histories=Histories(
            items=np.array([0, 2, 0, 1, 2, 1, 0, 2]),
            offsets=np.array([0, 4, 5, 8]),
            timestamps=np.array([5, 6, 6, 9, 1, 2, 3, 4]),
        ),
        features={
            "text": Features(np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(4, bool)),
            "image": Features.of_items(np.ones((2, 2), np.float32), np.array([3, 0]), 4),
        },
        texts={"title": ["Blue mug", "", "Läslampa", "Bench, 2 m"], "details": ["clay", "a\nb", "", "oak"]},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of the native format, as a person would write them."""
    (tmp_path / "features").mkdir()
    (tmp_path / "interactions.csv").write_text("user,item,timestamp\nu,a,3\nu,b,1\nv,c,2\nu,c,2\n")
    (tmp_path / "items.csv").write_text("item,title\na,Apple\nb,\nc,Cherry\n")
    np.save(tmp_path / "features" / "image.npy", np.array([[1.0, 2.0], [3.0, 4.0]]))
    (tmp_path / "features" / "image.items.txt").write_text("c\na\n")
    return tmp_path


@pytest.fixture
def survives() -> Callable[[Path, st.DataObject, tuple[bytes, ...]], None]:
    """Changes a valid file as Hypothesis says and reads its folder: a data set, or one sentence that names a file."""

    def check(path: Path, data: st.DataObject, pieces: tuple[bytes, ...]) -> None:
        valid = path.read_bytes()
        content = valid
        for _ in range(data.draw(st.integers(1, 4))):
            at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 3))
            piece = data.draw(st.one_of(st.sampled_from(pieces), st.binary(max_size=3)))
            content = content[:at] + piece + content[at + length :]
        path.write_bytes(content)
        message = path.name
        try:
            formats.read(path.parent).fingerprint()
        except (ValueError, TypeError) as refused:
            message = str(refused)
        finally:
            path.write_bytes(valid)
        assert any(other.name in message for other in path.parent.iterdir())
        assert len(message.splitlines()) == 1

    return check
