"""What Lightning trains: items of a step, optimizers, order of the epochs."""

from dataclasses import replace

import lightning as L
import pytest
import torch

from bbqrec import Config, fit
from bbqrec.data.batches import PrefixBatches, TrainingBatches, pack_histories
from bbqrec.data.dataset import Histories
from bbqrec.data.splits import leave_one_out
from bbqrec.models.build import build_model
from bbqrec.tokenizer import Tokenizer
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training import modules
from bbqrec.training.modules import SequenceModule, TokenizerModule


@pytest.fixture
def module(tiny_data, tiny_config):
    tokenizer = Tokenizer(tiny_data.features, tiny_data.n_items, tiny_config.tokenizer, max_length=12)
    return TokenizerModule(
        tokenizer, tiny_config, TrainingBatches(tiny_data.histories, 12, 256, seed=0), tiny_data.user_ids
    )


def test_items_of_a_step_are_the_batchs_and_random_others(module, training_batch, tiny_data):
    batch = training_batch([3, 9, 3, 5], [40, 2])
    items = module.items_of_step(batch)
    assert {2, 3, 5, 9, 40} <= set(items.tolist())
    assert len(items) == len(items.unique()) == 32
    assert torch.equal(items, items.sort().values)
    assert not torch.equal(items, module.items_of_step(batch))
    module.config = module.config.model_copy(update={"batch_items": 10_000})
    assert module.items_of_step(batch).tolist() == list(range(tiny_data.n_items))


def test_every_parameter_has_one_optimizer(module):
    others, estimators = ({id(p) for g in o.param_groups for p in g["params"]} for o in module.configure_optimizers())
    assert estimators == {id(p) for p in module.tokenizer.mutual_information.parameters()}
    assert not others & estimators
    assert others | estimators == {id(p) for p in module.tokenizer.parameters()}


def test_a_step_moves_the_behaviour_vectors_of_its_items_alone(module, training_batch):
    optimizer, _ = module.configure_optimizers()
    table = module.tokenizer.behaviour.weight
    module.tokenizer.initialize_codebooks(torch.Generator().manual_seed(0))
    for origins in ([3, 9, 3, 5], [40, 2, 7, 9]):  # the second step would carry on what moved in the first
        batch = training_batch(origins)
        items, before = module.items_of_step(batch), table.detach().clone()
        sum(module.tokenizer.losses(items, batch).values()).backward()
        assert table.grad.is_sparse
        optimizer.step()
        moved = (table != before).any(1).nonzero()[:, 0]
        assert torch.equal(moved, items)
        assert len(items) < len(table)


@pytest.mark.parametrize("count", [5, 40, 10_000])
def test_random_items_are_distinct_and_any(module, tiny_data, count):
    drawn = [module.tokenizer.random_items(count) for _ in range(200 if count < 10_000 else 1)]
    for items in drawn:
        assert len(items) == len(items.unique()) == min(count, tiny_data.n_items)
    assert torch.cat(drawn).unique().tolist() == list(range(tiny_data.n_items))


def test_training_moves_the_estimators_of_club(module):
    estimators = dict(module.tokenizer.mutual_information.named_parameters())
    before = {name: p.detach().clone() for name, p in estimators.items()}
    assert before
    module.tokenizer.initialize_codebooks(torch.Generator().manual_seed(0))
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    for name, p in estimators.items():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize(("name", "batches_of_model"), [("sasrec", TrainingBatches), ("tiger", PrefixBatches)])
def test_processes_count_by_what_their_losses_are_means_over(name, batches_of_model, tiny_data, monkeypatch):
    config = Config().override({"model_name": name, "model.dim": 16, "model.max_length": 12, "model.dropout": 0.0})
    torch.manual_seed(0)
    codes = torch.randint(0, 8, (tiny_data.n_items, 1, 3))
    ids = SemanticIDs(("text",), codes, torch.randn(1, 3, 8, 16)) if name == "tiger" else None
    model = build_model(config, tiny_data.n_items, ids).double().train()
    split = leave_one_out(tiny_data)
    batches = sorted(
        batches_of_model(split.train, 12, 64, seed=0), key=lambda batch: len(batch.items) / len(batch.last)
    )
    parts = batches[0], batches[-1]  # short histories and long ones
    sequences = [part.tolist() for batch in parts for part in batch.items.split(batch.cu_seqlens.diff().tolist())]
    together = pack_histories(Histories.from_lists(sequences), 12)
    together = replace(together, targets=torch.cat([batch.targets for batch in parts]))
    loss = model.loss(together)
    monkeypatch.setattr(modules, "rank_and_world", lambda: (0, 2))
    total = torch.tensor(float(sum(model.transitions(batch) for batch in parts)))
    monkeypatch.setattr(modules, "summed", lambda count: total)
    module = SequenceModule(model, config, batches, tiny_data.user_ids, split.validation, tiny_data.n_items)
    shares = [module._share(batch) * model.loss(batch) for batch in parts]
    torch.testing.assert_close(sum(shares) / 2, loss)  # DDP takes the mean over processes


def test_every_epoch_has_its_own_order(tiny_data, tiny_config, tmp_path, monkeypatch):
    epochs = []
    iterate = TrainingBatches.__iter__
    monkeypatch.setattr(TrainingBatches, "__iter__", lambda self: (epochs.append(self.epoch), iterate(self))[1])
    fit(tiny_data, tmp_path / "run", model="sasrec", config=tiny_config, progress=False)
    assert epochs[-1] > 0
    assert sorted(set(epochs)) == list(range(epochs[-1] + 1))


def test_moved_codewords_start_without_moments(tiny_data, tiny_config):
    config = tiny_config.override({"tokenizer.ema_decay": None, "tokenizer.revive_after": 2})
    tokenizer = Tokenizer(tiny_data.features, tiny_data.n_items, config.tokenizer, max_length=12)
    module = TokenizerModule(
        tokenizer, config, TrainingBatches(tiny_data.histories, 12, 256, seed=0), tiny_data.user_ids
    )
    optimizers = module.configure_optimizers()
    module._optimizers = lambda: [type("Wrapped", (), {"optimizer": optimizer}) for optimizer in optimizers]
    [quantizer] = tokenizer.quantizers
    quantizer.codebooks.sum().backward()
    optimizers[0].step()
    quantizer.steps_unused[1, 3] = 2
    tokenizer.steps.fill_(1)
    module._revive_codewords()
    state = optimizers[0].state[quantizer.codebooks]
    for name in ("exp_avg", "exp_avg_sq"):
        untouched = torch.ones(3, 8, dtype=torch.bool)
        untouched[1, 3] = False
        assert (state[name][1, 3] == 0).all()
        assert (state[name][untouched] != 0).all()
    quantizer.steps_unused[1, 3] = 2
    before = quantizer.codebooks.clone()
    module._revive_codewords()  # the third step: not its turn
    assert torch.equal(quantizer.codebooks, before)
