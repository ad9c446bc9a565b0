"""Feeds broken files to every reader, guided by coverage: each has to be read, or refused in a sentence that names it.

    python tools/fuzz.py [TARGET ...] [--inputs 3000] [--corpus DIR] [--replay FILE]

A target is one file of a valid folder; arguments choose those whose names start so. In a process of its own it is
replaced, --inputs times, by what atheris makes of its valid content, with a fixed seed; a tenth as often where reading
takes long. A finding is an exception that is no `ValueError` or `TypeError` of one line naming a file, data that cannot
be used, 1 GB of memory, or 20 seconds. Its input is kept in build/fuzz, and the exit code is 1. `TARGET --replay FILE`
feeds such an input again. With --corpus, inputs that reached new code are kept in DIR/TARGET, and are where the next
call starts.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["POLARS_MAX_THREADS"] = "1"  # threads take address space, which is limited here

try:
    import atheris
except ImportError:
    atheris = None
with atheris.instrument_imports(include=["bbqrec", "yaml"]) if atheris else nullcontext():
    from bbqrec.config import Config

import numpy as np
import polars as pl
import torch

from bbqrec.data import Dataset, Features, formats
from bbqrec.data.demo import make_demo_dataset
from bbqrec.data.text import with_text_features
from bbqrec.evaluation.ranking import METRICS
from bbqrec.models.build import build_model
from bbqrec.serving.files import read_requests
from bbqrec.serving.recommender import NEW_ITEMS, BBQRec
from bbqrec.tokenizer.item_encoder import (
    FEATURES,
    TOKENIZER,
    WORDS,
    catalogue_features,
    principal_directions,
    save_preparation,
)
from bbqrec.tokenizer.model import Tokenizer
from bbqrec.training.plots import read_log
from bbqrec.training.run import Run, save_model, save_weights, write_json
from bbqrec.training.trainer import read_checkpoint

FINDINGS = Path(__file__).resolve().parents[1] / "build" / "fuzz"
MEMORY = 2**30  # more than a process has once it read the valid file
SECONDS = 20
LONGEST = 4096  # bytes of an input
TABLES = ("\t", "\n", "\r\n", ",", "::", '"', "0", "-1", "9" * 19, "1e300", "nan", "1970-01-01", "\ufeff", "\xff")
JSON = (
    "[" * 60,
    "{",
    "}",
    '""',
    "null",
    "true",
    "NaN",
    "1e999",
    "9" * 60,
    r'"\ud800"',
    "\n",
    '"asin":',
    "'",
    "(",
    "{[",
)
HEADERS = (
    "'descr'",
    "'fortran_order'",
    "'shape'",
    "(",
    ")",
    "[",
    "True",
    "-1",
    "9" * 30,
    "'O'",
    "'<f8'",
    "-" * 60,
    "V9",
)
YAML = (
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "!!bool ",
    "!!timestamp ",
    "!!float ",
    "[" * 60,
    "{",
    "- ",
    "? ",
    ": ",
    "2001-99-99",
)


@dataclass(frozen=True)
class Target:
    """A file that is replaced.

    Attributes:
        make: writes a folder that can be read.
        file: name of the file in it.
        read: reads the folder, and uses what it finds.
        tokens: what changes may put in.
        wrap: makes a file of an input, where few changes of the file itself would be read.
        seeds: inputs to start from, beside the file's own content; where there is a `wrap`, instead of it.
        is_slow: whether it gets a tenth of the inputs.
    """

    make: Callable[[Path], Any]
    file: str
    read: Callable[[Path], Any]
    tokens: tuple[str, ...] = ()
    wrap: Callable[[bytes], bytes] = bytes
    seeds: tuple[bytes, ...] = ()
    is_slow: bool = False


def files(**contents: str | bytes) -> Callable[[Path], None]:
    """Writes files; two underscores in a name stand for a dot, three for a slash."""

    def make(folder: Path) -> None:
        for name, content in contents.items():
            path = folder / name.replace("___", "/").replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def array(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(values))
    return stream.getvalue()


def archive(member: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("text.npy", member)
    return stream.getvalue()


def parquet(**columns: Any) -> bytes:
    stream = io.BytesIO()
    pl.DataFrame(columns).write_parquet(stream)
    return stream.getvalue()


def lines(*objects: Any) -> str:
    return "".join(json.dumps(each) + "\n" for each in objects)


# What is read from the folders:


def read_dataset(folder: Path) -> None:
    data = formats.read(folder)
    assert isinstance(data, Dataset)
    assert all(isinstance(text, str) for column in data.texts.values() for text in column)
    data.fingerprint()


def read_config(folder: Path) -> None:
    config = Config.load(folder / "config.yaml")
    config.save(folder / "again")
    assert Config.load(folder / "again") == config


def read_requests_of(folder: Path) -> None:
    with (folder / "requests.jsonl").open(encoding="utf-8") as file:
        for request in read_requests(file, "requests.jsonl"):
            assert all(isinstance(item, str) for item in request.history)
            json.dumps([request.user, request.history], ensure_ascii=False).encode()


def read_items(folder: Path) -> None:
    items = Run(folder).items
    assert not items["item"].has_nulls()
    assert items["item"].is_unique().all()
    assert not items["title"].has_nulls()


def read_facts(folder: Path) -> None:
    facts = Run(folder).facts
    assert all(isinstance(facts["data"][key], str) for key in ("name", "path", "fingerprint"))


def read_new_items(folder: Path) -> None:
    model = BBQRec.load(folder)
    model.recommend([[model.item_ids[-1]]], 2)


# The folders:


def native_folder(folder: Path) -> None:
    files(
        interactions__csv="user,item,timestamp\nu,a,3\nu,b,1\nv,c,2\n",
        items__csv="item,title\na,Apple\nb,\nc,Cherry\n",
        features___image__npy=array([[1.0, 2.0], [3.0, 4.0]]),
        features___image__items__txt="c\na\n",
    )(folder)


def parquet_folder(folder: Path) -> None:
    files(
        interactions__parquet=parquet(user=["u", "u", "v"], item=["a", "b", "a"], timestamp=[1, 2, 3]),
        items__parquet=parquet(item=["a", "b"], title=["Apple", None]),
    )(folder)


UNISREC = files(
    Tiny__item2index="X1\t1\nX0\t0\n",
    Tiny__test__inter="user_id:token\titem_id_list:token_seq\titem_id:token\n7\t0 1 0\t1\n",
    Tiny__text="item_id:token\ttext:token_seq\nX0\tA 1.5 m rope. Outdoor. \n",
    Tiny__feat1CLS=np.arange(4, dtype="<f4").tobytes(),
)
RECBOLE = files(
    tiny__inter="user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ta\t5\t1.5e9\nv\ta\t1\t7.0\n",
    tiny__item="item_id:token\tyear:float\tclass:token_seq\tmovie_title:token\na\t1995\tDrama War\tA\n",
)
MOVIELENS = files(
    ratings__dat="1::20::5::30\n1::10::0.5::20\n", movies__dat="10::A: B (2001)::Comedy|War\n20::Heat::War\n"
)
LINES = files(Tiny__txt="1 10 2 10\n07 3\n", Tiny_items__tsv="item_id\ttitle\tasin\n10\tTen\tX\n2\t\tY\n3\tT\tZ\n")
CODES = files(Tiny__txt="1 0 1\n2 1 0\n", codes__npz=archive(array([[1, 2], [3, 0]])))
AMAZON = files(
    Tiny_5__json__gz=gzip.compress(
        lines(
            {"reviewerID": "U", "asin": "B", "unixReviewTime": 3}, {"reviewerID": "V", "asin": "C", "unixReviewTime": 4}
        ).encode()
    ),
    meta_Tiny__json=lines({"asin": "B", "title": "A &amp; B", "category": ["Home", ["x"]]}),
)
REVIEWS = files(Tiny_5__json=lines({"user_id": "U", "asin": "B", "parent_asin": "C", "timestamp": 3000}))
REQUESTS = files(requests__jsonl=lines({"user": "u", "history": ["a"], "timestamps": [1]}, ["a", "b"]))


def facts_folder(folder: Path) -> None:
    """A run folder without a model."""
    (folder / "config.yaml").write_text("{}")
    write_json(
        folder / "run.json", {"data": {"name": "d", "path": "d", "fingerprint": "0"}, "versions": {"torch": "2"}}
    )
    numbers = dict.fromkeys(("users", *METRICS), 1)
    splits = {"validation": numbers, "test": numbers}
    write_json(folder / "metrics.json", {"candidates": "all", "most_popular": splits, **splits})
    figures = {"usage": [1], "perplexity": [1], "collision_rate": 0, "agreement": None}
    write_json(folder / "tokenizer.json", {**figures, "residual": {}, "reconstruction": {}})
    files(logs___version_0___metrics__csv="epoch,train/loss,validation/ndcg@10\n0,1.5,\n0,,0.25\n")(folder)
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 1}, folder / "last.ckpt")


def run_folder(folder: Path) -> None:
    """A run folder of a model that nobody trained."""
    facts_folder(folder)
    data = make_demo_dataset(n_users=20, n_items=40)
    words = with_text_features(Dataset(data.name, data.item_ids, data.user_ids, data.histories, texts=data.texts))
    features = {
        "text": words.features["text"],
        "image": Features(np.ones((40, 3), np.float32), np.arange(40) > 0),
    }
    sizes = {"levels": 2, "codebook_size": 4, "dim": 4, "hidden": 4}
    config = Config.parse({"tokenizer": sizes, "model": {"dim": 4, "layers": 1, "max_length": 4}})
    (folder / "config.yaml").write_text(json.dumps(config.given()))  # reading all options takes longest
    tokenizer = Tokenizer(features, data.n_items, config.tokenizer, 4)
    save_weights(tokenizer.state_dict(), folder / TOKENIZER)
    ids = tokenizer.semantic_ids()
    ids.save_table(folder / "semantic_ids.parquet", data.item_ids, [data.title(i) for i in range(data.n_items)])
    directions = principal_directions(features, 5)
    save_preparation(folder, features, directions)
    model = build_model(config, data.n_items, ids, catalogue_features(features, directions))
    save_model(model, folder / "model.safetensors")
    model = BBQRec.load(folder)
    model.add_items(["new"], titles=["New"], features={"image": np.ones((1, 3))})
    model.save_new_items()


def targets() -> dict[str, Target]:
    return {
        "native-interactions.csv": Target(native_folder, "interactions.csv", read_dataset, TABLES),
        "native-items.csv": Target(native_folder, "items.csv", read_dataset, TABLES),
        "native-interactions.parquet": Target(parquet_folder, "interactions.parquet", read_dataset),
        "native-items.parquet": Target(parquet_folder, "items.parquet", read_dataset),
        "native-features.npy": Target(native_folder, "features/image.npy", read_dataset, HEADERS),
        "native-features.items.txt": Target(native_folder, "features/image.items.txt", read_dataset, TABLES),
        "unisrec.item2index": Target(UNISREC, "Tiny.item2index", read_dataset, TABLES),
        "unisrec.inter": Target(UNISREC, "Tiny.test.inter", read_dataset, TABLES),
        "unisrec.text": Target(UNISREC, "Tiny.text", read_dataset, TABLES),
        "unisrec.feat": Target(UNISREC, "Tiny.feat1CLS", read_dataset),
        "recbole.inter": Target(RECBOLE, "tiny.inter", read_dataset, (*TABLES, ":token")),
        "recbole.item": Target(RECBOLE, "tiny.item", read_dataset, (*TABLES, ":token")),
        "movielens-ratings.dat": Target(MOVIELENS, "ratings.dat", read_dataset, TABLES),
        "movielens-movies.dat": Target(MOVIELENS, "movies.dat", read_dataset, TABLES),
        "lines.txt": Target(LINES, "Tiny.txt", read_dataset, TABLES),
        "lines-items.tsv": Target(LINES, "Tiny_items.tsv", read_dataset, TABLES),
        "codes.npz": Target(CODES, "codes.npz", read_dataset),
        "codes-member.npy": Target(
            CODES, "codes.npz", read_dataset, HEADERS, archive, (array([[1, 2], [3, 0]]), array([[1], [-1]]))
        ),
        "amazon-reviews.json": Target(REVIEWS, "Tiny_5.json", read_dataset, JSON),
        "amazon-reviews.json.gz": Target(AMAZON, "Tiny_5.json.gz", read_dataset),
        "amazon-metadata.json": Target(
            AMAZON, "meta_Tiny.json", read_dataset, JSON, seeds=(b"{'asin': 'B', 'categories': [['x'], []]}\n",)
        ),
        "config.yaml": Target(
            files(config__yaml="model: {dim: 8}\ntraining:\n  seed: 1\n"), "config.yaml", read_config, YAML
        ),
        "requests.jsonl": Target(REQUESTS, "requests.jsonl", read_requests_of, JSON),
        "run-run.json": Target(facts_folder, "run.json", read_facts, JSON),
        "run-metrics.json": Target(facts_folder, "metrics.json", lambda folder: Run(folder).metrics, JSON),
        "run-tokenizer.json": Target(
            facts_folder, "tokenizer.json", lambda folder: Run(folder).tokenizer_figures, JSON
        ),
        "run-semantic_ids.parquet": Target(run_folder, "semantic_ids.parquet", read_items),
        "run-features.parquet": Target(run_folder, FEATURES, lambda folder: Run(folder).item_encoder),
        "run-words.parquet": Target(run_folder, WORDS, lambda folder: Run(folder).item_encoder),
        "run-tokenizer.safetensors": Target(run_folder, TOKENIZER, lambda folder: Run(folder).item_encoder),
        "run-model.safetensors": Target(
            run_folder, "model.safetensors", lambda folder: Run(folder).model, is_slow=True
        ),
        "run-new_items.parquet": Target(run_folder, NEW_ITEMS, read_new_items, is_slow=True),
        "run-metrics.csv": Target(facts_folder, "logs/version_0/metrics.csv", lambda folder: read_log(folder / "logs")),
        "run-last.ckpt": Target(facts_folder, "last.ckpt", lambda folder: read_checkpoint(folder / "last.ckpt")),
    }


def feed(target: Target, folder: Path, content: bytes) -> None:
    """Raises what is a finding."""
    (folder / target.file).write_bytes(target.wrap(content))
    try:
        target.read(folder)
    except (ValueError, TypeError) as refused:
        names = {path.name for path in folder.rglob("*")}
        message = str(refused)
        if not any(name in message for name in names):
            raise AssertionError("the error names no file") from refused
        if len(message.splitlines()) != 1 or len(message) > 2000:
            raise AssertionError("the error has several lines, or is endless") from refused


def prepare(target: Target, folder: Path) -> list[bytes]:
    """Makes the valid folder, and returns inputs to start from."""
    warnings.simplefilter("error", RuntimeWarning)  # of NumPy, that a number became another
    torch.set_num_threads(1)
    torch.manual_seed(0)
    target.make(folder)
    target.read(folder)
    return [*([] if target.wrap is not bytes else [(folder / target.file).read_bytes()]), *target.seeds]


def fuzz(name: str, target: Target, inputs: int, corpus: Path | None) -> None:
    """Ends this process, with an exit code other than 0 where something was found."""
    with tempfile.TemporaryDirectory(prefix="bbqrec-fuzz-") as temporary:
        folder, start, tokens = (Path(temporary) / part for part in ("folder", "start", "tokens"))
        folder.mkdir()
        start.mkdir()
        for n, content in enumerate(prepare(target, folder)):
            (start / str(n)).write_bytes(content)
        escaped = ("".join(f"\\x{byte:02x}" for byte in token.encode()[:60]) for token in target.tokens)
        tokens.write_text("".join(f'"{token}"\n' for token in escaped))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        options = {
            "runs": inputs // 10 if target.is_slow else inputs,
            "seed": 1,
            "max_len": max(LONGEST, *(path.stat().st_size for path in start.iterdir())),
            "len_control": 0,  # long inputs from the start
            "timeout": SECONDS,
            "rss_limit_mb": limit >> 20,
            "artifact_prefix": f"{FINDINGS}/{name}-",
            "print_final_stats": 1,
        }
        if target.tokens:
            options["dict"] = tokens
        folders = [str(start)]
        if corpus is not None:
            (corpus / name).mkdir(parents=True, exist_ok=True)
            folders.insert(0, str(corpus / name))
        arguments = [f"-{key}={value}" for key, value in options.items()]

        count = itertools.count(1)

        def feed_and_keep(content: bytes) -> None:
            number = next(count)
            try:
                feed(target, folder, content)
            except BaseException:
                kept = FINDINGS / f"{name}-{hashlib.sha1(content).hexdigest()[:12]}"
                kept.write_bytes(content)
                # as libFuzzer says it of crashes
                print(f"stat::number_of_executed_units: {number}\nTest unit written to {kept}", flush=True)
                raise

        atheris.Setup(["fuzz", *arguments, *folders], feed_and_keep)
        atheris.Fuzz()


def in_a_process(name: str, target: Target, inputs: int, corpus: Path | None) -> tuple[bool, int]:
    """Prints the line of a target; whether nothing was found, and how many inputs there were.

    The process is forked, as importing takes longer than most targets; until then nothing has started a thread.
    """
    started = time.monotonic()
    log = FINDINGS / f"{name}.log"
    child = os.fork()
    if not child:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            fuzz(name, target, inputs, corpus)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = log.read_text(errors="replace")
    done = int((re.findall(r"number_of_executed_units: (\d+)", said) or [0])[-1])
    print(
        f"{'FOUND ' if code else 'passed'}  {name:<28} {done:6} inputs {time.monotonic() - started:4.0f} s", flush=True
    )
    if code:
        reason = re.findall(r"Uncaught Python exception: ===\n(.*)|ERROR: (libFuzzer: .*)", said)
        kept = re.findall(r"Test unit written to (\S+)", said)
        print(f"    {' '.join(filter(None, reason[-1])) if reason else f'exit code {code}'}")
        print(f"    {kept[-1] if kept else 'no input kept'}; {log}", flush=True)
    return not code, done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="starts of names; by default all")
    parser.add_argument("--inputs", type=int, default=3000, help="for each target")
    parser.add_argument("--corpus", type=Path, help="folder of inputs to go on from, and to add to")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="feed this input to TARGET, without atheris")
    arguments = parser.parse_args()
    chosen = {
        name: target
        for name, target in targets().items()
        if not arguments.targets or name.startswith(tuple(arguments.targets))
    }
    if not chosen:
        parser.error(f"got {', '.join(arguments.targets)}, expected starts of names among {', '.join(targets())}")
    if arguments.replay is not None:
        if len(chosen) > 1:
            parser.error(f"--replay needs one target, got {', '.join(chosen)}")
        [target] = chosen.values()
        with tempfile.TemporaryDirectory() as folder:
            prepare(target, Path(folder))
            feed(target, Path(folder), arguments.replay.read_bytes())
        return 0
    if atheris is None:
        print("SKIPPED fuzz: no atheris for this Python; its extra is `dev`")
        return 0
    FINDINGS.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = [in_a_process(name, target, arguments.inputs, arguments.corpus) for name, target in chosen.items()]
    failed = sum(not passed for passed, _ in results)
    counts = f"{failed} failed, {len(results) - failed} passed" if failed else f"{len(results)} passed"
    print(f"{counts}, {sum(done for _, done in results):,} inputs in {time.monotonic() - started:.1f}s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
