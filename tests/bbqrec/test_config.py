"""Options: files, overrides, and what is refused."""

import pytest
import yaml

from bbqrec.config import Config, flat_options, option_names


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
        ("model_name=gru", "'model_name': got 'gru', input should be 'bbqrec' or 'sasrec'"),
        ("model.dropout", "got 'model.dropout', expected section.key=value"),
        ("model_name.x=1", "'model_name' is an option, not a section"),
        ("model=5", "'model': got 5"),
        ("model.dim=[", "model.dim"),
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
