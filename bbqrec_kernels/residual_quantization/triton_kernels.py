"""Triton kernels and their launchers. README.md, section "Triton", derives the filter's bound and the cost.

`quantize` walks all levels of a block of rows with the residual in registers: tensor cores score every codeword in
float16, and what a proven bound cannot tell apart is compared again by distances in float32. Sums over the rows that
share a codeword go through rows sorted by code: no atomics, and a fixed order of additions.

Nothing but `_launch` knows whether a GPU or Triton's interpreter runs a kernel.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bbqrec_kernels._checks import FLOATS, is_on_cpu_to_look_at
from bbqrec_kernels.residual_quantization.reference import check_range

# A product and a sum are never fused unless the code says fma: a distance is the same in every kernel and version.
# `debug` compiles the assertions on codes in; overflow checks of integers would come with it.
OPTIONS = {"enable_fp_fusion": False, "debug": True, "sanitize_overflow": False}

WIDEST_ON_CHIP = 512  # D up to which the residuals of a block of rows stay in registers
_CHUNK = 512  # sorted rows of one program of the segment sums, and of one partial sum

# No score of a finite row comes near it, and it keeps its order when its low bits are overwritten.
_NEVER = tl.constexpr(1e38)
_INF_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


# ---- bits of a float32 -------------------------------------------------------------------------------------------


@triton.jit
def _not(condition):
    return condition == 0  # the interpreter's `~` gives no boolean


@triton.jit
def _magnitude_bits(value):
    """Bits of |value|: ordered like magnitudes, and NaN and infinity are the largest."""
    return value.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def _power_of_two(exponent):
    """2^exponent, -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale(exponent):
    """The power of two that takes numbers with this biased exponent (>= 14) to [2^14, 2^15), where float16 ends."""
    return _power_of_two(141 - exponent)


# ---- codebooks in float16, their norms, and how far float16 is from them -----------------------------------------


@triton.jit
def _range_kernel(
    codebooks,  # (L, K, D) float32
    ranges,  # (3, L) int32 of zeros; row 0: bits of the largest magnitude
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    level, k = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    d = tl.arange(0, BLOCK_WIDTH)
    inside = (k < SIZE)[:, None] & (d < WIDTH)[None, :]
    word = tl.load(codebooks + (level * SIZE + k)[:, None] * WIDTH + d[None, :], inside, 0.0)
    tl.atomic_max(ranges + level, tl.max(tl.max(_magnitude_bits(word), 1), 0))


@triton.jit
def _prepare_kernel(
    codebooks,  # (L, K, D) float32
    ranges,  # (3, L) int32; row 0 from _range_kernel; rows 1 and 2: bits of max ‖c'‖ and max ‖c' - c16‖
    words,  # (L, PADDED_SIZE, BLOCK_WIDTH) float16: c16, zeros past the last codeword and element
    half_norms,  # (L, PADDED_SIZE) float32: ‖c'‖² / 2
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    level, k = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    d = tl.arange(0, BLOCK_WIDTH)
    inside = (k < SIZE)[:, None] & (d < WIDTH)[None, :]
    exponent = tl.maximum(tl.load(ranges + level) >> 23, 14)
    word = tl.load(codebooks + (level * SIZE + k)[:, None] * WIDTH + d[None, :], inside, 0.0) * _scale(exponent)
    rounded = word.to(tl.float16)
    wide = word.to(tl.float64)  # where the square of a float32 is exact
    rest = (word - rounded.to(tl.float32)).to(tl.float64)
    norm = tl.sum(wide * wide, 1)
    row = level * PADDED_SIZE + k
    tl.store(words + row[:, None] * BLOCK_WIDTH + d[None, :], rounded, mask=(k < PADDED_SIZE)[:, None])
    tl.store(half_norms + row, (0.5 * norm).to(tl.float32), mask=k < PADDED_SIZE)
    longest = tl.sqrt(tl.max(norm, 0)).to(tl.float32) * 1.001  # rounded up
    farthest = tl.sqrt(tl.max(tl.sum(rest * rest, 1), 0)).to(tl.float32) * 1.001
    tl.atomic_max(ranges + LEVELS + level, _magnitude_bits(longest))
    tl.atomic_max(ranges + 2 * LEVELS + level, _magnitude_bits(farthest))


# ---- quantize ----------------------------------------------------------------------------------------------------


@triton.jit
def _nearest_by_distance(
    row, codebook, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """The code of the codeword nearest to one row `(BLOCK_WIDTH,)`, by sums of squared differences in float32."""
    d = tl.arange(0, BLOCK_WIDTH)
    best = float("inf")
    code = 0
    for start in range(0, SIZE, BLOCK_SIZE):
        k = start + tl.arange(0, BLOCK_SIZE)
        inside = (k < SIZE)[:, None] & (d < WIDTH)[None, :]
        word = tl.load(codebook + k.to(tl.int64)[:, None] * WIDTH + d[None, :], inside, 0.0)
        difference = row[None, :] - word
        distance = tl.where(k < SIZE, tl.sum(difference * difference, 1), float("inf"))
        least, at = tl.min(distance, 0, return_indices=True)
        code = tl.where(least < best, start + at, code)  # not for a tie: the lowest index stays
        best = tl.minimum(least, best)
    return code


@triton.jit
def _rounded_rows(residual, norm, ranges, LEVELS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows in float16, the factor of the half norms in their scores, and how far a score may be from exact arithmetic.

    `norm` is ‖r‖², and `ranges` that of _prepare_kernel at the level.
    """
    # Scaled by powers of two, so that a row is shorter than 2^15. One that is much shorter than the codewords is scaled
    # like 2^-60 of them; what overflows float16 makes the bound infinite, and all distances are compared.
    word_exponent = tl.maximum(tl.load(ranges) >> 23, 14)
    row_exponent = ((_magnitude_bits(norm) >> 23) - 125 >> 1) + 126
    row_exponent = tl.maximum(row_exponent, word_exponent - 60)
    row_scale = _scale(row_exponent)
    scaled = residual * row_scale[:, None]
    rounded = scaled.to(tl.float16)
    # A score is in units of both scales: ‖c‖²/2 - r·c = norm_factor ‖c'‖²/2 - r'·c'.
    norm_factor = _power_of_two(tl.maximum(word_exponent - row_exponent, -126))

    rest = scaled - rounded.to(tl.float32)  # exact
    rest_norm = tl.sqrt(tl.sum(rest * rest, 1))
    row_norm = tl.sqrt(tl.maximum(norm, 2.0**-126)) * row_scale * 1.001 + rest_norm
    word_norm = tl.load(ranges + LEVELS).to(tl.float32, bitcast=True)
    word_rest = tl.load(ranges + 2 * LEVELS).to(tl.float32, bitcast=True)
    slack = rest_norm * word_norm + row_norm * word_rest
    slack += row_norm * (word_norm + word_rest) * ((WIDTH + 2) * 2.0**-22)
    slack += norm_factor * word_norm * word_norm * 2.0**-23
    return rounded, norm_factor, slack * 1.01 + 2.0**-60


@triton.jit
def _least_two_and_rest(
    rounded,  # [ROWS, WIDTH] float16: r16
    norm_factor,  # [ROWS]
    words,  # (SECTION, BLOCK_WIDTH) float16: c16 of a section of the codebook
    half_norms,  # (SECTION,) float32
    count,  # codewords from here to the end of the codebook
    SECTION: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the section may go past the end of the codebook
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    COLUMN_BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """For each row the least two scores, and the least of all others. The low INDEX_BITS of a score are its code.

    For each column of a tile, the least two of all tiles are kept: elementwise, no reduction inside the loop. The
    second of a column counts among the others, even if it is the second of all.
    """
    d, column = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_SIZE)
    first = tl.full([BLOCK_ROWS, BLOCK_SIZE], _NEVER, tl.float32)
    second = first
    tile_words = words + column[None, :] * BLOCK_WIDTH + d[:, None]  # [WIDTH, SIZE]
    tile_norms = half_norms + column
    for tile in tl.range(0, SECTION // BLOCK_SIZE, num_stages=STAGES):
        dot = tl.dot(rounded, tl.load(tile_words))
        score = tl.fma(tl.load(tile_norms)[None, :], norm_factor[:, None], -dot)
        bits = (score.to(tl.int32, bitcast=True) & (-1 - ((1 << INDEX_BITS) - 1))) | (tile << COLUMN_BITS)
        score = bits.to(tl.float32, bitcast=True)
        if RAGGED:
            score = tl.where((tile * BLOCK_SIZE + column < count)[None, :], score, _NEVER)
        second = tl.minimum(second, tl.maximum(first, score))
        first = tl.minimum(first, score)
        tile_words += BLOCK_SIZE * BLOCK_WIDTH
        tile_norms += BLOCK_SIZE
    if RAGGED:
        first = tl.where(
            first < _NEVER, (first.to(tl.int32, bitcast=True) | column[None, :]).to(tl.float32, bitcast=True), first
        )
    else:
        first = (first.to(tl.int32, bitcast=True) | column[None, :]).to(tl.float32, bitcast=True)
    best = tl.min(first, 1)
    first = tl.where(first == best[:, None], _NEVER, first)  # no other score has its low bits
    next_best = tl.min(first, 1)
    first = tl.where(first == next_best[:, None], _NEVER, first)
    return best, next_best, tl.min(tl.minimum(first, second), 1)


@triton.jit
def _step(residual, code, next_code, two, codebook, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """What a level leaves of the rows, its squared norm, and the code. -1 leaves them as they are.

    Where `two` codes may be the nearest, both distances are compared in float32: the least is that squared norm.
    """
    d = tl.arange(0, BLOCK_WIDTH)
    mask = (code >= 0)[:, None] & (d < WIDTH)[None, :]
    rest = residual - tl.load(codebook + code.to(tl.int64)[:, None] * WIDTH + d[None, :], mask, 0.0)
    norm = tl.sum(rest * rest, 1)
    if tl.max(two.to(tl.int32), 0) > 0:
        mask = two[:, None] & (d < WIDTH)[None, :]
        next_rest = residual - tl.load(codebook + next_code.to(tl.int64)[:, None] * WIDTH + d[None, :], mask, 0.0)
        next_norm = tl.sum(next_rest * next_rest, 1)
        closer = two & ((next_norm < norm) | ((next_norm == norm) & (next_code < code)))
        code, norm = tl.where(closer, next_code, code), tl.where(closer, next_norm, norm)
        rest = tl.where(closer[:, None], next_rest, rest)
    return rest, norm, code


@triton.jit(do_not_specialize=["rows"])
def _quantize_kernel(
    x,  # (N, D)
    codebooks,  # (L, K, D) float32
    words,  # (L, PADDED_SIZE, BLOCK_WIDTH) float16
    half_norms,  # (L, PADDED_SIZE) float32
    ranges,  # (3, L) int32
    quantized,  # (N, D), dtype of x
    codes,  # (N, L) int64
    partials,  # (programs, L) float32: sums of ‖r_{l+1}‖², NaN where a row is bad
    rows,  # N
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    SECTION: tl.constexpr,
    COLUMN_BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_LEVELS: tl.constexpr,
    SEARCH_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    index = tl.arange(0, BLOCK_ROWS)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + index
    d, levels = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_LEVELS)
    inside = (row < rows)[:, None] & (d < WIDTH)[None, :]
    residual = tl.load(x + row[:, None] * WIDTH + d[None, :], inside, 0.0).to(tl.float32)  # [ROWS, WIDTH]
    codebook, level_words, level_norms = codebooks, words, half_norms
    wrong_codebook = tl.max(tl.load(ranges + levels, levels < LEVELS, 0), 0) >= _INF_BITS
    bad = (index < 0) | wrong_codebook
    found = tl.zeros([BLOCK_ROWS, BLOCK_LEVELS], tl.int32)
    losses = tl.zeros([BLOCK_LEVELS], tl.float32)
    # What the search of a level found: a code, and another one that may be as near. Before the first: none.
    code = tl.full([BLOCK_ROWS], -1, tl.int32)
    next_code, two = code, index < 0
    for level in range(LEVELS):
        # The step of the level before comes here, not after its search: Triton then keeps rows in one layout only.
        residual, norm, code = _step(residual, code, next_code, two, codebook - SIZE * WIDTH, WIDTH, BLOCK_WIDTH)
        if level > 0:
            bad = bad | _not(norm < float("inf"))
        found = tl.where((levels == level - 1)[None, :], code[:, None], found)
        losses = tl.where(levels == level - 1, tl.sum(tl.where(row < rows, norm, 0.0), 0), losses)

        rounded, norm_factor, slack = _rounded_rows(residual, norm, ranges + level, LEVELS, WIDTH)
        best = tl.full([BLOCK_ROWS], _NEVER, tl.float32)
        next_best, other = best, best
        code = tl.zeros([BLOCK_ROWS], tl.int32)
        next_code = code
        for start in range(0, PADDED_SIZE, SECTION):
            first, second, third = _least_two_and_rest(
                rounded,
                norm_factor,
                level_words,
                level_norms,
                SIZE - start,
                SECTION,
                SIZE % SECTION != 0,
                BLOCK_ROWS,
                BLOCK_SIZE,
                BLOCK_WIDTH,
                COLUMN_BITS,
                INDEX_BITS,
                STAGES,
            )
            CODE_MASK: tl.constexpr = (1 << INDEX_BITS) - 1
            first_code = start + (first.to(tl.int32, bitcast=True) & CODE_MASK)
            second_code = start + (second.to(tl.int32, bitcast=True) & CODE_MASK)
            # Two sorted pairs into one: the larger of the firsts and the smaller of the seconds meet for second place.
            middle, middle_code = tl.maximum(first, best), tl.where(first < best, code, first_code)
            code, best = tl.where(first < best, first_code, code), tl.minimum(first, best)
            lower, lower_code = tl.minimum(second, next_best), tl.where(second < next_best, second_code, next_code)
            other = tl.minimum(tl.minimum(other, third), tl.maximum(second, next_best))
            next_code, next_best = tl.where(lower < middle, lower_code, middle_code), tl.minimum(lower, middle)
            other = tl.minimum(other, tl.maximum(lower, middle))
            level_words += SECTION * BLOCK_WIDTH
            level_norms += SECTION
        code, next_code = tl.minimum(code, SIZE - 1), tl.minimum(next_code, SIZE - 1)  # of NaN

        STEP: tl.constexpr = 2.0 ** (INDEX_BITS - 23) * 1.01  # of a score: what the low bits can change
        searched = (norm == norm) & (row < rows) & _not(bad)
        two = searched & _not(next_best - best > 2 * slack + STEP * (tl.abs(best) + tl.abs(next_best)))
        many = searched & _not(other - best > 2 * slack + STEP * (tl.abs(best) + tl.abs(other)))

        # Rows with more than two candidates, one by one: all distances. The residual is built again, by the same
        # subtractions: taken out of the tile, it would have Triton keep the tile in a second layout.
        remaining = many.to(tl.int32)
        while tl.max(remaining, 0) > 0:
            at = tl.argmax(remaining, 0)
            this = index == at
            place = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + at) * WIDTH + d
            vector = tl.load(x + place, d < WIDTH, 0.0).to(tl.float32)  # [WIDTH]
            for before in range(level):
                chosen = tl.sum(tl.sum(tl.where(this[:, None] & (levels == before)[None, :], found, 0), 1), 0)
                at_word = (chosen + tl.cast(before, tl.int64) * SIZE) * WIDTH + d
                vector -= tl.load(codebooks + at_word, d < WIDTH, 0.0)
            nearest = _nearest_by_distance(vector, codebook, SIZE, WIDTH, SEARCH_SIZE, BLOCK_WIDTH)
            code = tl.where(this, nearest, code)
            remaining = tl.where(this, 0, remaining)

        two = two & _not(many)
        codebook += SIZE * WIDTH

    residual, norm, code = _step(residual, code, next_code, two, codebook - SIZE * WIDTH, WIDTH, BLOCK_WIDTH)
    bad = bad | _not(norm < float("inf"))
    found = tl.where((levels == LEVELS - 1)[None, :], code[:, None], found)
    losses = tl.where(levels == LEVELS - 1, tl.sum(tl.where(row < rows, norm, 0.0), 0), losses)
    found = tl.where(bad[:, None], -1, found)
    written = (row < rows)[:, None] & (levels < LEVELS)[None, :]
    tl.store(codes + row[:, None] * LEVELS + levels[None, :], found.to(tl.int64), written)
    any_bad = tl.max((bad & (row < rows)).to(tl.int32), 0) > 0
    losses = tl.where(any_bad, float("nan"), losses)
    tl.store(partials + tl.program_id(0).to(tl.int64) * LEVELS + levels, losses, levels < LEVELS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for level in range(LEVELS):
        code = tl.sum(tl.where((levels == level)[None, :], found, 0), 1)
        mask = (code >= 0)[:, None] & (d < WIDTH)[None, :]
        total += tl.load(codebooks + code.to(tl.int64)[:, None] * WIDTH + d[None, :], mask, 0.0)
        codebooks += SIZE * WIDTH
    total = tl.where(bad[:, None], float("nan"), total)
    tl.store(quantized + row[:, None] * WIDTH + d[None, :], total.to(quantized.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["programs", "elements"])
def _losses_kernel(
    partials,  # (programs, L) float32
    commitment_loss,  # (L,) float32
    codebook_loss,  # (L,) float32
    programs,
    elements,  # N·D
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    level, at = tl.program_id(0), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        total += tl.load(partials + (start + at).to(tl.int64) * LEVELS + level, start + at < programs, 0.0).to(
            tl.float64
        )
    mean = (tl.sum(total, 0) / elements.to(tl.float64)).to(tl.float32)
    tl.store(commitment_loss + level, mean)
    tl.store(codebook_loss + level, mean)


@triton.jit(do_not_specialize=["rows"])
def _wide_level_kernel(
    source,  # (N, D): x, or the residuals of the level before
    codebook,  # (K, D) float32, of this level
    residuals,  # (N, D) float32
    codes,  # (N,) int64
    norms,  # (N,) float32: ‖r_{l+1}‖²
    rows,  # N
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One level of rows too wide for registers: all distances in float32, the residual in memory."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column, d = tl.arange(0, BLOCK_SIZE), tl.arange(0, BLOCK_WIDTH)
    best = tl.full([BLOCK_ROWS], float("inf"), tl.float32)
    code = tl.zeros([BLOCK_ROWS], tl.int32)
    for tile in range(0, SIZE, BLOCK_SIZE):
        k = tile + column
        distance = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
        for start in range(0, WIDTH, BLOCK_WIDTH):
            in_width = start + d < WIDTH
            value = tl.load(
                source + row[:, None] * WIDTH + (start + d)[None, :], (row < rows)[:, None] & in_width[None, :], 0.0
            ).to(tl.float32)
            word = tl.load(
                codebook + k.to(tl.int64)[:, None] * WIDTH + (start + d)[None, :],
                (k < SIZE)[:, None] & in_width[None, :],
                0.0,
            )
            difference = value[:, None, :] - word[None, :, :]
            distance += tl.sum(difference * difference, 2)
        comparable = (k < SIZE)[None, :] & (distance == distance)  # of a NaN row, nothing is: it keeps code 0
        distance = tl.where(comparable, distance, float("inf"))
        least, at = tl.min(distance, 1, return_indices=True)
        code = tl.where(least < best, tile + at, code)
        best = tl.minimum(least, best)
    norm = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        in_width = (start + d < WIDTH)[None, :]
        inside = (row < rows)[:, None] & in_width
        at = row[:, None] * WIDTH + (start + d)[None, :]
        word = tl.load(codebook + code.to(tl.int64)[:, None] * WIDTH + (start + d)[None, :], in_width, 0.0)
        rest = tl.load(source + at, inside, 0.0).to(tl.float32) - word
        tl.store(residuals + at, rest, inside)
        norm += tl.sum(rest * rest, 1)
    tl.store(codes + row, code.to(tl.int64), row < rows)
    tl.store(norms + row, norm, row < rows)


# ---- one pass over the rows: decode, and the gradient of x --------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _decode_kernel(
    codes,  # (N, L) int64
    codebooks,  # (L, K, D) float32
    decoded,  # (N, D) float32
    rows,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for level in range(LEVELS):
        code = tl.load(codes + row * LEVELS + level, row < rows, -1)
        tl.device_assert((code >= -1) & (code < SIZE), "codes: expected -1 to codebook_size - 1")
        mask = ((code >= 0) & (code < SIZE))[:, None] & (d < WIDTH)[None, :]
        total += tl.load(codebooks + code[:, None] * WIDTH + d[None, :], mask, 0.0)
        codebooks += SIZE * WIDTH
    tl.store(decoded + row[:, None] * WIDTH + d[None, :], total, (row < rows)[:, None] & (d < WIDTH)[None, :])


@triton.jit
def _loss_scale(upstream, level, elements):
    """2·upstream[level] / (N·D), rounded once."""
    return (2.0 * tl.load(upstream + level).to(tl.float64) / elements.to(tl.float64)).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "elements"])
def _grad_x_kernel(
    x,  # (N, D)
    codes,  # (N, L) int64
    codebooks,  # (L, K, D) float32
    grad_quantized,  # (N, D), dtype of x; unused without HAS_QUANTIZED
    grad_commitment_loss,  # (L,) float32; unused without HAS_COMMITMENT
    grad_x,  # (N, D), dtype of x
    rows,
    elements,  # N·D
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_QUANTIZED: tl.constexpr,
    HAS_COMMITMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (d < WIDTH)[None, :]
    at = row[:, None] * WIDTH + d[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    if HAS_QUANTIZED:
        total = tl.load(grad_quantized + at, inside, 0.0).to(tl.float32)
    if HAS_COMMITMENT:
        residual = tl.load(x + at, inside, 0.0).to(tl.float32)
        for level in range(LEVELS):
            code = tl.load(codes + row * LEVELS + level, row < rows, -1)
            tl.device_assert((code >= -1) & (code < SIZE), "codes: expected -1 to codebook_size - 1")
            valid = (code >= 0) & (code < SIZE)
            mask = valid[:, None] & (d < WIDTH)[None, :]
            residual -= tl.load(codebooks + code[:, None] * WIDTH + d[None, :], mask, 0.0)
            scale = _loss_scale(grad_commitment_loss, level, elements)
            total += tl.where(valid[:, None], scale * residual, 0.0)
            codebooks += SIZE * WIDTH
    bad = tl.load(codes + row * LEVELS, row < rows, 0) < 0
    total = tl.where(bad[:, None], float("nan"), total)
    tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), inside)


# ---- sums over the rows that share a codeword ---------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _keys_kernel(codes, keys, rows, SIZE: tl.constexpr, LEVELS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Codes `(N, L)` int64 as sort keys `(L, N)` of a small type; a wrong code asserts, and counts as -1."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for level in range(LEVELS):
        code = tl.load(codes + row * LEVELS + level, row < rows, -1)
        tl.device_assert((code >= -1) & (code < SIZE), "codes: expected -1 to codebook_size - 1")
        code = tl.where((code >= 0) & (code < SIZE), code, -1)
        tl.store(keys + row, code.to(keys.dtype.element_ty), row < rows)
        keys += rows


@triton.jit(do_not_specialize=["rows", "elements"])
def _segment_sums_kernel(
    values,  # (N, D)
    codes,  # (N, L) int64
    codebooks,  # (L, K, D) float32
    keys,  # (L, N) integers, sorted
    order,  # (L, N) int64: the row of each key
    offsets,  # (L, K + 1) int64: where the keys of each code start
    upstream,  # (L,) float32: gradient of the codebook loss; unused unless OF == "rest"
    sums,  # (L, K, D) float32: segments that lie in one chunk
    edges,  # (L, chunks, 2, D) float32: sums of what began before the chunk, and of what goes on after it
    rows,  # N
    elements,  # N·D
    OF: tl.constexpr,  # what is summed: "value" itself, "residual" r_l, or "rest" r_{l+1} scaled as gradient
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    chunk, level = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(2) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = d < WIDTH
    keys += level * rows
    order += level * rows
    offsets += level * (SIZE + 1)
    sums += level * SIZE * WIDTH
    edges += (level * tl.num_programs(0) + chunk) * 2 * WIDTH
    own_words = codebooks + level * SIZE * WIDTH
    chunk_start = chunk * CHUNK
    chunk_end = tl.minimum(chunk_start + CHUNK, rows)
    start = tl.maximum(chunk_start, tl.load(offsets))  # keys of -1 come first, and are in no segment
    while start < chunk_end:
        code = tl.load(keys + start).to(tl.int64)
        segment_start, segment_end = tl.load(offsets + code), tl.load(offsets + code + 1)
        end = tl.minimum(segment_end, chunk_end)
        total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
        for position in range(start, end, BLOCK_ROWS):
            at = position + index
            row = tl.load(order + at, at < end, 0)
            inside = (at < end)[:, None] & in_width[None, :]
            value = tl.load(values + row[:, None] * WIDTH + d[None, :], inside, 0.0).to(tl.float32)
            if OF != "value":
                words = codebooks
                for before in range(level):
                    chosen = tl.load(codes + row * LEVELS + before, at < end, -1)
                    mask = ((chosen >= 0) & (chosen < SIZE))[:, None] & in_width[None, :]
                    value -= tl.load(words + chosen[:, None] * WIDTH + d[None, :], mask, 0.0)
                    words += SIZE * WIDTH
            if OF == "rest":
                word = tl.load(own_words + code * WIDTH + d, in_width, 0.0)
                value = tl.where(inside, value - word[None, :], 0.0)
            total += value
        result = tl.sum(total, 0)
        if OF == "rest":
            result = -_loss_scale(upstream, level, elements) * result
        if segment_start < chunk_start:
            tl.store(edges + d, result, in_width)
        elif segment_end > chunk_end:
            tl.store(edges + WIDTH + d, result, in_width)
        else:
            tl.store(sums + code * WIDTH + d, result, in_width)
        start = end


@triton.jit(do_not_specialize=["chunks"])
def _join_segments_kernel(
    offsets,  # (L, K + 1) int64
    edges,  # (L, chunks, 2, D) float32
    counts,  # (L, K) float32; unused without COUNT
    sums,  # (L, K, D) float32
    chunks,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Adds up the segments that lie in several chunks, and writes zeros for codes without rows."""
    code, level = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = d < WIDTH
    start, end = tl.load(offsets + level * (SIZE + 1) + code), tl.load(offsets + level * (SIZE + 1) + code + 1)
    first, last = start // CHUNK, (end - 1) // CHUNK
    sums += (level * SIZE + code) * WIDTH + d
    edges += level * chunks * 2 * WIDTH
    if COUNT:
        tl.store(counts + level * SIZE + code, (end - start).to(tl.float32))
    if start == end:
        tl.store(sums, tl.zeros([BLOCK_WIDTH], tl.float32), in_width)
    elif first < last:
        total = tl.zeros([BLOCK_CHUNKS, BLOCK_WIDTH], tl.float32)
        for begin in range(first + 1, last + 1, BLOCK_CHUNKS):
            chunk = begin + tl.arange(0, BLOCK_CHUNKS)
            mask = (chunk <= last)[:, None] & in_width[None, :]
            total += tl.load(edges + chunk[:, None] * 2 * WIDTH + d[None, :], mask, 0.0)
        opening = tl.load(edges + (first * 2 + 1) * WIDTH + d, in_width, 0.0)
        tl.store(sums, opening + tl.sum(total, 0), in_width)


# ---- launchers: the implementations of the operators `<op>_triton` ------------------------------------------------


def quantize_constants(levels: int, size: int, width: int, shared_bytes: int) -> dict[str, int]:
    """Compile-time constants and launch options of `_quantize_kernel`: a function of the shapes and the device alone.

    `shared_bytes`: of shared memory, that a block of the device may have. Nothing is tuned at run time: another tile
    could add a distance up in another order, and the same call would not give the same codes twice.
    """
    block_width = max(16, _power_of_two_from(width))
    tiles = _TILES if shared_bytes >= _SHARED_BYTES else _TILES | _SMALL_TILES
    rows, tile, warps, stages = tiles[max(64, block_width)]
    section = min(_SECTION, max(tile, _power_of_two_from(size)))  # a score's low bits are the code within a section
    return {
        "SIZE": size,
        "WIDTH": width,
        "LEVELS": levels,
        "PADDED_SIZE": -(-size // section) * section,
        "SECTION": section,
        "COLUMN_BITS": tile.bit_length() - 1,
        "INDEX_BITS": section.bit_length() - 1,
        "BLOCK_ROWS": rows,
        "BLOCK_SIZE": tile,
        "BLOCK_WIDTH": block_width,
        "BLOCK_LEVELS": _power_of_two_from(levels),
        "SEARCH_SIZE": max(1, 2048 // block_width),
        "STAGES": stages,
        "num_warps": warps,
        "num_stages": stages,
    }


_SECTION = 1024  # codewords that are told apart by 10 of a score's 23 bits

# For each width: rows of a program, codewords of a tile, warps, tiles in flight.
_TILES = {
    64: (128, 64, 8, 3),
    128: (64, 64, 8, 3),
    256: (64, 32, 8, 3),
    512: (16, 64, 8, 3),
}
_SHARED_BYTES = 148 * 1024  # that these need; cards for workstations have 99 KiB, which hold two of the widest tiles
_SMALL_TILES = {512: (16, 64, 8, 2)}


def codebook_constants(levels: int, size: int, width: int) -> dict[str, int]:
    """The same for `_range_kernel` and `_prepare_kernel` (which also takes PADDED_SIZE)."""
    block_width = max(16, _power_of_two_from(width))
    block_size = max(1, 2048 // block_width)
    return {
        "SIZE": size,
        "WIDTH": width,
        "LEVELS": levels,
        "BLOCK_SIZE": block_size,
        "BLOCK_WIDTH": block_width,
        "num_warps": 4,
    }


def wide_constants(size: int, width: int) -> dict[str, int]:
    """The same for `_wide_level_kernel`."""
    return {"SIZE": size, "WIDTH": width, "BLOCK_ROWS": 16, "BLOCK_SIZE": 16, "BLOCK_WIDTH": 32, "num_warps": 4}


def row_constants(levels: int, size: int, width: int) -> dict[str, int]:
    """The same for `_decode_kernel` and `_grad_x_kernel`."""
    block_width = min(256, _power_of_two_from(width))
    return {
        "SIZE": size,
        "WIDTH": width,
        "LEVELS": levels,
        "BLOCK_ROWS": 4096 // max(16, block_width),
        "BLOCK_WIDTH": block_width,
        "num_warps": 8,
    }


def segment_constants(levels: int, size: int, width: int) -> dict[str, int]:
    """The same for `_segment_sums_kernel`."""
    block_width = min(128, _power_of_two_from(width))
    return {
        "SIZE": size,
        "WIDTH": width,
        "LEVELS": levels,
        "CHUNK": _CHUNK,
        "BLOCK_ROWS": 2048 // max(32, block_width),
        "BLOCK_WIDTH": block_width,
        "num_warps": 2,
    }


def join_constants(size: int, width: int) -> dict[str, int]:
    """The same for `_join_segments_kernel`."""
    block_width = min(128, _power_of_two_from(width))
    return {
        "SIZE": size,
        "WIDTH": width,
        "CHUNK": _CHUNK,
        "BLOCK_CHUNKS": 16,
        "BLOCK_WIDTH": block_width,
        "num_warps": 1,
    }


def _power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _shared_bytes(device: torch.device) -> int:
    """That a block of a GPU may have; the interpreter takes the tiles of one that has enough."""
    if device.type != "cuda":
        return _SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _launch(kernel, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Starts a kernel on the device of its first argument."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, **OPTIONS)


def residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, levels, _, width = _sizes(codebooks, x=x)
    x_rows, books = x.contiguous(), codebooks.contiguous()
    codes = x.new_empty(*x.shape[:-1], levels, dtype=torch.int64)
    commitment_loss, codebook_loss = books.new_zeros(levels), books.new_zeros(levels)
    quantized = torch.empty_like(x)
    if rows == 0:
        return quantized, codes, commitment_loss, codebook_loss
    buffer = torch.empty_like(x_rows)
    quantize_rows = _quantize_on_chip if width <= WIDEST_ON_CHIP else _quantize_wide
    partials = quantize_rows(x_rows, books, buffer, codes, rows)
    loss = {"LEVELS": levels, "BLOCK": 1024, "num_warps": 4}
    _launch(_losses_kernel, (levels,), partials, commitment_loss, codebook_loss, len(partials), rows * width, **loss)
    return _written(quantized, buffer), codes, commitment_loss, codebook_loss


def _quantize_on_chip(x: Tensor, codebooks: Tensor, quantized: Tensor, codes: Tensor, rows: int) -> Tensor:
    """Fills `quantized` and `codes`; returns sums of the squared rests, `(programs, levels)`."""
    levels, size, width = codebooks.shape
    constants = quantize_constants(levels, size, width, _shared_bytes(x.device))
    prepare = codebook_constants(levels, size, width)
    padded = constants["PADDED_SIZE"]
    ranges = codebooks.new_zeros(3, levels, dtype=torch.int32)
    words = codebooks.new_empty(levels, padded, constants["BLOCK_WIDTH"], dtype=torch.float16)
    half_norms = codebooks.new_empty(levels, padded)
    _launch(_range_kernel, (triton.cdiv(size, prepare["BLOCK_SIZE"]), levels), codebooks, ranges, **prepare)
    grid = (triton.cdiv(padded, prepare["BLOCK_SIZE"]), levels)
    _launch(_prepare_kernel, grid, codebooks, ranges, words, half_norms, PADDED_SIZE=padded, **prepare)
    programs = triton.cdiv(rows, constants["BLOCK_ROWS"])
    partials = codebooks.new_empty(programs, levels)
    arguments = x, codebooks, words, half_norms, ranges, quantized, codes, partials, rows
    _launch(_quantize_kernel, (programs,), *arguments, **constants)
    return partials


def _quantize_wide(x: Tensor, codebooks: Tensor, quantized: Tensor, codes: Tensor, rows: int) -> Tensor:
    """The same, level by level, for rows that do not fit into registers."""
    levels, size, width = codebooks.shape
    constants = wide_constants(size, width)
    source, residuals = x, codebooks.new_empty(rows, width)
    found = codes.new_empty(levels, rows)
    norms = codebooks.new_empty(levels, rows)
    for level in range(levels):
        arguments = source, codebooks[level], residuals, found[level], norms[level], rows
        _launch(_wide_level_kernel, (triton.cdiv(rows, constants["BLOCK_ROWS"]),), *arguments, **constants)
        source = residuals
    bad = ~norms.isfinite().all(0) | ~codebooks.isfinite().all()
    codes.copy_(found.masked_fill_(bad, -1).T.reshape(codes.shape))
    decoded = _decode(codes, codebooks, rows)
    quantized.copy_(decoded.masked_fill_(bad[:, None], math.nan).reshape(quantized.shape))
    return torch.where(bad.any(), math.nan, norms).T.contiguous()


def residual_quantize_backward(
    x: Tensor,
    codebooks: Tensor,
    codes: Tensor,
    grad_quantized: Tensor | None,
    grad_commitment_loss: Tensor | None,
    grad_codebook_loss: Tensor | None,
    need_x: bool,
    need_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    rows, levels, size, width = _sizes(codebooks, x=x, codes=codes)
    for name, grad, like, elements in (
        ("grad_quantized", grad_quantized, x, rows * width),
        ("grad_commitment_loss", grad_commitment_loss, codebooks, levels),
        ("grad_codebook_loss", grad_codebook_loss, codebooks, levels),
    ):
        if grad is not None:
            _check_upstream(name, grad, elements, like.dtype)
    _check_range_on_the_cpu(codes, codebooks)
    x_rows, books, codes = x.contiguous(), codebooks.contiguous(), codes.contiguous()
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_codebooks = torch.empty_like(codebooks) if need_codebooks else codebooks.new_empty(0)
    if need_x and rows:
        buffer = torch.empty_like(x_rows)
        constants = row_constants(levels, size, width)
        grid = (triton.cdiv(rows, constants["BLOCK_ROWS"]), triton.cdiv(width, constants["BLOCK_WIDTH"]))
        ups = [x_rows if grad_quantized is None else grad_quantized.contiguous()]
        ups.append(books if grad_commitment_loss is None else grad_commitment_loss.contiguous())
        has = {"HAS_QUANTIZED": grad_quantized is not None, "HAS_COMMITMENT": grad_commitment_loss is not None}
        arguments = x_rows, codes, books, *ups, buffer, rows, rows * width
        _launch(_grad_x_kernel, grid, *arguments, **has, **constants)
        grad_x = _written(grad_x, buffer)
    if need_codebooks:
        if grad_codebook_loss is None:
            grad_codebooks.zero_()
        else:
            buffer = _segment_sums("rest", x_rows, codes, books, rows, upstream=grad_codebook_loss.contiguous())[1]
            grad_codebooks = _written(grad_codebooks, buffer)
    return grad_x, grad_codebooks


def residual_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    rows, _, _, width = _sizes(codebooks, codes=codes)
    _check_range_on_the_cpu(codes, codebooks)
    return _decode(codes.contiguous(), codebooks.contiguous(), rows).reshape(*codes.shape[:-1], width)


def _decode(codes: Tensor, codebooks: Tensor, rows: int) -> Tensor:
    levels, size, width = codebooks.shape
    decoded = codebooks.new_empty(rows, width)
    if rows:
        constants = row_constants(levels, size, width)
        grid = (triton.cdiv(rows, constants["BLOCK_ROWS"]), triton.cdiv(width, constants["BLOCK_WIDTH"]))
        _launch(_decode_kernel, grid, codes, codebooks, decoded, rows, **constants)
    return decoded


def residual_decode_backward(grad: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    rows, _, _, width = _sizes(codebooks, x=grad, codes=codes)
    _check_upstream("grad", grad, rows * width, torch.float32)
    _check_range_on_the_cpu(codes, codebooks)
    sums = _segment_sums("value", grad.contiguous(), codes.contiguous(), codebooks.contiguous(), rows)[1]
    return _written(torch.empty_like(codebooks), sums)


def residual_statistics(x: Tensor, codes: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    rows = _sizes(codebooks, x=x, codes=codes)[0]
    _check_range_on_the_cpu(codes, codebooks)
    arguments = x.contiguous(), codes.contiguous(), codebooks.contiguous(), rows
    return _segment_sums("residual", *arguments, count=True)


def _segment_sums(
    of: str,
    values: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    rows: int,
    *,
    upstream: Tensor | None = None,
    count: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns counts `(L, K)`, if asked for, and sums `(L, K, D)` of what `_segment_sums_kernel` calls OF."""
    levels, size, width = codebooks.shape
    counts, sums = codebooks.new_zeros(levels, size), codebooks.new_zeros(levels, size, width)
    if rows == 0:
        return counts, sums
    small = torch.int16 if size < 2**15 - 1 else torch.int32  # half the passes of the radix sort
    keys = codes.new_empty(levels, rows, dtype=small)
    _launch(_keys_kernel, (triton.cdiv(rows, 1024),), codes, keys, rows, SIZE=size, LEVELS=levels, BLOCK_ROWS=1024)
    keys, order = torch.sort(keys, dim=1, stable=True)
    bounds = torch.arange(size + 1, device=codes.device, dtype=small).expand(levels, -1).contiguous()
    offsets = torch.searchsorted(keys, bounds)
    constants, join = segment_constants(levels, size, width), join_constants(size, width)
    chunks, blocks = triton.cdiv(rows, _CHUNK), triton.cdiv(width, constants["BLOCK_WIDTH"])
    edges = codebooks.new_empty(levels, chunks, 2, width)
    upstream = codebooks if upstream is None else upstream
    arguments = values, codes, codebooks, keys, order, offsets, upstream, sums, edges, rows, rows * width
    _launch(_segment_sums_kernel, (chunks, levels, blocks), *arguments, OF=of, **constants)
    blocks = triton.cdiv(width, join["BLOCK_WIDTH"])
    _launch(_join_segments_kernel, (size, levels, blocks), offsets, edges, counts, sums, chunks, COUNT=count, **join)
    return counts, sums


def _written(output: Tensor, buffer: Tensor) -> Tensor:
    """`output` with the values of `buffer`, which is the contiguous memory that the kernels write to."""
    return buffer if output.stride() == buffer.stride() else output.copy_(buffer)


# The public functions check arguments in full; these keep addresses inside the tensors when an operator is called
# directly, with the sentences of the CPU kernels.


def _sizes(codebooks: Tensor, *, x: Tensor | None = None, codes: Tensor | None = None) -> tuple[int, int, int, int]:
    """Rows, levels, codewords of a level, D."""
    if codebooks.dim() != 3 or codebooks.dtype != torch.float32:
        raise ValueError("codebooks: expected 3 dimensions (levels, codebook_size, D) of float32")
    levels, size, width = codebooks.shape
    if 0 in codebooks.shape:
        raise ValueError("codebooks: expected at least one level, codeword and D")
    if codes is not None and (codes.dim() == 0 or codes.shape[-1] != levels or codes.dtype != torch.int64):
        raise ValueError("codes: expected shape (..., levels) of int64")
    if x is not None and (x.dim() == 0 or x.shape[-1] != width):
        raise ValueError("x: expected shape (..., D), D that of codebooks")
    if x is not None and x.dtype not in FLOATS:
        raise ValueError("x: expected dtype float32, bfloat16 or float16")
    rows = x.numel() // width if x is not None else codes.numel() // levels
    if codes is not None and codes.numel() // levels != rows:
        raise ValueError("codes: expected one row for each row of x")
    return rows, levels, size, width


def _check_upstream(name: str, grad: Tensor, elements: int, dtype: torch.dtype) -> None:
    if grad.numel() != elements or grad.dtype != dtype:
        raise ValueError(f"{name}: expected the shape and dtype of what it is the gradient of")


def _check_range_on_the_cpu(codes: Tensor, codebooks: Tensor) -> None:
    """In the interpreter the sentence, where on a GPU the kernels assert."""
    if is_on_cpu_to_look_at(codes):
        check_range(codes, codebooks)
