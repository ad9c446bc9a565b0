"""The behaviour-semantic alignment network: encoders, shared residual quantizer, decoders, and their losses.

Notation of the paper: for item `i` and modality `m`, features `x`, behaviour-aligned part `z`, modality-specific part
`u`, behaviour embedding `b` (a learned vector per item), quantized `ẑ = RQ(z; C)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbqrec.config import TokenizerConfig
from bbqrec.data.batches import PackedBatch
from bbqrec.data.dataset import Features
from bbqrec.models.transformer import CausalTransformer
from bbqrec.processes import rank_and_world
from bbqrec.tokenizer.losses import GaussianNetwork, info_nce
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec_kernels import ResidualQuantizer, residual_quantize

BEHAVIOUR = -1  # its index among the sources of codes: after the modalities
ROWS_AT_ONCE = 65_536  # of features, in float64
REVIVAL_ITEMS = 4096  # whose vectors codewords without use may move to


class Tokenizer(nn.Module):
    """Learns semantic IDs from features and histories.

    Modules and methods know a modality by its index `m` in `modalities`: a name may hold any character.

    Args:
        features: the feature sets to use, by modality.
        n_items: size of the catalogue.
        config: see `TokenizerConfig`.
        max_length: longest history that `sequence contrast` reads.
    """

    def __init__(self, features: dict[str, Features], n_items: int, config: TokenizerConfig, max_length: int):
        super().__init__()
        self.config = config
        self.modalities = tuple(features)
        self.encoders, self.specific, self.decoders = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.mutual_information = nn.ModuleList()  # trained by their own optimizer: see `estimator_loss`
        for m, feature in enumerate(features.values()):
            values, present = standardize(feature)
            self.register_buffer(f"features_{m}", values, persistent=False)
            self.register_buffer(f"present_{m}", present, persistent=False)
            width = values.shape[1]
            self.encoders.append(encoder(width, config.hidden, config.dim))
            if config.disentangle:
                self.specific.append(encoder(width, config.hidden, config.dim))
                if config.club_weight > 0:
                    self.mutual_information.append(GaussianNetwork(config.dim, config.dim, config.hidden))
            self.decoders.append(mlp((1 + config.disentangle) * config.dim, config.hidden, width))
        self.behaviour = nn.Embedding(n_items, config.dim)
        self.quantizers = nn.ModuleList(
            ResidualQuantizer(config.dim, config.levels, config.codebook_size, ema_decay=config.ema_decay)
            for _ in range(1 if config.shared_codebooks else len(self.modalities) + 1)
        )
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("steps", torch.tensor(0))  # of training, to time revivals by
        self.history_encoder = CausalTransformer(config.dim, layers=1, heads=2, dropout=0.1, max_length=max_length)

    def features(self, m: int) -> Tensor:
        """`(n_items, F)`, standardized."""
        return getattr(self, f"features_{m}")

    def present(self, m: int) -> Tensor:
        """`(n_items,)` bool."""
        return getattr(self, f"present_{m}")

    def codebook(self, m: int) -> Tensor:
        """`(L, K, d)`: the shared codebooks, or those of modality `m` or of `BEHAVIOUR`."""
        return self.quantizers[0 if len(self.quantizers) == 1 else m].codebooks

    def behaviour_vectors(self, items: Tensor) -> Tensor:
        """`(N, d)` of items `(N,)`, on the scale of the encoders' outputs: they share codebooks."""
        sparse = rank_and_world()[1] == 1  # not every backend sums up sparse gradients
        return F.layer_norm(F.embedding(items, self.behaviour.weight, sparse=sparse), (self.config.dim,))

    def random_items(self, count: int) -> Tensor:
        """`(min(count, n_items),)` distinct items, in time that does not grow with the catalogue."""
        n_items = self.behaviour.num_embeddings
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        items = torch.from_numpy(rng.choice(n_items, min(count, n_items), replace=False))
        return items.to(self.behaviour.weight.device)

    @torch.no_grad()
    def initialize_codebooks(self, generator: torch.Generator) -> None:
        """Residual k-means over the encoders' present outputs: all modalities together where codebooks are shared."""
        rows = self._quantized_rows(torch.arange(len(self.behaviour.weight), device=self.initialized.device))
        for quantizer, x in zip(self.quantizers, rows, strict=True):
            quantizer.initialize(x, iterations=self.config.kmeans_iterations, generator=generator)
        self.initialized.fill_(True)

    @torch.no_grad()
    def revive_codewords(self) -> list[Tensor]:
        """Moves codewords that were not chosen in the last `revive_after` steps to where items fit badly.

        Returns which moved, `(L, K)` bool of each quantizer: see `ResidualQuantizer.revive`.
        """
        rows = self._quantized_rows(self.random_items(REVIVAL_ITEMS))
        return [
            quantizer.revive(x, window=self.config.revive_after)
            for quantizer, x in zip(self.quantizers, rows, strict=True)
        ]

    def _quantized_rows(self, items: Tensor) -> list[Tensor]:
        """What each quantizer has to quantize of these items `(N,)`."""
        rows = [encode(self.features(m)[items[self.present(m)[items]]]) for m, encode in enumerate(self.encoders)]
        rows.append(self.behaviour_vectors(items))
        return [torch.cat(rows)] if len(self.quantizers) == 1 else rows

    def losses(self, items: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; their sum is what the main optimizer minimizes.

        Args:
            items: `(N,)` distinct item indices, sorted; all items of `batch` are among them.
            batch: packed histories with their targets.
        """
        config, losses = self.config, {}
        masks = [self.present(m)[items] for m in range(len(self.modalities))]
        xs = [self.features(m)[items[mask]] for m, mask in enumerate(masks)]
        zs = [encode(x) for encode, x in zip(self.encoders, xs, strict=True)]
        behaviour = self.behaviour_vectors(items)
        # The contrasts compare the behaviour vectors themselves: they are quantized for the sake of the codebooks.
        *quantized, _ = self._quantize([*zs, behaviour], losses)
        aligned = []  # for each modality: ẑ (N, d), zero where absent, and mask (N,)
        for m, (x, z, z_hat, mask) in enumerate(zip(xs, zs, quantized, masks, strict=True)):
            if len(x):  # otherwise there is nothing to average over
                parts = [z_hat]
                if config.disentangle:
                    u = self.specific[m](x)
                    parts.append(u)
                    if self.mutual_information:
                        # Information is never negative: below zero, the estimator lags: there is nothing to minimize.
                        bound = self.mutual_information[m].upper_bound(z, u).clamp_min(0)
                        _add(losses, "club", config.club_weight, bound)
                reconstruction = self.decoders[m](torch.cat(parts, -1))
                _add(losses, "reconstruction", config.reconstruction_weight, F.mse_loss(reconstruction, x))
            full = z_hat.new_zeros(len(items), config.dim).index_put((mask.nonzero()[:, 0],), z_hat)
            aligned.append((full, mask))

        if config.item_contrast_weight > 0:
            pairs = list(combinations([*aligned, (behaviour, torch.ones_like(items, dtype=torch.bool))], 2))
            for (left, left_mask), (right, right_mask) in pairs:
                both = left_mask & right_mask
                loss = info_nce(left[both], right[both], config.temperature)
                _add(losses, "item_contrast", config.item_contrast_weight / len(pairs), loss)
        if config.sequence_contrast_weight > 0:
            content = torch.stack([quantized for quantized, _ in aligned]).sum(0) + behaviour  # (N, d)
            # Not content[...]: gradients of repeated indices would be summed in no fixed order.
            history = self.history_encoder(F.embedding(torch.searchsorted(items, batch.items), content), batch)
            target = torch.searchsorted(items, batch.targets)
            loss = info_nce(history, content, config.temperature, positives=target)
            _add(losses, "sequence_contrast", config.sequence_contrast_weight, loss)
        return losses

    def estimator_loss(self, items: Tensor) -> Tensor:
        """Negative log likelihood of `q(u | z)`, for the optimizer of the CLUB estimators only."""
        total = self.behaviour.weight.new_zeros(())
        for m, estimator in enumerate(self.mutual_information):
            x = self.features(m)[items[self.present(m)[items]]]
            if len(x) == 0:
                continue
            with torch.no_grad():
                z, u = self.encoders[m](x), self.specific[m](x)
            total = total - estimator.log_likelihood(z, u).mean()
        if total.requires_grad:
            return total
        # Where no item has anything, the gradient is zero: there has to be one, in every process.
        return total + 0 * sum(parameter.sum() for parameter in self.mutual_information.parameters())

    @torch.no_grad()
    def semantic_ids(self) -> SemanticIDs:
        """Codes of the whole catalogue, -1 where an item lacks the modality. Raises `ValueError` after divergence."""
        codes = []
        for m, encode in enumerate(self.encoders):
            found = residual_quantize(encode(self.features(m)), self.codebook(m)).codes
            if (found[self.present(m)] < 0).any():  # what quantization makes of NaN
                raise ValueError(
                    f"tokenizer: vectors of modality {self.modalities[m]!r} are not finite, training has diverged; "
                    "lower tokenizer.learning_rate and choose another folder"
                )
            codes.append(found.masked_fill(~self.present(m)[:, None], -1))
        quantizers = self.quantizers if len(self.quantizers) == 1 else self.quantizers[: len(self.modalities)]
        books = torch.stack([quantizer.codebooks for quantizer in quantizers])
        return SemanticIDs(self.modalities, torch.stack(codes, 1).cpu(), books.cpu())

    @torch.no_grad()
    def fidelity(self) -> dict[str, dict[str, Any]]:
        """What quantization keeps, by modality, over all items that have it.

        `residual`: after each level, the share of the squared length of `z` that its codes do not explain.
        `reconstruction`: the share of the features' variance that the decoder gives back, from codes and `u`; None of
        features without any.
        """
        residual, reconstruction = {}, {}
        for m, name in enumerate(self.modalities):
            x = self.features(m)[self.present(m)]
            z = self.encoders[m](x)
            result = residual_quantize(z, self.codebook(m))
            residual[name] = (result.commitment_loss / z.square().mean()).tolist()
            parts = [result.quantized, *(specific(x) for specific in self.specific[m : m + 1])]
            error, variance = F.mse_loss(self.decoders[m](torch.cat(parts, -1)), x), x.square().mean()
            reconstruction[name] = 1 - (error / variance).item() if variance else None
        return {"residual": residual, "reconstruction": reconstruction}

    def _quantize(self, zs: list[Tensor], losses: dict[str, Tensor]) -> list[Tensor]:
        """`ẑ` of the modalities and of the behaviour. One call for each quantizer: it is one step of its averages."""
        config = self.config
        counts = [len(z) for z in zs]
        groups = [torch.cat(zs)] if len(self.quantizers) == 1 else zs
        quantized = []
        for quantizer, z in zip(self.quantizers, groups, strict=True):
            result = quantizer(z)
            loss = config.commitment_weight * result.commitment_loss.sum()
            if config.ema_decay is None:
                loss = loss + result.codebook_loss.sum()
            # A shared quantizer's mean over the rows of all sources stands for the sum of their means.
            _add(losses, "quantization", config.quantization_weight * len(zs) / len(groups), loss)
            quantized.append(result.quantized)
        return list(quantized[0].split(counts)) if len(groups) == 1 else quantized


@dataclass(frozen=True, eq=False)
class Standardization:
    """Centres features and scales them to one unit of variance per dimension on average.

    Attributes:
        mean: `(F,)` float64.
        constant: `(F,)` bool, dimensions that are constant up to the resolution of float32: they become zero.
        scale: what centred features are divided by.
    """

    mean: np.ndarray
    constant: np.ndarray
    scale: float

    @classmethod
    def of(cls, feature: Features) -> Standardization:
        """Of the items that have the modality."""
        blocks = _blocks(feature.present)

        def rows() -> Iterator[np.ndarray]:
            return (feature.values[block].astype(np.float64) for block in blocks)  # squares fit no float32

        mean = sum(block.sum(0) for block in rows()) / feature.present.sum()
        largest = np.max([np.abs(block).max(0) for block in rows()], axis=0)
        furthest = np.max([np.abs(block - mean).max(0) for block in rows()], axis=0)
        constant = furthest <= np.finfo(np.float32).eps * largest
        squares = sum(np.square(block - mean)[:, ~constant].sum() for block in rows())
        return cls(mean, constant, float(np.sqrt(squares / (feature.present.sum() * len(mean)))) or 1.0)

    def apply(self, values: np.ndarray, present: np.ndarray) -> Tensor:
        """`(N, F)` to float32 of that shape; rows that are not `present` `(N,)` are zero."""
        standardized = np.zeros(values.shape, np.float32)
        for block in _blocks(present):
            centred = values[block].astype(np.float64) - self.mean
            centred[:, self.constant] = 0
            standardized[block] = centred / self.scale
        return torch.from_numpy(standardized)


def _blocks(present: np.ndarray) -> list[np.ndarray]:
    """The rows that are present, some at a time: a catalogue in float64 would take several times its own memory."""
    rows = np.flatnonzero(present)
    return [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]


def standardize(feature: Features) -> tuple[Tensor, Tensor]:
    """Standardized values `(n_items, F)` float32, absent rows zero, and `present` `(n_items,)` bool."""
    values = Standardization.of(feature).apply(feature.values, feature.present)
    return values, torch.from_numpy(feature.present.copy())


def encoder(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Ends in a layer norm: a free scale would run away, as CLUB rewards it and quantization chases it."""
    return mlp(width_in, hidden, width_out).append(nn.LayerNorm(width_out, elementwise_affine=False))


def mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


def _add(losses: dict[str, Tensor], name: str, weight: float, value: Tensor) -> None:
    losses[name] = losses.get(name, 0) + weight * value
