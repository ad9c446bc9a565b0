"""Every option of a run, with its default. `Config.load` reads `config.yaml`, `Config.override` the command line.

Weights of 0 and the switches below are the ablations of the method: nothing else is needed to run one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bbqrec.data.files import one_line, write_text


class Section(BaseModel):
    """A group of options: unknown keys are refused, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class TokenizerConfig(Section):
    """Behaviour-semantic alignment: features to semantic IDs (paper section on behaviour-bind quantization)."""

    modalities: list[str] | None = Field(
        None, min_length=1, description="feature sets to use; null takes all that the data has"
    )
    levels: int = Field(4, ge=1, le=16, description="codes per semantic ID, L")
    codebook_size: int = Field(256, ge=1, description="codewords per level, K")
    dim: int = Field(64, ge=1, description="width of the codewords, d")
    hidden: int = Field(256, ge=1, description="hidden width of encoders and decoders")
    shared_codebooks: bool = Field(True, description="one codebook for all modalities and behaviour, or one each")
    ema_decay: float | None = Field(
        0.9, ge=0, lt=1, description="codebooks are moving averages that keep this much a step; null: by gradient"
    )
    kmeans_iterations: int = Field(10, ge=0, description="of the residual k-means that codebooks start from")
    revive_after: int = Field(
        50, ge=0, description="every so many steps, codewords unused as long move to where items fit badly; 0: never"
    )
    disentangle: bool = Field(True, description="give the decoder a modality-specific part beside the quantized one")
    commitment_weight: float = Field(0.25, ge=0, description="beta of the quantization loss")
    reconstruction_weight: float = Field(1.0, ge=0, description="of the squared error of what the decoder gives back")
    quantization_weight: float = Field(1.0, ge=0, description="of the quantization loss")
    club_weight: float = Field(0.01, ge=0, description="upper bound on the information shared by both parts")
    item_contrast_weight: float = Field(1.0, ge=0, description="InfoNCE between modalities and behaviour of an item")
    sequence_contrast_weight: float = Field(1.0, ge=0, description="InfoNCE between a history and its next item")
    temperature: float = Field(0.1, gt=0, description="tau of both contrasts")
    epochs: int = Field(15, ge=1, description="passes over the interactions")
    max_steps: int = Field(1000, ge=1, description="fewer epochs where they are long: so many steps, rounded up to one")
    batch_tokens: int = Field(1024, ge=2, description="interactions per step")
    batch_items: int = Field(512, ge=2, description="items per step, at least: others fill up the batch's own")
    learning_rate: float = Field(3e-3, gt=0, le=1, description="of Adam")


class ModelConfig(Section):
    """The sequence model: a pre-norm causal Transformer over items."""

    dim: int = Field(64, ge=1, description="width of item vectors and hidden states")
    layers: int = Field(2, ge=1, le=256, description="Transformer layers")
    heads: int = Field(2, ge=1, description="attention heads of a layer")
    dropout: float = Field(0.5, ge=0, lt=1, description="share of the activations that training drops")
    max_length: int = Field(50, ge=1, description="latest interactions of a history that the model sees")
    item_id: bool = Field(True, description="add an embedding of the item's own ID to its content")
    content: bool = Field(True, description="add what the item's semantic ID decodes to, so that content is seen")
    features: bool = Field(
        False,
        description="add a learned linear map of the item's features; true for bbqrec. With SASRec: content, no codes",
    )
    feature_width: int | None = Field(
        256, ge=1, description="with features: as many principal directions of them are read; null: all, as they are"
    )
    similarity_output: bool = Field(
        True,
        description="with features: score also by how like the history's an item's are, as much as validation likes it",
    )
    reweighting: bool = Field(True, description="bias attention by the similarity of semantic IDs")
    cross_modal: bool = Field(True, description="compare text of one item with images of another as well")
    relative_position: bool = Field(False, description="bias attention by how many places apart two items are")
    relative_time: bool = Field(False, description="bias attention by how long apart; histories then need times")
    cosine_output: bool = Field(False, description="score by the cosine of hidden state and item vector")
    output_scale: float = Field(15.0, gt=0, description="what multiplies the cosine")
    sampled_items: int | None = Field(
        None, ge=1, description="items that a training step's softmax draws; null: all of them, exactly"
    )
    sharded_items: bool = Field(
        False, description="with several processes, each holds a share of the tables of items, and not all of them"
    )
    beam: int = Field(50, ge=1, description="items that TIGER's search finds, those of the history included")


class TrainingConfig(Section):
    """Training of the sequence model."""

    seed: int = Field(0, ge=0, le=2**31 - 1, description="of everything random, the tokenizer included")
    epochs: int = Field(200, ge=1, description="upper limit; training stops earlier by patience")
    patience: int = Field(7, ge=1, description="epochs without a better validation NDCG@10 before stopping")
    decay_after: int = Field(3, ge=1, description="after every so many of them, the learning rate falls to a third")
    validation_users: int | None = Field(
        None, ge=1, description="users whose targets each epoch ranks, the same ones every time; null: all"
    )
    final_users: int | None = Field(
        None, ge=1, description="users whose targets the metrics at the end rank, drawn once; null: all"
    )
    batch_tokens: int = Field(512, ge=1, description="interactions per step")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="of AdamW, at first")
    weight_decay: float = Field(
        0.5,
        ge=0,
        description="of AdamW, on all weights, each step, times the learning rate; with sampled_items only on the item "
        "IDs that the step has",
    )


# Where a model's defaults are others than the fields': of the options that nobody set.
DEFAULTS_OF_MODEL: dict[str, dict[str, dict[str, Any]]] = {
    "bbqrec": {"model": {"features": True}},
    "tiger": {
        "tokenizer": {
            "levels": 3,
            "shared_codebooks": False,
            "disentangle": False,
            "club_weight": 0.0,
            "item_contrast_weight": 0.0,
            "sequence_contrast_weight": 0.0,
        },
        "model": {
            "dropout": 0.1,
            "max_length": 20,
            "item_id": False,
            "content": False,
            "reweighting": False,
            "cross_modal": False,
        },
        "training": {"weight_decay": 0.05},
    },
}
READ_BY_TIGER = {"dim", "layers", "heads", "dropout", "max_length", "beam"}  # of the options of the sequence model
OF_SEMANTIC_IDS = {"content", "reweighting", "cross_modal"}  # SASRec has none
NOT_READ = {
    "bbqrec": {"beam"},
    "sasrec": {"beam", *OF_SEMANTIC_IDS},
    "tiger": ModelConfig.model_fields.keys() - READ_BY_TIGER,
}


class Config(Section):
    """All options of a run. Those that are not given have the defaults of the model (see `DEFAULTS_OF_MODEL`)."""

    model_name: Literal["bbqrec", "sasrec", "tiger"] = "bbqrec"
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)

    @model_validator(mode="after")
    def _fill_in_defaults(self) -> Config:
        """Beside `model_fields_set`, which stays what was given: another model, chosen later, has other defaults."""
        for name, section in self._sections().items():
            unset = type(section).model_fields.keys() - section.model_fields_set
            self.__dict__[name] = section.model_copy(update={key: self._default(name, key) for key in unset})
            self.__dict__[name].model_fields_set.difference_update(unset)  # `update` added them
        return self

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Reads a YAML file. Raises `ValueError` naming the file and the first wrong key or value."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 text; save it in that encoding") from None
        values = _read_yaml(text, str(path)) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: got {type(values).__name__}, expected a mapping of options")
        try:
            return cls.parse(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Config:
        """Builds a config from nested mappings. Raises `ValueError` naming the first wrong key or value."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(_first_complaint(error)) from None

    def save(self, path: str | Path) -> None:
        """Writes every option to a YAML file, which `load` reads."""
        text = yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
        write_text(Path(path), text)

    def override(self, assignments: Iterable[str] | Mapping[str, Any]) -> Config:
        """A copy with `section.key=value` strings, or a mapping of dotted keys, applied; values are read as YAML."""
        if not isinstance(assignments, Mapping):
            pairs = (_split_assignment(a) for a in assignments)
            assignments = {key: _read_yaml(value, f"config key {key!r}") for key, value in pairs}
        values = self.given()
        for key, value in assignments.items():
            *sections, leaf = key.split(".")
            target = values
            for name in sections:
                target = target.setdefault(name, {})
                if not isinstance(target, dict):
                    raise ValueError(f"config key {key!r}: {name!r} is an option, not a section")
            target[leaf] = value
        return Config.parse(values)

    def given(self) -> dict[str, Any]:
        """Nested values of the model's name and of the options that were given; all others have their defaults."""
        sections = {name: section.model_dump(exclude_unset=True) for name, section in self._sections().items()}
        return {"model_name": self.model_name, **sections}

    def check_read(self) -> None:
        """Raises `ValueError` naming the options that were given, differ from their default, and would do nothing."""
        idle = set(NOT_READ[self.model_name])
        if not self.model.cosine_output:
            idle.add("output_scale")
        if not self.model.features:
            idle |= {"feature_width", "similarity_output"}
        given = self.model.model_dump(exclude_unset=True)
        idle_given = {
            key: value for key, value in given.items() if key in idle and value != self._default("model", key)
        }
        if idle_given:
            named = ", ".join(
                f"model.{key}={value} (default {self._default('model', key)})" for key, value in idle_given.items()
            )
            raise ValueError(f"options: {named} would do nothing with model {self.model_name!r}; leave them out")
        modalities = self.tokenizer.modalities or []
        if len(set(modalities)) < len(modalities):
            raise ValueError(f"tokenizer.modalities: got {modalities}, expected each name once")

    def _sections(self) -> dict[str, Section]:
        return {name: value for name, value in self.__dict__.items() if isinstance(value, Section)}

    def _default(self, section: str, key: str) -> Any:
        of_model = DEFAULTS_OF_MODEL.get(self.model_name, {}).get(section, {})
        field = type(getattr(self, section)).model_fields[key]
        return of_model[key] if key in of_model else field.get_default(call_default_factory=True)


def option_names(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all options, in the order of this file."""
    names = []
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += option_names(info.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def flat_options(config: Config) -> dict[str, Any]:
    """Dotted name to value, of every option."""
    values = config.model_dump()
    flat = {}
    for name in option_names():
        value: Any = values
        for part in name.split("."):
            value = value[part]
        flat[name] = value
    return flat


class _Loader(yaml.SafeLoader):
    """YAML without references: few lines of them can stand for more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise _Reference(f"line {event.start_mark.line + 1} has a reference, *{event.anchor}; write out its value")
        return super().compose_node(parent, index)


class _Reference(Exception):
    """Says where one is."""


def _read_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except _Reference as error:
        raise ValueError(f"{source}: {error}") from None
    # of tags and dates that do not fit their text, such as !!int x or 2001-99-99, and of a thousand brackets
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{source}: holds a value that cannot be read ({one_line(error)}); put it in quotes") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(
            f"{source}: not YAML{f' (line {mark.line + 1})' if mark else ''}; check quotes and brackets"
        ) from None


def _split_assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"config override: got {text!r}, expected section.key=value, e.g. training.seed=1")
    return key.strip(), value


def _first_complaint(error: ValidationError) -> str:
    complaint = error.errors()[0]
    key = ".".join(str(part) for part in complaint["loc"])
    if complaint["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, option_names(), n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(option_names())}"
        return f"config key {key!r} does not exist{hint}"
    return f"config key {key!r}: got {complaint['input']!r}, {complaint['msg'][0].lower()}{complaint['msg'][1:]}"
