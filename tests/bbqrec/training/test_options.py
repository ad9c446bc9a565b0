"""Every option does something: a run with another value of it ends elsewhere."""

import pytest
import torch
from safetensors.torch import load_file

from bbqrec import fit
from bbqrec.config import flat_options, option_names
from bbqrec.training.plots import read_log

pytestmark = pytest.mark.usefixtures("undrawn")

# Another value of each option, and what it needs beside it to matter.
ALTERNATIVES = {
    "model_name": ("sasrec", {}),
    "tokenizer.modalities": (["text"], {}),
    "tokenizer.levels": (2, {}),
    "tokenizer.codebook_size": (7, {}),
    "tokenizer.dim": (8, {}),
    "tokenizer.hidden": (8, {}),
    "tokenizer.shared_codebooks": (False, {}),
    "tokenizer.ema_decay": (None, {}),
    "tokenizer.kmeans_iterations": (0, {}),
    "tokenizer.revive_after": (1, {"tokenizer.codebook_size": 64}),
    "tokenizer.disentangle": (False, {}),
    "tokenizer.commitment_weight": (2, {}),
    "tokenizer.reconstruction_weight": (0, {}),
    "tokenizer.quantization_weight": (0, {}),
    "tokenizer.club_weight": (1, {}),
    "tokenizer.item_contrast_weight": (0, {}),
    "tokenizer.sequence_contrast_weight": (0, {}),
    "tokenizer.temperature": (0.5, {}),
    "tokenizer.epochs": (1, {}),
    "tokenizer.max_steps": (1, {}),
    "tokenizer.batch_tokens": (100, {}),
    "tokenizer.batch_items": (60, {}),
    "tokenizer.learning_rate": (0.1, {}),
    "model.dim": (8, {}),
    "model.layers": (1, {}),
    "model.heads": (1, {}),
    "model.dropout": (0, {}),
    "model.max_length": (4, {}),
    "model.item_id": (False, {}),
    "model.content": (False, {}),
    "model.features": (False, {}),
    "model.feature_width": (5, {}),
    "model.similarity_output": (False, {}),
    "model.reweighting": (False, {}),
    "model.cross_modal": (False, {}),
    "model.relative_position": (True, {}),
    "model.relative_time": (True, {}),
    "model.cosine_output": (True, {}),
    "model.output_scale": (3, {"model.cosine_output": True}),
    "model.sampled_items": (20, {}),
    "model.sharded_items": (True, {}),
    "model.beam": (5, {"model_name": "tiger"}),
    "training.seed": (1, {}),
    "training.epochs": (1, {}),
    "training.patience": (1, {"training.learning_rate": 0.3, "training.epochs": 12}),
    "training.decay_after": (1, {"training.learning_rate": 0.3, "training.epochs": 12}),
    "training.validation_users": (3, {"training.learning_rate": 0.3, "training.epochs": 12}),
    "training.final_users": (3, {}),
    "training.batch_tokens": (100, {}),
    "training.learning_rate": (0.1, {}),
    "training.weight_decay": (5, {}),
}
OF_SEVERAL_PROCESSES = ["model.sharded_items"]  # see tests/distributed
BASE = {"tokenizer.epochs": 2, "tokenizer.revive_after": 0, "training.epochs": 2, "training.patience": 12}


@pytest.fixture(scope="module")
def outcome(timed_data, tiny_config, tmp_path_factory):
    """What a run with these options ends with: its weights, and the rest that counts."""
    found = {}

    def run(options):
        key = repr(sorted(options.items()))
        if key not in found:
            config = tiny_config.override({**BASE, **options})
            finished = fit(timed_data, tmp_path_factory.mktemp("runs") / "run", config=config, progress=False)
            epochs = len(read_log(finished.folder / "logs" / "sequence_model"))
            found[key] = load_file(finished.folder / "model.safetensors"), (epochs, finished.metrics["test"])
        return found[key]

    return run


@pytest.mark.parametrize("option", [option for option in ALTERNATIVES if option not in OF_SEVERAL_PROCESSES])
def test_another_value_ends_elsewhere(option, outcome, tiny_config):
    value, needed = ALTERNATIVES[option]
    assert value != flat_options(tiny_config.override({**BASE, **needed}))[option]
    (weights, rest), (other_weights, other_rest) = outcome(needed), outcome({**needed, option: value})
    # Being there, or being of another size, does not count as doing something.
    alike = [n for n in weights.keys() & other_weights.keys() if weights[n].shape == other_weights[n].shape]
    assert rest != other_rest or not all(torch.equal(weights[name], other_weights[name]) for name in alike)


@pytest.mark.parametrize("option", OF_SEVERAL_PROCESSES)
def test_one_process_ends_where_it_would_without(option, outcome):
    (weights, rest), (same_weights, same_rest) = outcome({}), outcome({option: ALTERNATIVES[option][0]})
    assert rest == same_rest
    assert weights.keys() == same_weights.keys()
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


def test_every_option_has_an_alternative():
    assert list(ALTERNATIVES) == option_names()
