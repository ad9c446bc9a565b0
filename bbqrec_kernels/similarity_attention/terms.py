"""Terms of the attention score: `prefix`, `matches`, `cosine`, `gap`. Each compares two tokens and looks up a table.

A term adds `Σ_m bias[m, h, bucket_m(i, j)]` to the score of query token `i` and key token `j` in head `h`. `m` counts
its channels. Tensors are `(B, S, M, ·)` for `similarity_attention` and `(T, M, ·)` for the varlen form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bbqrec_kernels._checks import (
    FLOATS,
    INTEGERS,
    assert_all,
    check_device,
    check_dim,
    check_dtype,
    check_int,
    check_size,
    check_tensor,
    is_on_cpu_to_look_at,
)

KINDS = ("prefix", "matches", "cosine", "gap")  # the index is the number that kernels know a kind by
MAX_CHANNELS = 8
MAX_LEVELS = 16
MAX_BUCKETS = 64


class PackedCodes(NamedTuple):
    """Codes of tokens, ready for `prefix` and `matches`: made by `pack` once a batch, used in every layer.

    Select, move and slice codes first, and pack last: the words must stay those of the codes.
    """

    codes: Tensor
    """`(..., M, L)` int64: what was packed."""
    query: Tensor | None
    """`(..., M)` int64 words for the query side, or None where the levels do not fit in 64 bits."""
    key: Tensor | None
    """The same for the key side, with another sentinel in place of negative codes, which agree with nothing."""
    bits: int
    """Width of the field of a level; level 0 is in the lowest bits."""
    codebook_size: int
    """What all codes are below."""


class Term(NamedTuple):
    """What `prefix`, `matches`, `cosine` and `gap` return: checked, and ready for the attention functions."""

    kind: str
    """The name of the function that made it."""
    bias: Tensor
    """`(M, H, n_buckets)` float32 (float64 in the reference): the table, differentiable."""
    query: Tensor
    """Codes `(..., M, L)` int64, vectors `(..., M, C)`, or positions `(..., M)` int64 of the query tokens."""
    key: Tensor
    """The same of the key tokens."""
    query_words: Tensor | None = None
    """`(..., M)` int64, the packed codes of the query tokens, or None."""
    key_words: Tensor | None = None
    """The same of the key tokens."""
    bits: int = 0
    """Of a level in the packed words; 0 where there are none."""
    boundaries: Tensor | None = None
    """`(n_buckets-1,)` ascending, of `cosine` only."""


def prefix(
    codes: Tensor | PackedCodes,
    bias: Tensor,
    *,
    key_codes: Tensor | PackedCodes | None = None,
    codebook_size: int | None = None,
) -> Term:
    """Buckets by the number of leading levels that agree: 0 to L.

    Args:
        codes: `(..., M, L)` integers, or what `pack` made of them. A negative code agrees with nothing.
        bias: `(M, H, L+1)` float32, learnable. `-inf` forbids a bucket.
        key_codes: codes of the key tokens, where they are not those of the query tokens: other tokens, or other
            modalities (text of one item against image of another).
        codebook_size: what all codes are below. It allows comparing whole words instead of levels.

    Raises:
        TypeError: a wrong dtype or kind of object.
        ValueError: shapes that do not fit, more than 8 channels or 16 levels, or a code not below `codebook_size`.
    """
    return _code_term("prefix", codes, bias, key_codes, codebook_size)


def matches(
    codes: Tensor | PackedCodes,
    bias: Tensor,
    *,
    key_codes: Tensor | PackedCodes | None = None,
    codebook_size: int | None = None,
) -> Term:
    """Buckets by the number of levels that agree, wherever they are: 0 to L. All else is as in `prefix`."""
    return _code_term("matches", codes, bias, key_codes, codebook_size)


def cosine(
    vectors: Tensor, bias: Tensor, *, key_vectors: Tensor | None = None, boundaries: Tensor | None = None
) -> Term:
    """Buckets by the similarity of two vectors: `searchsorted(boundaries, s_i · s_j, right=True)`.

    Args:
        vectors: `(..., M, C)` float32, bfloat16 or float16, of unit length by the caller's care. Not differentiated.
        bias: `(M, H, n_buckets)` float32, learnable.
        key_vectors: vectors of the key tokens, where they are not those of the query tokens.
        boundaries: `(n_buckets-1,)` ascending; uniform on [-1, 1] by default (without the two ends).

    A similarity of NaN makes the score NaN.

    Raises:
        TypeError, ValueError: as in `prefix`; also boundaries that do not ascend.
    """
    check_tensor("vectors", vectors)
    key_vectors = vectors if key_vectors is None else key_vectors
    check_tensor("key_vectors", key_vectors)
    buckets = _check_bias(bias, vectors, "vectors (..., M, C)", channel_dim=-2)
    for name, tensor in (("vectors", vectors), ("key_vectors", key_vectors)):
        check_dtype(name, tensor, (*FLOATS, torch.float64))
    check_device("key_vectors", key_vectors, "vectors", vectors)
    check_dim("key_vectors", key_vectors, vectors.dim(), "like vectors")
    check_size("key_vectors", key_vectors, -2, vectors.shape[-2], "channels of vectors")
    check_size("key_vectors", key_vectors, -1, vectors.shape[-1], "width of vectors")
    if boundaries is None:
        boundaries = torch.linspace(-1, 1, buckets + 1, device=bias.device, dtype=bias.dtype)[1:-1]
    check_tensor("boundaries", boundaries)
    check_dim("boundaries", boundaries, 1, "(n_buckets-1,)")
    check_size("boundaries", boundaries, 0, buckets - 1, "n_buckets of bias, less one")
    check_device("boundaries", boundaries, "bias", bias)
    check_dtype("boundaries", boundaries, (torch.float32, torch.float64))
    if is_on_cpu_to_look_at(boundaries) and not bool(
        (boundaries[1:] >= boundaries[:-1]).all() & ~boundaries.isnan().any()
    ):
        raise ValueError(f"boundaries: got {boundaries.tolist()}, expected values that ascend; sort them")
    width = torch.promote_types(bias.dtype, torch.float32)
    return Term(
        "cosine",
        bias,
        vectors.detach().to(width),
        key_vectors.detach().to(width),
        boundaries=boundaries.detach().to(width).contiguous(),
    )


def gap(positions: Tensor, bias: Tensor, *, key_positions: Tensor | None = None) -> Term:
    """Buckets by the distance of two positions or times: `min(bit_length(|a_i - a_j|), n_buckets - 1)`.

    0 → 0, 1 → 1, 2–3 → 2, 4–7 → 3, ...: the relative position and time bias of T5 and HSTU, in integer arithmetic.

    Args:
        positions: `(..., M)` integers.
        bias: `(M, H, n_buckets)` float32, learnable.
        key_positions: positions of the key tokens, where they are not those of the query tokens.

    Raises:
        TypeError, ValueError: as in `prefix`.
    """
    check_tensor("positions", positions)
    key_positions = positions if key_positions is None else key_positions
    check_tensor("key_positions", key_positions)
    _check_bias(bias, positions, "positions (..., M)", channel_dim=-1)
    for name, tensor in (("positions", positions), ("key_positions", key_positions)):
        check_dtype(name, tensor, INTEGERS)
    check_device("key_positions", key_positions, "positions", positions)
    check_dim("key_positions", key_positions, positions.dim(), "like positions")
    check_size("key_positions", key_positions, -1, positions.shape[-1], "channels of positions")
    return Term("gap", bias, positions.long(), key_positions.long())


def pack(codes: Tensor, codebook_size: int) -> PackedCodes:
    """Packs the levels of each code into one 64-bit word, in fields of `⌈log2(codebook_size + 2)⌉` bits.

    Args:
        codes: `(..., M, L)` integers below `codebook_size`; negative ones agree with nothing.
        codebook_size: codewords per level.

    Returns:
        `PackedCodes`, for `prefix` and `matches` as `codes` and as `key_codes`. Where the levels do not fit in 64
        bits it holds no words, and level by level is compared instead.

    Raises:
        TypeError: codes are no integer tensor.
        ValueError: a code is not below `codebook_size` (on CUDA and in compiled code: an assertion; torch.func
            transforms do not look).
    """
    return _pack("codes", codes, codebook_size)


def _pack(name: str, codes: Tensor, codebook_size: int) -> PackedCodes:
    _check_codes(name, codes)
    check_int("codebook_size", codebook_size)
    if not 1 <= codebook_size < 2**62:
        raise ValueError(f"codebook_size: got {codebook_size}, expected at least 1 and less than 2**62")
    codes = codes.long()
    if is_on_cpu_to_look_at(codes):
        if codes.numel() and (largest := int(codes.max())) >= codebook_size:
            raise ValueError(f"{name}: got {largest}, expected codes below codebook_size={codebook_size}")
    else:  # where the number of tokens is data, as in torch.export, it cannot be asked for
        assert_all(codes < codebook_size, f"{name}: expected all codes below codebook_size")
    levels = codes.shape[-1]
    bits = (codebook_size + 1).bit_length()
    if bits * levels > 64:
        return PackedCodes(codes, None, None, 0, codebook_size)
    shifts = torch.arange(levels, device=codes.device) * bits

    def word(sentinel: int) -> Tensor:  # fields do not overlap, so their sum is their union
        return (torch.where(codes < 0, sentinel, codes) << shifts).sum(-1)

    return PackedCodes(codes, word(codebook_size), word(codebook_size + 1), bits, codebook_size)


def _code_term(
    kind: str,
    codes: Tensor | PackedCodes,
    bias: Tensor,
    key_codes: Tensor | PackedCodes | None,
    codebook_size: int | None,
) -> Term:
    query = _as_packed("codes", codes, codebook_size)
    key = query if key_codes is None else _as_packed("key_codes", key_codes, codebook_size)
    buckets = _check_bias(bias, query.codes, "codes (..., M, L)", channel_dim=-2)
    levels = query.codes.shape[-1]
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"codes: got {levels} levels, expected 1 to {MAX_LEVELS}")
    if buckets != levels + 1:
        raise ValueError(f"bias: got {buckets} buckets, expected {levels + 1} for codes of {levels} levels")
    check_device("key_codes", key.codes, "codes", query.codes)
    check_size("key_codes", key.codes, -2, query.codes.shape[-2], "channels of codes")
    check_size("key_codes", key.codes, -1, levels, "levels of codes")
    if query.codebook_size != key.codebook_size:
        raise ValueError(
            f"key_codes: got codes packed for codebook_size={key.codebook_size}, expected "
            f"{query.codebook_size} like codes (0 is for codes that are not packed); pack both alike"
        )
    return Term(kind, bias, query.codes, key.codes, query.query, key.key, query.bits)


def _as_packed(name: str, codes: Tensor | PackedCodes, codebook_size: int | None) -> PackedCodes:
    if isinstance(codes, PackedCodes):
        if codebook_size not in (None, codes.codebook_size):
            raise ValueError(
                f"codebook_size: got {codebook_size}, but {name} were packed for {codes.codebook_size}; give neither"
            )
        return codes
    if codebook_size is not None:
        return _pack(name, codes, codebook_size)
    _check_codes(name, codes)
    return PackedCodes(codes.long(), None, None, 0, 0)


def _check_codes(name: str, codes: Tensor) -> None:
    check_tensor(name, codes)
    check_dtype(name, codes, INTEGERS)
    if codes.dim() < 2:
        raise ValueError(f"{name}: got shape {tuple(codes.shape)}, expected (..., M, L)")


def _check_bias(bias: Tensor, compared: Tensor, layout: str, channel_dim: int) -> int:
    """Checks the table against what it is looked up with, and returns its number of buckets."""
    check_tensor("bias", bias)
    check_dtype("bias", bias, (torch.float32, torch.float64))
    check_dim("bias", bias, 3, "(M, H, n_buckets)")
    check_device("bias", bias, layout.partition(" ")[0], compared)
    if compared.dim() < 1 - channel_dim:
        raise ValueError(f"{layout.partition(' ')[0]}: got shape {tuple(compared.shape)}, expected {layout}")
    if bias.shape[0] != compared.shape[channel_dim]:
        raise ValueError(
            f"bias: got {bias.shape[0]} channels, expected {compared.shape[channel_dim]} like {layout} "
            f"of shape {tuple(compared.shape)}"
        )
    if not 1 <= bias.shape[2] <= MAX_BUCKETS:
        raise ValueError(f"bias: got {bias.shape[2]} buckets, expected 1 to {MAX_BUCKETS}")
    return bias.shape[2]
