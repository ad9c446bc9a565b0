"""Times recommendations: by `BBQRec.recommend`, by the exported program, and by the compiled one.

    python -m benchmarks.serving --csv FILE [--items 10000 100000] [--threads 2] [--no-compiled]

The models are bbqrec's, with two modalities of 384 features, all of them read, and random weights, which do not change
the time. Histories have 1 to `model.max_length` items, 10 recommended ones each, and the history is left out. One row a
way, catalogue and batch size; ways take turns, call by call.

milliseconds       of the fastest call: the others differ by what else the machine does; `median` of all
per_second         histories, by the fastest call
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported

import numpy as np
import torch

from bbqrec import BBQRec, Config
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training.run import device, versions
from benchmarks.machine import commit

K = 10
FEATURES = 384  # of a modality: as many as small sentence encoders have


def random_model(n_items: int, config: Config) -> BBQRec:
    options, generator = config.tokenizer, torch.Generator().manual_seed(0)
    codes = torch.randint(options.codebook_size, (n_items, 2, options.levels), generator=generator)
    codebooks = torch.randn(1, options.levels, options.codebook_size, options.dim, generator=generator)
    semantic_ids = SemanticIDs(("text", "image"), codes, codebooks)
    torch.manual_seed(0)
    names = [f"item-{i}" for i in range(n_items)]
    features = torch.randn(n_items, 2 * FEATURES, generator=generator) / (2 * FEATURES) ** 0.5
    model = SequenceModel(n_items, config.model, semantic_ids, features)
    model.similarity_weight.fill_(1)
    return BBQRec(model, names, names, config.model.max_length, semantic_ids)


def ways_of(model: BBQRec, folder: Path, compiled: bool) -> dict[str, Callable[[list[list[int]]], object]]:
    """How to recommend, by name: each takes numbers of items."""
    model.export(folder / "program.pt2", K)
    program = torch.export.load(folder / "program.pt2").module()
    ways: dict[str, Callable[[list[list[int]]], object]] = {
        "BBQRec.recommend": lambda rows: model.recommend([[model.item_ids[i] for i in row] for row in rows], K),
        "exported": lambda rows: program(padded(rows)),
    }
    if compiled:
        model.export(folder / "compiled.pt2", K, compiled=True)
        package = torch._inductor.aoti_load_package(str(folder / "compiled.pt2"))
        ways["compiled"] = lambda rows: package(padded(rows))
    return ways


def padded(rows: list[list[int]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)


def seconds_of(ways: dict[str, Callable], batches: list[list[list[int]]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for n, rows in enumerate(batches):
            for name, recommend in ways.items():
                started = time.perf_counter()
                recommend(rows)
                if n:  # the first one warms up
                    found[name].append(time.perf_counter() - started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="file to write; by default rows are printed only")
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000], help="sizes of the catalogue")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256], help="histories in a call")
    parser.add_argument("--calls", type=int, default=30, help="of each way")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave out AOTInductor")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    config, rows = Config(), []
    rng = np.random.default_rng(0)
    for n_items in arguments.items:
        with tempfile.TemporaryDirectory() as folder:
            ways = ways_of(random_model(n_items, config), Path(folder), arguments.compiled)
            for batch in arguments.batch:
                lengths = rng.integers(1, config.model.max_length + 1, (arguments.calls + 1, batch))
                batches = [[rng.integers(n_items, size=n).tolist() for n in each] for each in lengths]
                for name, seconds in seconds_of(ways, batches).items():
                    row = {
                        "way": name,
                        "items": n_items,
                        "batch": batch,
                        "milliseconds": round(1e3 * min(seconds), 3),
                        "median": round(1e3 * statistics.median(seconds), 3),
                        "per_second": round(batch / min(seconds)),
                        "calls": arguments.calls,
                        "device": device(),
                        "torch": versions()["torch"],
                        "commit": commit(),
                    }
                    print(", ".join(f"{key} {value}" for key, value in row.items() if key not in ("torch", "commit")))
                    rows.append(row)
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
