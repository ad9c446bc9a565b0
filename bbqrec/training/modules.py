"""What Lightning trains: the tokenizer first, then the sequence model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bbqrec.config import Config
from bbqrec.data.batches import PackedBatch, TrainingBatches
from bbqrec.data.splits import Heldout
from bbqrec.evaluation.ranking import evaluate
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.models.shards import own_rows
from bbqrec.models.tiger import Tiger
from bbqrec.processes import rank_and_world, summed
from bbqrec.tokenizer.model import Tokenizer
from bbqrec.training.optimizer import RowwiseAdamW

VALIDATION_METRIC = "validation/ndcg@10"
USERS_NAMED = 10  # of a batch that training stops at


class EpochSeeded(L.LightningModule):
    """Draws all randomness of an epoch from (seed, epoch), so that a resumed run repeats an undisturbed one.

    It stops at a loss, or at weights after an epoch, that are not finite: no checkpoint ever has such weights.
    """

    learning_rate_option: str

    def __init__(self, seed: int, batches: TrainingBatches, user_ids: Sequence[str]):
        super().__init__()
        self.seed = seed
        self.batches = batches
        self.user_ids = user_ids

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        self.batches.set_epoch(self.current_epoch)  # asked for every epoch
        return torch.utils.data.DataLoader(self.batches, batch_size=None, generator=torch.Generator())

    def on_train_epoch_start(self) -> None:
        rank, _ = rank_and_world()  # each process drops out, and fills up, on its own
        torch.manual_seed(self.seed * 1_000_003 + self.current_epoch + rank * 998_244_353)

    def log_epoch(self, values: dict[str, Tensor], weight: int, **options) -> None:
        """Logs means over an epoch, in which a step counts by its `weight`."""
        options |= {"on_step": False, "on_epoch": True, "sync_dist": rank_and_world()[1] > 1}
        self.log_dict(values, batch_size=weight, **options)

    def check_loss(self, loss: Tensor, batch: PackedBatch) -> None:
        """Raises `ValueError` if the loss is not finite: before the optimizer spoils the weights with it."""
        if loss.isfinite():
            return
        users = [] if batch.users is None else batch.users.unique().tolist()
        shown = ", ".join(repr(self.user_ids[user]) for user in users[:USERS_NAMED]) or "unknown"
        more = f" and {len(users) - USERS_NAMED} more" if len(users) > USERS_NAMED else ""
        what = f"loss is {loss.item()} in step {self.global_step + 1} (users {shown}{more})"
        raise ValueError(self._diverged(what))

    def on_train_epoch_end(self) -> None:
        finite = all(own_rows(parameter).isfinite().all() for parameter in self.parameters())
        if summed(torch.tensor(0.0 if finite else 1.0, device=self.device)):  # of rows that any process holds
            raise ValueError(self._diverged("weights are not finite"))

    def last_good_checkpoint(self) -> str:
        """Which it is, in words."""
        keepers = self.trainer.checkpoint_callbacks
        latest = Path(keepers[-1].dirpath) / "last.ckpt" if keepers else None
        return f"the last good checkpoint is {latest}" if latest and latest.is_file() else "there is no checkpoint yet"

    def _diverged(self, what: str) -> str:
        return (
            f"training: diverged in epoch {self.current_epoch + 1}, {what}; {self.last_good_checkpoint()}; "
            f"lower {self.learning_rate_option} and choose another folder"
        )


class TokenizerModule(EpochSeeded):
    """Minimizes the tokenizer's losses; the CLUB estimators have an optimizer of their own.

    With several processes gradients are the means of theirs, contrasts compare within a process, and codebooks follow
    the rows of all.
    """

    learning_rate_option = "tokenizer.learning_rate"

    def __init__(self, tokenizer: Tokenizer, config: Config, batches: TrainingBatches, user_ids: Sequence[str]):
        super().__init__(config.training.seed, batches, user_ids)
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.config = config.tokenizer

    def on_fit_start(self) -> None:
        if not self.tokenizer.initialized:  # that of a resumed run is
            self.tokenizer.initialize_codebooks(torch.Generator().manual_seed(self.seed))

    def training_step(self, batch: PackedBatch, _: int) -> None:
        optimizer, *estimator_optimizer = self._optimizers()
        items = self.items_of_step(batch)
        if estimator_optimizer:
            estimator_loss = self.tokenizer.estimator_loss(items)
            self.check_loss(estimator_loss, batch)
            estimator_optimizer[0].zero_grad()
            self.manual_backward(estimator_loss)
            estimator_optimizer[0].step()
        losses = self.tokenizer.losses(items, batch)
        total = sum(losses.values())
        self.check_loss(total, batch)
        optimizer.zero_grad()
        self.manual_backward(total)
        optimizer.step()
        self._revive_codewords()
        self.log_epoch({f"train/{name}": loss.detach() for name, loss in losses.items()}, len(batch.items))
        self.log_epoch({"train/loss": total.detach()}, len(batch.items), prog_bar=True)

    def _revive_codewords(self) -> None:
        """Every `revive_after` steps."""
        self.tokenizer.steps += 1
        if self.config.revive_after and self.tokenizer.steps % self.config.revive_after == 0:
            moved = self.tokenizer.revive_codewords()
            if self.config.ema_decay is None:
                self._forget_moments(moved)

    def _forget_moments(self, moved: list[Tensor]) -> None:
        """Codewords that moved have no history that the optimizer's averages should carry on."""
        state = self._optimizers()[0].optimizer.state
        for quantizer, codewords in zip(self.tokenizer.quantizers, moved, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                state[quantizer.codebooks][name][codewords] = 0

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Behaviour vectors move where a step has their item, so a step costs the same however many items there are."""
        estimators, table = list(self.tokenizer.mutual_information.parameters()), self.tokenizer.behaviour.weight
        apart = {id(parameter) for parameter in [*estimators, table]}
        others = [parameter for parameter in self.tokenizer.parameters() if id(parameter) not in apart]
        options = {"lr": self.config.learning_rate, "weight_decay": 0.0}
        optimizers = [RowwiseAdamW(others, [table], **options)]
        if estimators:
            optimizers.append(torch.optim.AdamW(estimators, fused=True, **options))
        return optimizers

    def _optimizers(self) -> list:
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def items_of_step(self, batch: PackedBatch) -> Tensor:
        """The items of the batch, filled up with random others, so that content nobody bought is learned too."""
        own = torch.cat([batch.items, batch.targets]).unique()
        others = self.tokenizer.random_items(self.config.batch_items)  # no more of these are own than own there are
        missing = max(0, len(others) - len(own))
        others = others[~torch.isin(others, own)][:missing]
        return torch.cat([own, others]).sort().values


class SequenceModule(EpochSeeded):
    """Minimizes the next-item cross-entropy, and ranks the validation targets after every epoch.

    With several processes a step is one over the transitions of all their batches together. Checkpoints are the same
    whether items are shared out or not: any number of processes can go on from them.
    """

    learning_rate_option = "training.learning_rate"

    def __init__(
        self,
        model: SequenceModel | Tiger,
        config: Config,
        batches: TrainingBatches,
        user_ids: Sequence[str],
        validation: Heldout,
        n_items: int,
    ):
        super().__init__(config.training.seed, batches, user_ids)
        self.model = model
        self.config = config
        self.validation = validation
        self.n_items = n_items
        self.shards = model.shards if isinstance(model, SequenceModel) else None
        if self.shards is not None:
            self._tables = [f"model.{name}" for name in model.tables_of_items]
            # Read by DDP: every process has other rows, so there is nothing to make equal, nor to average.
            self._ddp_params_and_buffers_to_ignore = self._tables

    def training_step(self, batch: PackedBatch, _: int) -> Tensor:
        loss = self.model.loss(batch)
        self.check_loss(loss, batch)
        self.log_epoch({"train/loss": loss.detach()}, self.model.transitions(batch), prog_bar=True)
        return loss * self._share(batch)

    def _share(self, batch: PackedBatch) -> Tensor | float:
        """What makes the mean over processes of their losses, which are means over transitions, one mean over all.

        With items shared out, gradients cross over, so that each process finds a part of them: their sum is wanted.
        """
        _, world = rank_and_world()
        if world == 1:
            return 1.0
        if self.shards is not None and self.model.loss_is_of_all:
            return float(world)
        count = torch.tensor(float(self.model.transitions(batch)), device=self.device)
        return count * world / summed(count)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.model.eval()
        metrics = evaluate(self.model, self.validation, self.n_items, max_length=self.config.model.max_length)
        self.model.train()
        self.log(VALIDATION_METRIC, metrics["ndcg@10"], prog_bar=True)
        self.log("validation/recall@10", metrics["recall@10"], prog_bar=True)

    def on_after_backward(self) -> None:
        """The gradient of an own row is the whole one: nothing averages away what `_share` multiplied it by."""
        if self.shards is not None and self.model.item_id is not None:
            own_rows(self.model.item_id.grad).div_(len(self.shards.sizes))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Item embeddings move where a step has their item: with a sampled softmax those are few of many.

        With `sharded_items` they are a group of their own, as no kernel takes distributed and other tensors together.
        """
        options = self.config.training
        samples = isinstance(self.model, SequenceModel) and self.model.samples
        table = self.model.item_id if samples or self.config.model.sharded_items else None
        others = [parameter for parameter in self.parameters() if parameter is not table]
        tables = [] if table is None else [table]
        optimizer = RowwiseAdamW(
            others, tables if samples else [], lr=options.learning_rate, weight_decay=options.weight_decay
        )
        if tables and not samples:
            optimizer.add_param_group({"params": tables})
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts whole tables in the place of shares, for the first process, which writes them."""
        if self.shards is None:
            return

        def whole(values: dict[str, Any]) -> dict[str, Any]:
            return {
                name: self.shards.whole(value) if hasattr(value, "to_local") else value
                for name, value in values.items()
            }

        checkpoint["state_dict"] = whole(checkpoint["state_dict"])
        for optimizer in checkpoint["optimizer_states"]:
            optimizer["state"] = {parameter: whole(state) for parameter, state in optimizer["state"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes shares of whole tables."""
        if self.shards is None:
            return
        weights = checkpoint["state_dict"]
        weights |= {name: self.shards.share(weights[name]) for name in self._tables}
        if self.model.item_id is not None:
            (optimizer,) = checkpoint["optimizer_states"]
            state = optimizer["state"][optimizer["param_groups"][-1]["params"][0]]  # see `configure_optimizers`
            state |= {name: self.shards.share(value) for name, value in state.items() if value.dim()}
