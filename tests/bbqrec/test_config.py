"""Options: files, overrides, and what is refused."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbqrec.config import DEFAULTS_OF_MODEL, Config, ModelConfig, TokenizerConfig, flat_options, option_names


def test_saved_options_load_again(tmp_path):
    config = Config().override(["training.seed=7", "tokenizer.modalities=[text]", "model.cross_modal=false"])
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == config
    assert (config.training.seed, config.tokenizer.modalities, config.model.cross_modal) == (7, ["text"], False)


def test_override_leaves_the_original_alone():
    config = Config()
    assert config.override({"model.dim": 8}).model.dim == 8
    assert config == Config()


def test_a_file_gives_only_what_differs(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"training": {"epochs": 3}}))
    config = Config.load(tmp_path / "a.yaml")
    assert config.training.epochs == 3
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.drpout=0.1", "'model.drpout' does not exist; did you mean 'model.dropout'"),
        ("modle.dropout=0.1", "'modle' does not exist"),
        ("model.dropout=1.5", "'model.dropout': got 1.5, input should be less than 1"),
        ("tokenizer.modalities=[]", "'tokenizer.modalities': got []"),
        ("model_name=gru", "'model_name': got 'gru', input should be 'bbqrec', 'sasrec' or 'tiger'"),
        ("model.dropout", "got 'model.dropout', expected section.key=value"),
        ("model_name.x=1", "'model_name' is an option, not a section"),
        ("model=5", "'model': got 5"),
        ("model.dim=[", "model.dim"),
        ("training.learning_rate=1.0e+38", "got 1e+38, input should be less than or equal to 1"),
        ("training.weight_decay=.inf", "'training.weight_decay': got inf"),
    ],
)
def test_what_does_not_fit_is_named(assignment, message):
    with pytest.raises(ValueError) as error:
        Config().override([assignment])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="got list, expected a mapping"):
        Config.load(tmp_path / "a.yaml")


def test_a_file_that_is_no_yaml_is_refused_by_name(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"a\.yaml: not YAML"):
        Config.load(tmp_path / "a.yaml")


def test_a_file_of_another_encoding_or_with_a_wrong_option_is_refused_by_name(tmp_path):
    (tmp_path / "a.yaml").write_bytes("tokenizer: {modalities: [größe]}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.yaml: not UTF-8"):
        Config.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("model: {heads: 0}")
    with pytest.raises(ValueError, match=r"b\.yaml: config key 'model\.heads': got 0"):
        Config.load(tmp_path / "b.yaml")


def test_names_of_any_language_are_saved(tmp_path):
    config = Config().override({"tokenizer.modalities": ["größe", "画像"]})
    config.save(tmp_path / "config.yaml")
    assert "画像" in (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert Config.load(tmp_path / "config.yaml") == config


def test_every_option_has_a_dotted_name():
    assert list(flat_options(Config())) == option_names()
    assert flat_options(Config())["tokenizer.codebook_size"] == Config().tokenizer.codebook_size


def test_a_model_has_defaults_of_its_own():
    tiger = Config().override({"model_name": "tiger"})
    assert not tiger.tokenizer.shared_codebooks
    assert tiger.model.max_length < Config().model.max_length
    for section, options in DEFAULTS_OF_MODEL["tiger"].items():
        for key, value in options.items():
            assert getattr(getattr(tiger, section), key) == value != getattr(getattr(Config(), section), key)


def test_options_that_were_given_hold_whatever_the_model():
    given = {"tokenizer.shared_codebooks": True, "tokenizer.levels": 4, "model.max_length": 50}  # BBQRec's defaults
    before, after = Config().override({**given, "model_name": "tiger"}), Config().override(given)
    after = after.override({"model_name": "tiger"})
    assert before == after
    assert (after.tokenizer.shared_codebooks, after.tokenizer.levels, after.model.max_length) == (True, 4, 50)
    assert after.tokenizer.codebook_size == TokenizerConfig().codebook_size


def test_another_model_chosen_later_has_other_defaults():
    config = Config().override({"model_name": "tiger", "training.seed": 3})
    assert config.override({"model_name": "bbqrec"}) == Config().override({"training.seed": 3})
    config.model.layers = 1
    config.model_name = "sasrec"
    assert config == Config().override({"model_name": "sasrec", "training.seed": 3, "model.layers": 1})
    assert config.given() == {
        "model_name": "sasrec",
        "tokenizer": {},
        "model": {"layers": 1},
        "training": {"seed": 3},
    }


def test_a_section_that_was_passed_stays_as_it_is():
    section = ModelConfig(layers=3)
    config = Config(model_name="tiger", model=section)
    assert config.model.dropout != section.dropout == ModelConfig().dropout
    assert section.model_fields_set == {"layers"}


def test_a_file_of_all_options_gives_them_all(tmp_path):
    config = Config().override({"model_name": "tiger"})
    config.save(tmp_path / "config.yaml")
    loaded = Config.load(tmp_path / "config.yaml")
    assert loaded == config
    loaded.check_read()
    assert loaded.override({"model_name": "bbqrec"}).model == config.model


@pytest.mark.parametrize(
    ("model", "option", "default"),
    [
        ("tiger", "model.reweighting=true", False),
        ("tiger", "model.content=true", False),
        ("tiger", "model.item_id=true", False),
        ("tiger", "model.cross_modal=true", False),
        ("bbqrec", "model.beam=20", 50),
        ("sasrec", "model.beam=20", 50),
        ("sasrec", "model.reweighting=false", True),
        ("sasrec", "model.output_scale=3.5", 15.0),
        ("bbqrec", "model.output_scale=3.5", 15.0),
        ("tiger", "model.relative_time=true", False),
    ],
)
def test_what_a_model_does_not_read_is_refused(model, option, default):
    key, value = option.split("=")
    given = f"{key}={yaml.safe_load(value)} (default {default})"
    message = f"options: {given} would do nothing with model '{model}'; leave them out"
    with pytest.raises(ValueError) as error:
        Config().override([option, f"model_name={model}"]).check_read()
    assert str(error.value) == message
    Config().override({key: default, "model_name": model}).check_read()


def test_all_options_that_would_do_nothing_are_named():
    with pytest.raises(
        ValueError, match=r"model\.content=True .*, model\.cosine_output=True .* do nothing with model 't"
    ):
        Config().override(["model_name=tiger", "model.content=true", "model.cosine_output=true"]).check_read()


def test_a_modality_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.modalities: got \['text', 'text'\], expected each name once"):
        Config().override(["tokenizer.modalities=[text, text]"]).check_read()


def test_what_a_model_reads_is_not_refused():
    tiger = {"dim": 32, "layers": 1, "heads": 4, "dropout": 0.3, "max_length": 9, "beam": 20}
    Config().override({"model_name": "tiger", **{f"model.{key}": value for key, value in tiger.items()}}).check_read()
    Config().override(["model.reweighting=false", "model.content=false"]).check_read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\n", r"a\.yaml: line 2 has a reference, \*a; write out its value"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}\n", r"a\.yaml: line 2 has a reference"),
        ("&a [*a]\n", r"a\.yaml: line 1 has a reference"),
        ("training: {seed: !!int x}\n", r"a\.yaml: holds a value that cannot be read"),
        ("training: {seed: !!int ''}\n", r"a\.yaml: holds a value that cannot be read"),
        ("training: {seed: !!bool x}\n", r"a\.yaml: holds a value that cannot be read"),
        ("training: {seed: !!timestamp x}\n", r"a\.yaml: holds a value that cannot be read"),
        ("training: {seed: 2001-99-99}\n", r"a\.yaml: holds a value that cannot be read"),
        ("training: {seed: " + "9" * 5000 + "}\n", r"a\.yaml: holds a value that cannot be read"),
        ("[" * 2000, r"a\.yaml: holds a value that cannot be read"),
        ("a: !!python/object/apply:os.getcwd []\n", r"a\.yaml: not YAML \(line 1\)"),
        ("a: !!python/name:os.getcwd\n", r"a\.yaml: not YAML \(line 1\)"),
    ],
)
def test_a_file_that_says_more_than_options_is_refused(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        Config.load(tmp_path / "a.yaml")
    assert len(str(refused.value).splitlines()) == 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_read_or_refused_by_name(tmp_path, data):
    content = b"model: {dim: 8}\ntraining:\n  seed: 1\n"
    pieces = st.sampled_from(
        [b"&a ", b"*a", b"!!int ", b"!!set ", b"[", b"? ", b"\xff", b"'", b": ", b"0x", b"2001-99-99"]
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 3))
        content = content[:at] + data.draw(st.one_of(pieces, st.binary(max_size=3))) + content[at + length :]
    (tmp_path / "a.yaml").write_bytes(content)
    message = "a.yaml: "
    try:
        Config.load(tmp_path / "a.yaml")
    except ValueError as refused:
        message = str(refused)
    assert "a.yaml: " in message
    assert len(message.splitlines()) == 1
