"""Files of run folders that are not what they should be: refused by name, before anything is run or allocated."""

import json
import struct

import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from bbqrec.config import Config
from bbqrec.data.text import WordVectors
from bbqrec.models.build import build_model
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training.plots import read_log
from bbqrec.training.run import Run, damage_named, load_model, save_model
from bbqrec.training.trainer import read_checkpoint

FACTS = {"data": {"name": "shop", "path": None, "fingerprint": "0"}, "versions": {}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "metrics.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("key", ["name", "path", "fingerprint"])
def test_facts_of_another_kind(key, folder):
    path = folder / "run.json"
    path.write_text(json.dumps(FACTS))
    assert Run(folder).facts == FACTS
    path.write_text(json.dumps({**FACTS, "data": {**FACTS["data"], key: 5}}))
    with pytest.raises(ValueError, match=rf"run\.json: is damaged .*data has {key} 5"):
        _ = Run(folder).facts


@pytest.mark.parametrize("name", ["run.json", "tokenizer.json", "metrics.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff", b"[]", b"null", b'{"data": []}'])
def test_json_that_is_something_else(name, content, folder):
    (folder / name).write_bytes(content)
    read = {"run.json": "facts", "tokenizer.json": "tokenizer_figures", "metrics.json": "metrics"}
    with pytest.raises(ValueError, match=rf"{name}: is damaged"):
        getattr(Run(folder), read[name])


@pytest.mark.parametrize("items", [["a", "a"], ["a", None]])
def test_items_without_a_name_of_their_own(items, folder):
    (folder / "run.json").write_text(json.dumps(FACTS))
    pl.DataFrame({"item": items, "title": ["A", "B"]}).write_parquet(folder / "semantic_ids.parquet")
    with pytest.raises(ValueError, match=r"semantic_ids\.parquet: is damaged"):
        _ = Run(folder).items


def test_polars_panics_become_damage(folder, monkeypatch):
    def panic(*arguments, **options):
        raise pl.exceptions.PanicException("range end index")

    monkeypatch.setattr(pl, "read_parquet", panic)
    path = folder / "words.parquet"
    with pytest.raises(ValueError, match=r"words\.parquet: is damaged .*range end index"), damage_named(path):
        WordVectors.load(path)


@pytest.mark.parametrize("text", ["step,train/loss\n1,2\n", "epoch,train/loss\n0,x\n", "epoch\nx\n", "epoch\n1,2\n"])
def test_logs_of_other_columns(text, folder):
    path = folder / "version_0" / "metrics.csv"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.csv: is damaged"):
        read_log(folder)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_a_checkpoint_runs_nothing(folder):
    torch.save({"state_dict": {}, "callbacks": Trap()}, folder / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt: is damaged"):
        read_checkpoint(folder / "last.ckpt")


def safetensors(shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
    header = json.dumps({"item_id": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


@pytest.mark.parametrize(
    "content", [safetensors([2**20, 2**20]), safetensors([2**40, 2**40]), struct.pack("<Q", 2**60), b"\xff" * 64]
)
def test_a_header_that_claims_more_than_there_is(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: is damaged"):
        load_model(folder / "model.safetensors", Config())


@pytest.mark.parametrize("model", ["bbqrec", "tiger"])
@pytest.mark.parametrize(
    "options", [{"model.dim": 2**22}, {"model.max_length": 2**40}, {"model.dim": 2**60}], ids=lambda given: str(given)
)
def test_options_that_do_not_fit_the_weights_allocate_nothing(model, options, folder, monkeypatch):
    small = {"model_name": model, "model.dim": 4, "model.layers": 1, "model.features": False}
    ids = SemanticIDs(("text",), torch.tensor([[[0, 1]], [[1, 0]]]), torch.ones(1, 2, 2, 4))
    config = Config().override(small)
    path = folder / "model.safetensors"
    save_model(build_model(config, 2, ids), path)
    assert torch.equal(load_model(path, config).codes, ids.codes)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", only_without_memory)  # what fills weights
    with pytest.raises(ValueError, match=r"model\.safetensors: is damaged or does not fit config\.yaml"):
        load_model(path, config.override(options))


def only_without_memory(tensor, *arguments, **options):
    assert tensor.device.type == "meta"
    return tensor


def test_weights_beside_others_are_no_model(folder):
    save_file({"other": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: is damaged"):
        load_model(folder / "model.safetensors", Config())


@pytest.mark.parametrize("content", [b"\x80\x02J\0", b"\x80\x02", b"PK\3\4", b"\x80\x02]R."])
def test_half_a_checkpoint_is_named(content, folder):
    (folder / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.ckpt: is damaged"):
        read_checkpoint(folder / "last.ckpt")
