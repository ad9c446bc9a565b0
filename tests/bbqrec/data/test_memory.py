"""How much memory reading large files takes: as much as their interactions, however much text is around them."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

# Prints how many interactions there are, and by how many MB reading them raises the process's memory at the most.
MEASURE = """
import sys
from pathlib import Path

import torch
from bbqrec.data import formats
from bbqrec.data.formats import amazon, tables
from benchmarks.machine import peak_extra_bytes

amazon.BLOCK_BYTES = tables.BLOCK_BYTES = 2**21
small, large = map(Path, sys.argv[1:])
formats.read(small)  # what is imported and set up on first use
found = []
extra = peak_extra_bytes(lambda: found.append(formats.read(large)), torch.device("cpu"))
print(len(found[0].histories.items), extra / 2**20)
"""
ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks")


def growth(small, large):
    """Interactions read from `large`, and MB that this took."""
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    interactions, megabytes = done.stdout.split()
    return int(interactions), float(megabytes)


def review(n, words):
    line = {"reviewerID": f"U{n % 900}", "asin": f"B{n % 700}", "unixReviewTime": n, "reviewText": words}
    return json.dumps(line) + "\n"


@pytest.mark.parametrize("name", ["Large_5.json", "Large_5.json.gz"])
def test_texts_of_amazon_reviews_take_no_memory(name, tmp_path):
    """60 MB of reviews, most of it words."""
    words = "very good " * 600
    for folder, count in (("small", 10), ("large", 10_000)):
        (tmp_path / folder).mkdir()
        opened = gzip.open if name.endswith(".gz") else open
        options = {"compresslevel": 1} if name.endswith(".gz") else {}
        with opened(tmp_path / folder / name, "wt", **options) as file:
            file.writelines(review(n, words) for n in range(count))
    interactions, megabytes = growth(tmp_path / "small", tmp_path / "large")
    assert interactions == 10_000
    assert megabytes < 25  # blocks of 2 MB, and the interactions


def test_movielens_ratings_are_never_all_there_as_text(tmp_path):
    """Three columns of 16 bytes each, and three numbers of 8, take 72 bytes a rating, some of them twice."""
    for folder, count in (("small", 10), ("large", 1_000_000)):
        (tmp_path / folder).mkdir()
        lines = "".join(f"{n // 100}::{n % 3701}::5::{978300000 + n}\n" for n in range(count))
        (tmp_path / folder / "ratings.dat").write_text(lines)
    interactions, megabytes = growth(tmp_path / "small", tmp_path / "large")
    assert interactions == 1_000_000
    assert megabytes < 195
