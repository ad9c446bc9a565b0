"""Layers over the operators, for models of your own: `ResidualQuantizer` and `SimilarityAttention`.

Where `torch.distributed` is initialized, what is counted in training is summed over the ranks of the default group, and
rank 0 draws: codebooks stay equal everywhere. The collectives have the same shapes on every rank, so ranks may hold
different numbers of rows, but all ranks have to make the same calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from bbqrec_kernels._checks import INTEGERS, check_dim, check_dtype, check_int, check_size, check_tensor
from bbqrec_kernels.residual_quantization import (
    ResidualQuantization,
    residual_decode,
    residual_quantize,
    residual_statistics,
)
from bbqrec_kernels.similarity_attention import (
    PackedCodes,
    Term,
    gap,
    matches,
    prefix,
    similarity_attention,
    similarity_attention_varlen,
)
from bbqrec_kernels.similarity_attention.api import MAX_HEAD_SIZE
from bbqrec_kernels.similarity_attention.terms import MAX_BUCKETS, MAX_CHANNELS, MAX_LEVELS


class ResidualQuantizer(nn.Module):
    """Residual quantization with codebooks that learn, by gradient or as exponential moving averages (EMA).

    By gradient (the default), `codebooks` is a parameter: add `codebook_loss` and, weighted (0.25 is usual),
    `commitment_loss` of the result to the loss. With `ema_decay`, it is a buffer that every `forward` in training mode
    moves; add `commitment_loss` only. As a `forward` is a step of the average, quantize all rows of a step in one call.

    Codebooks start as random numbers; `initialize` puts them where the data is, and `revive` moves codewords that
    nobody chooses any more. Both are for you to call, for instance before training and every hundred steps.

    Args:
        dim: D, width of the rows and codewords.
        levels: L, codes per row.
        codebook_size: K, codewords per level.
        ema_decay: None for codebooks trained by gradient; otherwise the share that an average keeps in a step, at
            least 0 and below 1 (0.99 is usual).

    Attributes:
        codebooks: `(L, K, D)` float32, a parameter or a buffer; `N(0, 1/D)` from torch's global generator at first.
            Keep them so: a layer turned to half precision cannot quantize, one under autocast can.
        steps_unused: `(L, K)` int64 buffer, calls of `forward` in training mode since a codeword was last chosen.
        ema_counts: `(L, K)` float32 buffer, moving average of the counts of `residual_statistics` in a step; None where
            codebooks are trained by gradient.
        ema_sums: `(L, K, D)`, the same of its sums.

    Raises:
        ValueError: a size below 1, or `ema_decay` outside of [0, 1).

    Source: Lee et al. 2022, Autoregressive image generation using residual quantization; EMA as in van den Oord et al.
    2017, Neural discrete representation learning, appendix A.1.
    """

    def __init__(self, dim: int, levels: int, codebook_size: int, *, ema_decay: float | None = None):
        super().__init__()
        _check_sizes(dim=dim, levels=levels, codebook_size=codebook_size)
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay: got {ema_decay}, expected a number from 0 to below 1, or None for gradients")
        self.ema_decay = ema_decay
        codebooks = torch.randn(levels, codebook_size, dim, dtype=torch.float32) * dim**-0.5
        if ema_decay is None:
            self.codebooks = nn.Parameter(codebooks)
            self.ema_counts = self.ema_sums = None  # no buffers of None: torch.export miscounts what comes after them
        else:
            self.register_buffer("codebooks", codebooks)
            self.register_buffer("ema_counts", torch.ones_like(codebooks[..., 0]))
            self.register_buffer("ema_sums", codebooks.clone())
        self.register_buffer("steps_unused", torch.zeros(levels, codebook_size, dtype=torch.int64))

    def extra_repr(self) -> str:
        levels, codebook_size, dim = self.codebooks.shape
        return f"{dim}, levels={levels}, codebook_size={codebook_size}, ema_decay={self.ema_decay}"

    def forward(self, x: Tensor) -> ResidualQuantization:
        """Quantizes `x (..., D)`: see `residual_quantize`. In training mode also counts use and moves the averages.

        With `r_l` the residuals that chose codeword `(l, k)` in this step, on all ranks, and `γ` the decay:
        `ema_counts ← γ·ema_counts + (1-γ)·|r_l|`, `ema_sums ← γ·ema_sums + (1-γ)·Σ r_l`, and their quotient is the
        codeword's new place. A codeword that nobody chose stays where it is. The result is of the codebooks before.
        """
        moves = self.training and self.ema_decay is not None
        codebooks = self.codebooks.clone() if moves else self.codebooks  # the backward reads those that were searched
        result = residual_quantize(x, codebooks)
        if self.training:
            self._observe(x, result.codes)
        return result

    def decode(self, codes: Tensor) -> Tensor:
        """The vectors `(..., D)` that `codes (..., L)` stand for: see `residual_decode`."""
        return residual_decode(codes, self.codebooks)

    def usage(self, codes: Tensor) -> CodebookUsage:
        """How evenly `codes (..., L)` use the codebooks: see `codebook_usage`."""
        return codebook_usage(codes, self.codebooks.shape[1])

    @torch.no_grad()
    def initialize(self, x: Tensor, *, iterations: int = 10, generator: torch.Generator | None = None) -> None:
        """Replaces the codebooks by residual k-means over `x (..., D)`, and starts their statistics anew.

        Arguments, errors and what several ranks do are those of `residual_kmeans`.
        """
        levels, codebook_size, _ = self.codebooks.shape
        self._check_width(x)
        x = x.to(self.codebooks)
        self.codebooks.copy_(residual_kmeans(x, levels, codebook_size, iterations=iterations, generator=generator))
        self._restart(torch.ones_like(self.steps_unused, dtype=torch.bool))

    @torch.no_grad()
    def revive(self, x: Tensor, *, window: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Moves codewords that were not chosen in the last `window` training steps to residuals that fit badly.

        Level by level, each dead codeword moves to another residual of `x`, drawn with a probability that grows with
        its squared distance to the nearest codeword (the first draw is that of k-means++). Where fewer rows than
        dead codewords are off their codeword, the rest of them stays dead. Statistics of moved codewords start anew:
        unused for 0 steps, averages of one row at the new place. With several ranks, the rows are those of rank 0.
        Call it after the backward of a step, which reads the codebooks.

        Args:
            x: `(..., D)` recent rows, float32, bfloat16 or float16. Rows that are not finite are left out.
            window: steps that a codeword may go unused, at least 1.
            generator: of the draws, on the CPU; torch's global one by default.

        Returns:
            `(L, K)` bool, which codewords moved: an optimizer that keeps state for them may want to reset it.

        Raises:
            ValueError: a window below 1, or an `x` of another width.
        """
        _check_sizes(window=window)
        self._check_width(x)
        residual = x.to(self.codebooks).reshape(-1, x.shape[-1])
        codebooks = self.codebooks.clone()
        moved = torch.zeros_like(self.steps_unused, dtype=torch.uint8)  # not every backend sends booleans
        for level, words in enumerate(codebooks):
            dead = (self.steps_unused[level] >= window).nonzero()[:, 0]
            error = (residual - residual_quantize(residual, words[None]).quantized).square().sum(-1)
            rows = _draw(error, len(dead), generator)
            words[dead[: len(rows)]] = residual[rows]
            moved[level, dead[: len(rows)]] = 1
            residual = residual - residual_quantize(residual, words[None]).quantized
        _copy_from_first_rank(codebooks, moved)
        self.codebooks.copy_(codebooks)
        self._restart(moved.bool())
        return moved.bool()

    @torch.no_grad()
    def _observe(self, x: Tensor, codes: Tensor) -> None:
        counts, sums = residual_statistics(x, codes, self.codebooks)
        _sum_over_ranks(counts)
        used = counts > 0
        self.steps_unused.add_(1).masked_fill_(used, 0)
        if self.ema_decay is not None:
            _sum_over_ranks(sums)
            self.ema_counts.lerp_(counts, 1 - self.ema_decay)
            self.ema_sums.lerp_(sums, 1 - self.ema_decay)
            means = self.ema_sums / self.ema_counts[..., None]
            self.codebooks.copy_(torch.where(used[..., None], means, self.codebooks))

    def _restart(self, codewords: Tensor) -> None:
        """Forgets what was counted for these codewords `(L, K)`."""
        self.steps_unused.masked_fill_(codewords, 0)
        if self.ema_decay is not None:
            self.ema_counts.masked_fill_(codewords, 1)
            self.ema_sums.copy_(torch.where(codewords[..., None], self.codebooks, self.ema_sums))

    def _check_width(self, x: Tensor) -> None:
        _check_rows(x)
        check_size("x", x, -1, self.codebooks.shape[-1], "dim of the quantizer")


class CodebookUsage(NamedTuple):
    """What `codebook_usage` returns: two `(L,)` float64 tensors."""

    usage: Tensor
    """Share of the codewords that occur, 0 to 1."""
    perplexity: Tensor
    """`exp` of the entropy of the codes, 1 to K: the number of codewords that would be as uncertain if all were used
    equally often. 1 where there are no codes."""


@torch.no_grad()
def codebook_usage(codes: Tensor, codebook_size: int) -> CodebookUsage:
    """Per level, how many codewords `codes (..., L)` use and how evenly; negative codes do not count.

    These are figures of the codes given: with several ranks, gather the codes first.

    Raises:
        TypeError: codes are no integer tensor, or `codebook_size` is no int.
        ValueError: codes have no level, or `codebook_size` is below 1.
        IndexError: a code is not below `codebook_size`.
    """
    check_tensor("codes", codes)
    check_dtype("codes", codes, INTEGERS)
    if codes.dim() == 0 or codes.shape[-1] == 0:
        raise ValueError(f"codes: got shape {tuple(codes.shape)}, expected (..., levels) with a level at least")
    check_int("codebook_size", codebook_size)
    _check_sizes(codebook_size=codebook_size)
    if codes.numel() and (largest := int(codes.max())) >= codebook_size:
        raise IndexError(f"codes: got {largest}, expected codes below codebook_size={codebook_size}")
    levels = codes.reshape(-1, codes.shape[-1]).unbind(1)
    counts = torch.stack([torch.bincount(level[level >= 0], minlength=codebook_size) for level in levels]).double()
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return CodebookUsage((counts > 0).double().mean(1), torch.special.entr(shares).sum(1).exp())


@torch.no_grad()
def residual_kmeans(
    x: Tensor, levels: int, codebook_size: int, *, iterations: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """Codebooks that start where the data is: each level clusters what the levels before left over.

    A level starts from distinct random residuals (with repetition and a little noise where there are fewer than
    codewords) and takes `iterations` steps of Lloyd's algorithm; a codeword that nobody chose moves to a random
    residual. With several ranks, the rows of all of them are clustered; those that codewords start from or move to are
    of rank 0.

    Args:
        x: `(..., D)` float32 or float64, finite, at least one row (on rank 0).
        levels: L, codebooks to make.
        codebook_size: K, codewords per level.
        iterations: steps of Lloyd's algorithm; 0 leaves the random residuals.
        generator: of the random residuals, on the CPU; torch's global one by default.

    Returns:
        `(L, K, D)` codebooks, dtype of `x`.

    Raises:
        TypeError: another dtype.
        ValueError: no rows, no columns, a value that is not finite, or a size below 1.
    """
    _check_sizes(levels=levels, codebook_size=codebook_size)
    _check_rows(x)
    check_dtype("x", x, (torch.float32, torch.float64))
    if x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one column")
    residual = x.reshape(-1, x.shape[-1])
    if not len(residual) and _is_first_rank():
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one row to start from")
    if not residual.isfinite().all():
        raise ValueError("x: got values that are not finite, expected none; leave those rows out")
    codebooks = []
    for _ in range(levels):
        centroids = _sample(residual, codebook_size, generator)
        for _ in range(iterations):
            codes = residual_quantize(residual, centroids[None]).codes
            counts, sums = residual_statistics(residual, codes, centroids[None])
            _sum_over_ranks(counts, sums)
            centroids = torch.where(
                counts[0, :, None] > 0,
                sums[0] / counts[0, :, None].clamp_min(1),
                _sample(residual, codebook_size, generator),
            )
        codebooks.append(centroids)
        residual = residual - residual_quantize(residual, centroids[None]).quantized
    return torch.stack(codebooks)


class SimilarityAttention(nn.Module):
    """Multi-head self-attention that a learned table changes by what two tokens have in common.

    Scores are those of `similarity_attention`. Tables start at zero, which is plain attention. A channel `(m, n)`
    compares the codes of modality `m` of the querying token with those of modality `n` of the other.

    Args:
        dim: width of the tokens, a multiple of `heads`.
        heads: H, number of heads.
        levels: L, of the codes that `prefix` and `matches` compare, at most 16.
        prefix: channels compared by the number of leading levels that agree, for instance `[(0, 0), (0, 1)]`.
        matches: channels compared by the number of levels that agree anywhere.
        gaps: kinds of position or time that are compared by the power of two of their distance (see `gap`).
        gap_buckets: entries of each of their tables, at most 64; the last one is for all that is farther.
        is_causal: whether a token sees only itself and those before it.

    Attributes:
        qkv: `nn.Linear` from `dim` to `3·dim`.
        project: `nn.Linear` from `dim` to `dim`.
        prefix_table: `(channels, H, L+1)` float32 parameter, log-weights; None without channels.
        matches_table: the same for the channels of `matches`.
        gap_table: `(gaps, H, gap_buckets)`, likewise.

    Raises:
        ValueError: `dim` is no multiple of `heads` or more than 256 a head, channels without `levels` or more than 8
            with `gaps`, one that is no pair of modalities counted from 0, or a size outside of its limits.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        levels: int = 0,
        prefix: Sequence[tuple[int, int]] = (),
        matches: Sequence[tuple[int, int]] = (),
        gaps: int = 0,
        gap_buckets: int = 32,
        is_causal: bool = False,
    ):
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim: got {dim}, expected a multiple of heads={heads}")
        if dim // heads > MAX_HEAD_SIZE:
            raise ValueError(f"dim: got {dim}, expected at most {MAX_HEAD_SIZE * heads} ({MAX_HEAD_SIZE} a head)")
        for name, size, most in (("levels", levels, MAX_LEVELS), ("gaps", gaps, MAX_CHANNELS)):
            if not 0 <= size <= most:
                raise ValueError(f"{name}: got {size}, expected 0 to {most}")
        if not 1 <= gap_buckets <= MAX_BUCKETS:
            raise ValueError(f"gap_buckets: got {gap_buckets}, expected 1 to {MAX_BUCKETS}")
        if len(prefix) + len(matches) + gaps > MAX_CHANNELS:
            channels = f"{len(prefix)} of prefix, {len(matches)} of matches and {gaps} gaps"
            raise ValueError(f"channels: got {channels}, expected at most {MAX_CHANNELS} together")
        for name, channels in (("prefix", prefix), ("matches", matches)):
            if channels and levels < 1:
                raise ValueError(f"levels: got {levels}, expected at least 1, as there are channels in {name}")
            if any(len(channel) != 2 or min(channel) < 0 for channel in channels):
                raise ValueError(f"{name}: got {channels}, expected pairs of modalities counted from 0")
        self.heads, self.levels, self.is_causal = heads, levels, is_causal
        self.prefix, self.matches = tuple(prefix), tuple(matches)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.prefix_table = _table(len(prefix), heads, levels + 1)
        self.matches_table = _table(len(matches), heads, levels + 1)
        self.gap_table = _table(gaps, heads, gap_buckets)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, prefix={self.prefix}, matches={self.matches}, is_causal={self.is_causal}"

    def forward(
        self,
        x: Tensor,
        *,
        codes: Tensor | PackedCodes | None = None,
        positions: Tensor | None = None,
        terms: Sequence[Term] = (),
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attends within each sequence of a padded batch `(B, S, dim)`, or of packed sequences `(T, dim)`.

        Args:
            x: tokens, in either layout; `(B, S)` and `(T,)` are `...` below.
            codes: `(..., M, L)` integers of the M modalities that channels name, or, faster, what `pack` made of them
                once for all layers. A negative code agrees with nothing.
            positions: `(..., gaps)` integers, such as places in the sequence or times in seconds.
            terms: more terms, for instance `cosine`, or tables that several layers share.
            lengths: padded only: `(B,)` integers, tokens at or past it are neither seen nor read; what comes out for
                them means nothing.
            cu_seqlens: packed only, and needed there: `(B+1,)` int32, where each sequence starts, and T.
            max_seqlen: with `cu_seqlens`: length of the longest sequence, or more.

        Returns:
            The shape of `x`.

        Raises:
            TypeError, ValueError: an input is missing, is not what the layer was made for, or does not fit.
        """
        is_packed = cu_seqlens is not None
        check_tensor("x", x)
        dim, layout = (2, "(T, dim), as cu_seqlens is given") if is_packed else (3, "(B, S, dim), as cu_seqlens is not")
        check_dim("x", x, dim, layout)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (..., H, D)
        terms = (*self._terms(codes, positions, torch.promote_types(query.dtype, torch.float32)), *terms)
        if is_packed:
            if lengths is not None:
                raise ValueError("lengths: got a tensor, expected None with packed sequences; cu_seqlens says it all")
            attended = similarity_attention_varlen(
                query, key, value, terms, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, is_causal=self.is_causal
            )
        else:
            query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
            attended = similarity_attention(
                query, key, value, terms, is_causal=self.is_causal, query_lengths=lengths, key_lengths=lengths
            ).transpose(1, 2)
        return self.project(attended.flatten(-2))

    def _terms(self, codes: Tensor | PackedCodes | None, positions: Tensor | None, dtype: torch.dtype) -> list[Term]:
        _check_given("codes", codes, needed=bool(self.prefix or self.matches))
        _check_given("positions", positions, needed=self.gap_table is not None)
        if positions is not None:
            check_tensor("positions", positions)
            if positions.dim() == 0 or positions.shape[-1] != len(self.gap_table):
                shape, gaps = tuple(positions.shape), len(self.gap_table)
                raise ValueError(f"positions: got shape {shape}, expected (..., {gaps}), as the layer has gaps={gaps}")
        terms = []
        for kind, channels, table in (
            (prefix, self.prefix, self.prefix_table),
            (matches, self.matches, self.matches_table),
        ):
            if channels:
                left, right = (_of_modalities(codes, side, self.levels) for side in zip(*channels, strict=True))
                terms.append(kind(left, table.to(dtype), key_codes=right))
        if positions is not None:
            terms.append(gap(positions, self.gap_table.to(dtype)))
        return terms


def _table(channels: int, heads: int, buckets: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(channels, heads, buckets)) if channels else None


def _check_given(name: str, value: object, needed: bool) -> None:
    if needed and value is None:
        raise ValueError(f"{name}: got None, expected {name} to compare, as the layer has a table for them")
    if value is not None and not needed:
        raise ValueError(f"{name}: got {type(value).__name__}, expected None, as the layer has no table for them")


def _of_modalities(codes: Tensor | PackedCodes, modalities: Sequence[int], levels: int) -> Tensor | PackedCodes:
    """The codes of these modalities, in this order, with repetitions."""
    if isinstance(codes, PackedCodes):
        words = (w if w is None else torch.stack([w[..., m] for m in modalities], -1) for w in (codes.query, codes.key))
        return PackedCodes(_of_modalities(codes.codes, modalities, levels), *words, codes.bits, codes.codebook_size)
    check_tensor("codes", codes)
    if codes.dim() < 2 or codes.shape[-2] <= max(modalities):
        raise ValueError(
            f"codes: got shape {tuple(codes.shape)}, expected (..., M, L) with M above {max(modalities)}, "
            "the largest modality that a channel names"
        )
    if codes.shape[-1] != levels:
        shape = tuple(codes.shape)
        raise ValueError(f"codes: got shape {shape}, expected (..., M, {levels}), as the layer has levels={levels}")
    return torch.stack([codes[..., m, :] for m in modalities], -2)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")


def _check_rows(x: Tensor) -> None:
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected shape (..., D)")


def _sample(x: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """`(n, D)` random rows of `x (N, D)`, distinct as far as there are enough; on every rank those of rank 0."""
    if not _is_first_rank():
        rows = x.new_empty(n, x.shape[1])
    else:
        order = torch.randperm(len(x), generator=generator, device="cpu").to(x.device)
        rows = x[order[torch.arange(n, device=x.device) % len(x)]]
        if len(x) < n:
            spread = x.std(0, correction=0) if len(x) > 1 else torch.ones_like(x[0])
            rows = rows + 1e-3 * spread * torch.randn(n, x.shape[1], generator=generator, device="cpu").to(x)
    _copy_from_first_rank(rows)
    return rows


def _draw(weights: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Up to `n` different indices, drawn in proportion to `weights (N,)`; none where a weight is 0 or not finite.

    Source: Efraimidis and Spirakis 2006, Weighted random sampling with a reservoir.
    """
    weights = torch.where(weights.isfinite(), weights, 0).double()
    uniform = torch.rand(len(weights), generator=generator, dtype=torch.float64, device="cpu").to(weights.device)
    keys = uniform.log() / weights
    return keys.topk(min(n, int((weights > 0).sum()))).indices


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _is_first_rank() -> bool:
    return not _is_distributed() or distributed.get_rank() == 0


def _sum_over_ranks(*tensors: Tensor) -> None:
    if _is_distributed():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def _copy_from_first_rank(*tensors: Tensor) -> None:
    if _is_distributed():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
