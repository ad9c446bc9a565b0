"""The run folder: what `fit` leaves behind, and how to read it again.

config.yaml            every option of the run
run.json               data set (name, path, fingerprint), versions, device, processes, seconds and peak memory, and
                       the SHA-256 of the files with weights and codes, which is checked when they are read
tokenizer.safetensors  weights of the finished tokenizer (absent for a model without semantic IDs)
tokenizer.json         figures of its semantic IDs (likewise)
semantic_ids.parquet   one row an item: item, title, codes/<modality> for every modality, number
features.parquet       how features are standardized, and words.parquet how texts become features: for items to come
new_items.parquet      items that were added since, see `BBQRec.add_items` (absent without)
model.safetensors      weights of the finished sequence model (absent while the run is unfinished)
metrics.json           validation and test metrics, and those figures; written last
curves.png, codebooks.png
report.html            all of this to look at, see `bbqrec.report`: one page that needs no other file
logs/                  CSV and TensorBoard logs, one version for every time the run was started
checkpoints/           to resume from
"""

from __future__ import annotations

import hashlib
import json
import platform
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bbqrec.config import Config
from bbqrec.data.dataset import Dataset
from bbqrec.data.files import atomically, one_line, read_parquet, write_text
from bbqrec.data.splits import Split, leave_one_out
from bbqrec.data.text import WordVectors
from bbqrec.evaluation.ranking import METRICS, evaluate
from bbqrec.models.build import build_model
from bbqrec.models.sequence_model import TABLES_OF_ITEMS, SequenceModel
from bbqrec.models.tiger import Tiger
from bbqrec.tokenizer.item_encoder import (
    FEATURES,
    TOKENIZER,
    WORDS,
    ItemEncoder,
    read_encoders,
    read_preparation,
)
from bbqrec.tokenizer.semantic_ids import CODES, SemanticIDs

DAMAGE = (  # what reading a broken or foreign file raises
    SafetensorError,
    UnpicklingError,
    BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    RuntimeError,  # PyTorch's
    pl.exceptions.PolarsError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    AssertionError,
    struct.error,
)
REPAIR = "copy the run folder again, or fit into a new one"
HASHED = ("model.safetensors", TOKENIZER, "semantic_ids.parquet", FEATURES, WORDS)


@dataclass
class Run:
    """A run folder. `Run(folder)` opens one; `fit` returns one with its data set at hand."""

    folder: Path
    _data: Dataset | None = None

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if not (self.folder / "config.yaml").is_file():
            raise ValueError(f"run folder: {self.folder} holds no config.yaml; `bbqrec fit` makes run folders")

    @cached_property
    def config(self) -> Config:
        """`config.yaml`."""
        return Config.load(self.folder / "config.yaml")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`run.json`."""
        path = self.folder / "run.json"
        facts = read_json(path, {"data": ("name", "path", "fingerprint"), "versions": ()})
        with damage_named(path):
            for key, value in facts["data"].items():
                if not isinstance(value, str) and (key, value) != ("path", None):
                    raise TypeError(f"data has {key} {value!r}")
        return facts

    @cached_property
    def items(self) -> pl.DataFrame:
        """`semantic_ids.parquet`, of a run with a finished tokenizer at least: row `i` is item `i`."""
        path = self.folder / "semantic_ids.parquet"
        if not path.is_file():
            self._require_finished()
        self.require_whole(path.name)
        with damage_named(path):
            items = read_parquet(path).cast({"item": pl.String, "title": pl.String})
            if items["item"].has_nulls() or items["title"].has_nulls() or items["item"].is_duplicated().any():
                raise ValueError("an item has no name or title, or that of another")
        return items

    @property
    def finished(self) -> bool:
        """Whether training has ended; only then there is a model."""
        return (self.folder / "metrics.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """`metrics.json` of a finished run."""
        self._require_finished()
        path, splits = self.folder / "metrics.json", ("validation", "test")
        values = read_json(path, {"": ("candidates", "most_popular"), "most_popular": splits})
        with damage_named(path):
            for name, holder in (("", values), ("most_popular/", values["most_popular"])):
                for split in splits:
                    _require_numbers(holder.get(split), f"{name}{split}")
        return values

    @property
    def tokenizer_figures(self) -> dict[str, Any]:
        """`tokenizer.json`, of a run with a finished tokenizer: see `SemanticIDs.figures`, `Tokenizer.fidelity`."""
        keys = ("usage", "perplexity", "collision_rate", "agreement")
        return read_json(self.folder / "tokenizer.json", {"": keys, "residual": (), "reconstruction": ()})

    @property
    def has_data_given(self) -> bool:
        """Whether it was opened with a data set; otherwise it reads that where it was."""
        return self._data is not None

    @cached_property
    def data(self) -> Dataset:
        """The data set that the run was made from, read from where it was."""
        path = self.facts["data"]["path"]
        if self._data is None and (path is None or not Path(path).exists()):
            where = "was made from a data set in memory" if path is None else f"was made from {path}, which is gone"
            raise ValueError(f"data: {self.folder} {where}; pass it: Run(folder, data), or --data on the command line")
        data = self._data or Dataset.load(path)
        if data.fingerprint() != self.facts["data"]["fingerprint"]:
            raise ValueError(
                f"data: {data.name} is not the data set that {self.folder} was made from "
                f"({self.facts['data']['name']}), or has changed since; fit again into another folder"
            )
        return data

    @cached_property
    def split(self) -> Split:
        """What is trained on, and what is held out."""
        return leave_one_out(self.data)

    @cached_property
    def model(self) -> SequenceModel | Tiger:
        """The finished sequence model, in evaluation mode."""
        self._require_finished()
        self.require_whole("model.safetensors")
        return load_model(self.folder / "model.safetensors", self.config)

    @cached_property
    def semantic_ids(self) -> SemanticIDs | None:
        """Codes of every item and the trained codebooks; None for a model without."""
        if not self.model.has_semantic_ids:
            return None
        return SemanticIDs(self.modalities, self.model.codes, self.model.codebooks.detach())

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of its semantic IDs."""
        return tuple(c.removeprefix(CODES) for c in self.items.columns if c.startswith(CODES))

    @cached_property
    def item_encoder(self) -> ItemEncoder:
        """For items that training did not know; of a run that uses features."""

        def read(name: str, reader: Callable[..., Any], *arguments: Any) -> Any:
            self.require_whole(name)
            with damage_named(self.folder / name):
                return reader(self.folder / name, *arguments)

        standardizations, directions = read(FEATURES, read_preparation)
        words = read(WORDS, WordVectors.load) if (self.folder / WORDS).is_file() else None
        encoders = None
        if self.config.model_name != "sasrec":
            widths = [len(each.mean) for each in standardizations.values()]
            encoders = read(TOKENIZER, read_encoders, widths, self.config.tokenizer)
        return ItemEncoder(standardizations, directions, words, encoders)

    def evaluate(self, split: str = "test", *, keep_history: bool = False) -> dict[str, float]:
        """Ranks all items for every user's held-out item.

        Args:
            split: "validation" or "test".
            keep_history: leave items of the history among the candidates. By default they are removed, but never the
                held-out item itself.

        Returns what `evaluation.ranking.evaluate` returns, with held-out items that training never saw apart.
        """
        if split not in ("validation", "test"):
            raise ValueError(f"split: got {split!r}, expected 'validation' or 'test'")
        return evaluate(
            self.model,
            getattr(self.split, split),
            self.data.n_items,
            keep_history=keep_history,
            max_length=self.config.model.max_length,
            train_items=self.split.train_items,
        )

    def record_hashes(self) -> None:
        """Writes to `run.json` what `require_whole` compares with."""
        hashes = {name: _sha256(self.folder / name) for name in HASHED if (self.folder / name).is_file()}
        self.add_facts({"sha256": hashes})

    def require_whole(self, name: str) -> None:
        """Raises `ValueError` where a file is not the one that training wrote; one without a hash is not looked at."""
        hashes = self.facts.get("sha256", {})
        with damage_named(self.folder / "run.json"):
            expected = hashes.get(name)
        path = self.folder / name
        with damage_named(path):
            found = expected and _sha256(path)
        if found != expected:
            raise ValueError(f"{path}: is damaged, its SHA-256 is not the one in run.json; {REPAIR}")

    def add_facts(self, facts: dict[str, Any]) -> None:
        """Writes them to `run.json`, beside those that are there."""
        self.__dict__.pop("facts", None)
        self.facts = {**self.facts, **facts}
        write_json(self.folder / "run.json", self.facts)

    def _require_finished(self) -> None:
        if not self.finished:
            raise ValueError(f"run folder: {self.folder} is unfinished; run `bbqrec fit` on it again to resume")


def save_model(model: SequenceModel | Tiger, path: Path) -> None:
    save_weights(model.state_dict(), path)


def load_model(path: Path, config: Config) -> SequenceModel | Tiger:
    """Builds the model that `path` holds the weights of: the sizes of the catalogue come from the weights."""
    with damage_named(path):
        state = load_file(path)
        semantic_ids = None
        if "codes" in state:
            modalities = tuple(str(m) for m in range(state["codes"].shape[1]))
            semantic_ids = SemanticIDs(modalities, state["codes"], state["codebooks"])
        tables = [state[name] for name in TABLES_OF_ITEMS if name in state]
        if not tables:
            raise LookupError("it has no table of items")
        n_items = len(tables[0])
        with torch.device("meta"):  # sizes that are not those of the weights allocate nothing
            build_model(config, n_items, semantic_ids, state.get("features")).load_state_dict(state, assign=True)
        model = build_model(config, n_items, semantic_ids, state.get("features"))
        model.load_state_dict(state)
    return model.eval()


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    atomically(path, lambda temporary: save_file(state, temporary))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, expected: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Reads a file of a run folder; `expected` are the mappings that it must hold, each with keys that these must.

    The name of the whole file is "".
    """
    with damage_named(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        for name, keys in expected.items():
            mapping = values.get(name) if name else values
            if not isinstance(mapping, dict):
                raise LookupError(f"{name or 'it'} is no mapping")
            if missing := [key for key in keys if key not in mapping]:
                raise LookupError(f"{name or 'it'} has no {missing[0]!r}")
    return values


def _require_numbers(metrics: Any, name: str) -> None:
    """Raises `LookupError` where the metrics of a split are not what `evaluate` returns."""
    if not isinstance(metrics, dict):
        raise LookupError(f"it has no {name!r}")
    keys = ["users", *METRICS]
    if metrics.get("cold/users"):
        keys += [f"cold/{key}" for key in METRICS]
    for key in keys:
        if isinstance(metrics.get(key), bool) or not isinstance(metrics.get(key), (int, float)):
            raise LookupError(f"{name} has no number {key!r}")


@contextmanager
def damage_named(path: Path, repair: str = REPAIR) -> Iterator[None]:
    """Whatever is wrong with a file of a run folder, from its bytes to the names in it, is a `ValueError` naming it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; {repair}") from None
    except PermissionError:
        raise
    except DAMAGE as error:
        raise ValueError(
            f"{path}: is damaged or does not fit config.yaml ({type(error).__name__}: {one_line(error)}); {repair}"
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def device() -> str:
    """What training runs on."""
    if torch.cuda.is_available():
        return f"cuda {torch.cuda.get_device_name()}"
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    import lightning

    from bbqrec import __version__

    return {"bbqrec": __version__, "torch": torch.__version__, "lightning": lightning.__version__}
