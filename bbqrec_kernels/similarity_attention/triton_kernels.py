"""Triton kernels and their launchers, padded and packed. README.md, section "Triton", has the design and the cost.

A program holds a block of query rows (forward; gradients of queries and tables) or of keys (gradients of keys and
values) and goes through the tiles of scores that it sees. A pair's bucket is never a number: a channel is a chain of
questions "has the bucket reached k?", each a select in the forward and a masked sum in the backward.

Nothing but `_launch` knows whether a GPU or Triton's interpreter runs a kernel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bbqrec_kernels._autotune import Constants, tuned
from bbqrec_kernels._checks import FLOATS, is_on_cpu_to_look_at
from bbqrec_kernels.similarity_attention.terms import KINDS, MAX_BUCKETS, MAX_CHANNELS

# A product and a sum are never fused unless the code says fma: a score has the same bits in every kernel.
OPTIONS = {"enable_fp_fusion": False}

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))

_PREFIX, _MATCHES, _COSINE, _GAP = (tl.constexpr(KINDS.index(kind)) for kind in ("prefix", "matches", "cosine", "gap"))

# A channel in a kernel: a tuple of constants, which these are the places of.
_KIND = tl.constexpr(0)
_BITS = tl.constexpr(1)  # of a level in packed words, 0 where codes are not packed
_BUCKETS = tl.constexpr(2)
_WIDTH = tl.constexpr(3)  # of what is compared
_STRIDE = tl.constexpr(4)  # elements from token to token
_OFFSET = tl.constexpr(5)  # of the channel, within a token
_TABLE = tl.constexpr(6)  # entries of one head in the tables before it
_SUM = tl.constexpr(7)  # the first of its sums of score gradients, among those of all channels
_WORD = tl.constexpr(8)  # bits of a packed word that are looked at: 32 where these are enough, or 64
_IS_LONG = tl.constexpr(9)  # whether its table is looked up in memory

# Buckets of the longest chain of selects; longer tables stay in memory. The bucket of a gap is soon found.
_CHAIN, _GAP_CHAIN = 17, 8
_SUMS = 16  # sums of score gradients that one pass over the scores keeps in registers


# ---- terms: what two tokens have in common ------------------------------------------------------------------------


@triton.jit
def _hide(numbers):
    """The same numbers, of which the compiler knows nothing. Not for the interpreter, which cannot run assembly."""
    if numbers.dtype == tl.int64:
        return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [numbers], numbers.dtype, is_pure=True, pack=1)
    elif numbers.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [numbers], numbers.dtype, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], numbers.dtype, is_pure=True, pack=1)


@triton.jit
def _elsewhere(block, COMPILED: tl.constexpr):
    """The same block, for a rare path: nothing that the usual path knows of it is kept in registers until then."""
    if COMPILED:
        return _hide(block)
    else:
        return block


@triton.jit
def _words(pointers, token, inside, CHANNELS: tl.constexpr, MASKED: tl.constexpr, AGAIN: tl.constexpr):
    """For each channel the packed words or positions of some tokens `[N]`; the tokens where there is not one number.

    AGAIN has them loaded once more, where the compiler would otherwise know that it has them already.
    """
    words = ()
    for c in tl.static_range(len(CHANNELS)):
        if CHANNELS[c][_BITS] > 0 or CHANNELS[c][_KIND] == _GAP:
            at = pointers[c] + token * CHANNELS[c][_STRIDE] + CHANNELS[c][_OFFSET]
            if CHANNELS[c][_WORD] == 32:  # the lower half of an int64
                at = at.to(tl.pointer_type(tl.int32), bitcast=True)
            if MASKED:
                words = words + (tl.load(at, inside, 0, volatile=AGAIN),)
            else:
                words = words + (tl.load(at),)
        else:
            words = words + (token,)
    return words


@triton.jit
def _load_all(pointer, COUNT: tl.constexpr, FACTOR: tl.constexpr):
    numbers = ()
    for k in tl.static_range(COUNT):
        numbers = numbers + (tl.load(pointer + k) * FACTOR,)
    return numbers


@triton.jit
def _tables(biases, head, heads, CHANNELS: tl.constexpr, EXACT: tl.constexpr):
    """For each channel the table of a head, in units of scores; nothing where it is long."""
    tables = ()
    for c in tl.static_range(len(CHANNELS)):
        if CHANNELS[c][_IS_LONG]:
            tables = tables + ((),)
        else:
            entries = biases + CHANNELS[c][_TABLE] * heads + head * CHANNELS[c][_BUCKETS]
            tables = tables + (_load_all(entries, CHANNELS[c][_BUCKETS], 1.0 if EXACT else _LOG2E),)
    return tables


@triton.jit
def _thresholds(boundaries, CHANNELS: tl.constexpr):
    """For each channel of similarities the boundaries; nothing where they are many, and for other channels."""
    thresholds = ()
    for c in tl.static_range(len(CHANNELS)):
        if CHANNELS[c][_KIND] == _COSINE and not CHANNELS[c][_IS_LONG]:
            thresholds = thresholds + (_load_all(boundaries[c], CHANNELS[c][_BUCKETS] - 1, 1.0),)
        else:
            thresholds = thresholds + ((),)
    return thresholds


@triton.jit
def _similarity(
    left, right, left_token, right_token, left_inside, right_inside, CHANNELS: tl.constexpr, C: tl.constexpr
):
    """Products of vectors, `[LEFT, RIGHT]`."""
    BLOCK: tl.constexpr = 16 if CHANNELS[C][_WIDTH] <= 16 else 32
    total = tl.zeros([left_token.shape[0], right_token.shape[0]], tl.float32)
    left += left_token * CHANNELS[C][_STRIDE] + CHANNELS[C][_OFFSET]
    right += right_token * CHANNELS[C][_STRIDE] + CHANNELS[C][_OFFSET]
    for start in range(0, CHANNELS[C][_WIDTH], BLOCK):
        at = start + tl.arange(0, BLOCK)
        in_width = (at < CHANNELS[C][_WIDTH])[None, :]
        a = tl.load(left[:, None] + at[None, :], left_inside[:, None] & in_width, 0.0)
        b = tl.load(right[:, None] + at[None, :], right_inside[:, None] & in_width, 0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
    return total


@triton.jit
def _agreeing_levels(
    left, right, left_token, right_token, left_inside, right_inside, CHANNELS: tl.constexpr, C: tl.constexpr
):
    """How many levels of codes that are not packed agree, `[LEFT, RIGHT]` int32."""
    count = tl.zeros([left_token.shape[0], right_token.shape[0]], tl.int32)
    left += left_token * CHANNELS[C][_STRIDE] + CHANNELS[C][_OFFSET]
    right += right_token * CHANNELS[C][_STRIDE] + CHANNELS[C][_OFFSET]
    going_on = count == 0
    for level in range(CHANNELS[C][_WIDTH]):
        a, b = tl.load(left + level, left_inside, -1), tl.load(right + level, right_inside, -1)
        agree = (a[:, None] == b[None, :]) & (a >= 0)[:, None]
        if CHANNELS[C][_KIND] == _PREFIX:
            agree = agree & going_on
            going_on = agree
        count += agree.to(tl.int32)
    return count


@triton.jit
def _distance(left, right):
    """|left - right| `[LEFT, RIGHT]` int64; the largest number where it does not fit."""
    a, b = left[:, None], right[None, :]
    distance = tl.where(a > b, a - b, b - a)
    return tl.where(distance < 0, 0x7FFFFFFFFFFFFFFF, distance)


@triton.jit
def _bit_length(number):
    """Of an int64 that is not negative: read off a float32, after clearing bits that might round it up."""
    exact = number & ((number >> 1) ^ -1)
    return tl.maximum((exact.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def _is_same(different, level: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr):
    """1 where a level of packed words has no bit that is different, or 0."""
    field = (different >> (CHANNELS[C][_BITS] * level)) << (CHANNELS[C][_WORD] - CHANNELS[C][_BITS])
    return (field == 0).to(tl.int32)


@triton.jit
def _count_same(different, LEVELS: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr):
    count = _is_same(different, 0, CHANNELS, C)
    for level in tl.static_range(1, LEVELS):
        count += _is_same(different, level, CHANNELS, C)
    return count


@triton.jit
def _compare(
    left,
    right,
    left_word,
    right_word,
    left_token,
    right_token,
    left_inside,
    right_inside,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
):
    """What `_reached` tells buckets by, `[LEFT, RIGHT]`. Queries may be on the left or on the right."""
    if CHANNELS[C][_KIND] == _COSINE:
        compared = _similarity(left, right, left_token, right_token, left_inside, right_inside, CHANNELS, C)
    elif CHANNELS[C][_KIND] == _GAP:
        compared = _distance(left_word, right_word)
        if CHANNELS[C][_IS_LONG]:
            compared = tl.minimum(_bit_length(compared), CHANNELS[C][_BUCKETS] - 1)
        else:  # of distances that differ, the low 31 bits are enough
            compared = tl.where((compared >> 31) == 0, compared.to(tl.int32), 0x7FFFFFFF)
    elif CHANNELS[C][_BITS] == 0:
        compared = _agreeing_levels(left, right, left_token, right_token, left_inside, right_inside, CHANNELS, C)
    else:
        compared = left_word[:, None] ^ right_word[None, :]
        if CHANNELS[C][_KIND] == _MATCHES:
            compared = _count_same(compared, CHANNELS[C][_BUCKETS] - 1, CHANNELS, C)
    return compared


@triton.jit
def _reached(
    compared, k: tl.constexpr, threshold, boundaries, CHANNELS: tl.constexpr, C: tl.constexpr, COMPILED: tl.constexpr
):
    """Whether the bucket is `k` or a later one, k >= 1.

    LLVM would vectorize these questions and pack the answers into words, which costs more than all selects together:
    what is asked of is hidden from it.
    """
    IS_PREFIX: tl.constexpr = CHANNELS[C][_KIND] == _PREFIX and CHANNELS[C][_BITS] > 0
    FIRST_LEVELS: tl.constexpr = CHANNELS[C][_BITS] * k if IS_PREFIX else CHANNELS[C][_WORD]
    if CHANNELS[C][_WORD] > FIRST_LEVELS:
        compared = compared & ((1 << FIRST_LEVELS) - 1)
    if COMPILED:
        compared = _hide(compared)
    if IS_PREFIX:  # no bit of the first levels is different
        reached = compared == 0
    elif CHANNELS[C][_KIND] == _COSINE:
        if CHANNELS[C][_IS_LONG]:
            reached = compared >= tl.load(boundaries + k - 1)
        else:
            reached = compared >= threshold[k - 1]
    elif CHANNELS[C][_KIND] == _GAP and not CHANNELS[C][_IS_LONG]:
        reached = compared >= (1 << (k - 1))
    else:
        reached = compared >= k
    return reached


@triton.jit
def _choose(
    compared,
    table,
    threshold,
    boundaries,
    BUCKETS: tl.constexpr,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
    COMPILED: tl.constexpr,
):
    value = table[0]
    for k in tl.static_range(1, BUCKETS):
        value = tl.where(_reached(compared, k, threshold, boundaries, CHANNELS, C, COMPILED), table[k], value)
    return value


@triton.jit
def _look_up(
    compared,
    table,
    threshold,
    biases,
    boundaries,
    head,
    heads,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
    EXACT: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """The entries of the table that pairs of tokens have, in units of scores."""
    if CHANNELS[C][_IS_LONG]:
        entries = biases + CHANNELS[C][_TABLE] * heads + head * CHANNELS[C][_BUCKETS]
        if CHANNELS[C][_KIND] == _GAP:
            value = tl.load(entries + compared)
        else:
            value = tl.zeros(compared.shape, tl.float32) + tl.load(entries)
            for k in range(1, CHANNELS[C][_BUCKETS]):
                value = tl.where(compared >= tl.load(boundaries + k - 1), tl.load(entries + k), value)
        if not EXACT:
            value = value * _LOG2E
    else:
        value = _choose(compared, table, threshold, boundaries, CHANNELS[C][_BUCKETS], CHANNELS, C, COMPILED)
    if CHANNELS[C][_KIND] == _COSINE:
        value = tl.where(compared == compared, value, float("nan"))
    return value


@triton.jit
def _scores(product, scale, left, right, tables, CHANNELS: tl.constexpr, EXACT: tl.constexpr, COMPILED: tl.constexpr):
    """Scores, in the units of `_exp`, and what tells the buckets of each channel.

    `left` and `right` are pointers, tokens, whether these are inside, and words; `tables` is what `_look_up` needs.
    """
    compared = ()
    scores = product * scale
    for c in tl.static_range(len(CHANNELS)):
        what = _compare(
            left[0][c], right[0][c], left[3][c], right[3][c], left[1], right[1], left[2], right[2], CHANNELS, c
        )
        entries, thresholds, biases, boundaries, head, heads = tables
        value = _look_up(
            what, entries[c], thresholds[c], biases, boundaries[c], head, heads, CHANNELS, c, EXACT, COMPILED
        )
        if c == 0:
            scores = tl.fma(product, scale, value)
        else:
            scores = scores + value
        compared = compared + (what,)
    return scores, compared


@triton.jit
def _limits(row, rows, columns, shift, IS_CAUSAL: tl.constexpr):
    """For each row the number of keys that it sees, which are the first ones."""
    limit = columns
    if IS_CAUSAL:
        limit = tl.minimum(columns, row + shift + 1)
    return tl.where(row < rows, limit, 0)


# ---- tiles --------------------------------------------------------------------------------------------------------


@triton.jit
def _bounds(starts, sequence, tokens):
    """The first token of a packed sequence, and the end of its tokens; within all tokens, whatever `starts` holds."""
    start = tl.minimum(tl.maximum(tl.load(starts + sequence), 0), tokens)
    return start, tl.minimum(tl.maximum(tl.load(starts + sequence + 1), start), tokens)


@triton.jit
def _sequence(batch, rows, columns, sequences, query_lengths, key_lengths, starts, PACKED: tl.constexpr):
    """Of one sequence: rows and keys that may be read, those that have a place, and the first token's place.

    `rows` and `columns` are those of the padded shape; in the packed form all tokens, and the longest sequence.
    """
    if PACKED:
        start, end = _bounds(starts, tl.minimum(batch, sequences - 1), rows)
        length = tl.where(batch < sequences, tl.minimum(end - start, columns), 0)
        return length, length, length, length, start.to(tl.int64), start.to(tl.int64)
    else:
        read_rows, read_columns = rows, columns
        if query_lengths is not None:
            read_rows = tl.minimum(tl.maximum(tl.load(query_lengths + batch), 0), rows).to(tl.int32)
        if key_lengths is not None:
            read_columns = tl.minimum(tl.maximum(tl.load(key_lengths + batch), 0), columns).to(tl.int32)
        return read_rows, read_columns, rows, columns, batch * rows, batch * columns


@triton.jit
def _at(pointer, strides, batch, head, token, PACKED: tl.constexpr):
    """Where a head of a sequence begins: `token` is that of its first token in the packed form."""
    if PACKED:
        return pointer + token * strides[2] + head.to(tl.int64) * strides[1]
    else:
        return pointer + batch * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _tile_at(pointer, strides, first, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Addresses of BLOCK tokens from `first` on, `[BLOCK, BLOCK_WIDTH]`: only their start changes in a loop."""
    token, d = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK_WIDTH).to(tl.int64)
    return pointer + tl.cast(first, tl.int64) * strides[2] + (token[:, None] * strides[2] + d[None, :] * strides[3])


@triton.jit
def _tile(
    pointer,
    strides,
    first,
    inside,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Values of some tokens, `[BLOCK, BLOCK_WIDTH]`; with MASKED zeros of those that are not inside."""
    at = _tile_at(pointer, strides, first, BLOCK, BLOCK_WIDTH)
    in_width = (tl.arange(0, BLOCK_WIDTH) < WIDTH)[None, :]
    if MASKED and WIDTH < BLOCK_WIDTH:
        return tl.load(at, inside[:, None] & in_width, 0.0)
    elif MASKED:
        return tl.load(at, inside[:, None], 0.0)
    elif WIDTH < BLOCK_WIDTH:
        return tl.load(at, in_width, 0.0)
    else:
        return tl.load(at)


@triton.jit
def _store_tile(
    pointer, strides, first, inside, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    at = _tile_at(pointer, strides, first, BLOCK, BLOCK_WIDTH)
    in_width = (tl.arange(0, BLOCK_WIDTH) < WIDTH)[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), inside[:, None] & in_width)


@triton.jit
def _clear(
    pointer, strides, begin, end, block, blocks, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Zeros for some tokens, by `blocks` programs."""
    zeros = tl.zeros([BLOCK, BLOCK_WIDTH], tl.float32)
    for first in range(begin + block * BLOCK, end, blocks * BLOCK):
        inside = first + tl.arange(0, BLOCK) < end
        _store_tile(pointer, strides, first, inside, zeros, WIDTH, BLOCK, BLOCK_WIDTH)


@triton.jit
def _clear_uncovered(
    pointer,
    strides,
    batch,
    head,
    starts,
    tokens,
    longest,
    sequences,
    block,
    blocks,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Zeros for tokens of a sequence beyond the longest; with `batch == sequences` for those before and after all."""
    pointer += head.to(tl.int64) * strides[1]
    if batch < sequences:
        start, end = _bounds(starts, batch, tokens)
        _clear(
            pointer, strides, tl.minimum(end - start, longest) + start, end, block, blocks, WIDTH, BLOCK, BLOCK_WIDTH
        )
    else:
        begin = tl.minimum(tl.maximum(tl.load(starts), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(starts + sequences), begin), tokens)
        _clear(pointer, strides, 0, begin, block, blocks, WIDTH, BLOCK, BLOCK_WIDTH)
        _clear(pointer, strides, end, tokens, block, blocks, WIDTH, BLOCK, BLOCK_WIDTH)


@triton.jit
def _has_nan(values):
    """Whether a row of `[M, N]` has NaN in it (or infinities of both signs)."""
    total = tl.sum(values, 1)
    return tl.max((total != total).to(tl.int32), 0) > 0


@triton.jit
def _product(weights, matrix, total, PRECISION: tl.constexpr):
    """`total + weights @ matrix`, weights rounded to the dtype of the matrix."""
    return tl.dot(weights.to(matrix.dtype), matrix, total, input_precision=PRECISION)


@triton.jit
def _product_of_visible(weights, matrix, visible, total):
    """The same over visible pairs alone, one after the other: 0 · NaN of a hidden one would be NaN."""
    index = tl.arange(0, weights.shape[1])
    seen = visible.to(tl.int32)
    for k in range(weights.shape[1]):
        here = index == k
        weight = tl.sum(tl.where(here[None, :], weights, 0.0), 1)
        row = tl.sum(tl.where(here[:, None], matrix.to(tl.float32), 0.0), 0)
        sees = tl.sum(tl.where(here[None, :], seen, 0), 1) > 0
        total += tl.where(sees[:, None], weight[:, None] * row[None, :], 0.0)
    return total


@triton.jit
def _exp(score, EXACT: tl.constexpr):
    """Of scores in units of log 2, or in natural ones for float32: rounding to the others would double their error."""
    if EXACT:
        return tl.exp2(score * _LOG2E)
    else:
        return tl.exp2(score)


# ---- forward ------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    state,  # weighted sums [ROWS, WIDTH], highest scores [ROWS], sums of weights [ROWS]
    first,  # key of the first tile
    last,
    q,
    limit,  # [ROWS]
    columns,
    key,
    key_strides,
    value,
    value_strides,
    key_token,
    keys,
    left,
    tables,
    scale,
    CHANNELS: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """The state after some more tiles of keys."""
    total, highest, weight = state
    for start in range(first, last, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        inside = column < columns
        k = _tile(key, key_strides, start, inside, WIDTH, BLOCK_KEYS, BLOCK_WIDTH, MASKED)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        token = key_token + column
        right = keys, token, inside, _words(keys, token, inside, CHANNELS, MASKED, False)
        scores, _ = _scores(product, scale, left, right, tables, CHANNELS, EXACT, COMPILED)
        if MASKED:
            visible = column[None, :] < limit[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen nothing
        weights = _exp(scores - base[:, None], EXACT)
        shrink = _exp(highest - base, EXACT)
        weight = weight * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None]
        v = _tile(value, value_strides, start, inside, WIDTH, BLOCK_KEYS, BLOCK_WIDTH, MASKED)
        if ONE_BY_ONE:
            total = _product_of_visible(weights, v, visible, total)
        else:
            total = _product(weights, v, total, PRECISION)
        highest = higher
    return total, highest, weight


@triton.jit
def _tiles_of_keys(
    block, rows, columns, shift, IS_CAUSAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr
):
    """The first key of the first tile that a block of rows does not see in full, and the end of what it sees."""
    first, last = block * BLOCK_ROWS, tl.minimum(block * BLOCK_ROWS + BLOCK_ROWS, rows)
    clear, end = columns, columns
    if IS_CAUSAL:
        clear = tl.minimum(columns, tl.maximum(first + shift + 1, 0))
        end = tl.minimum(columns, tl.maximum(last + shift, 0))
    end = tl.where(first < rows, end, 0)
    return tl.minimum(clear // BLOCK_KEYS * BLOCK_KEYS, end), end


@triton.jit
def _attend_block(
    sizes,
    batch,
    head,
    block,
    query,
    key,
    value,
    query_strides,
    key_strides,
    value_strides,
    biases,
    queries,
    keys,
    boundaries,
    heads,
    scale,
    CHANNELS: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Weighted sums, highest scores and sums of weights of a block of rows."""
    rows, columns, all_rows, all_columns, query_token, key_token = sizes
    shift = all_columns - all_rows
    query = _at(query, query_strides, batch, head, query_token, PACKED)
    key = _at(key, key_strides, batch, head, key_token, PACKED)
    value = _at(value, value_strides, batch, head, key_token, PACKED)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    q = _tile(query, query_strides, block * BLOCK_ROWS, inside, WIDTH, BLOCK_ROWS, BLOCK_WIDTH, True)
    limit = _limits(row, rows, columns, shift, IS_CAUSAL)
    left = queries, query_token + row, inside, _words(queries, query_token + row, inside, CHANNELS, True, False)
    tables = (
        _tables(biases, head, heads, CHANNELS, EXACT),
        _thresholds(boundaries, CHANNELS),
        biases,
        boundaries,
        head,
        heads,
    )
    clear, end = _tiles_of_keys(block, rows, columns, shift, IS_CAUSAL, BLOCK_ROWS, BLOCK_KEYS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    state = total, highest, weight
    for masked in tl.static_range(1 if ONE_BY_ONE else 0, 2):
        state = _attend(
            state,
            clear if masked == 1 and not ONE_BY_ONE else 0,
            clear if masked == 0 else end,
            q,
            limit,
            columns,
            key,
            key_strides,
            value,
            value_strides,
            key_token,
            keys,
            left,
            tables,
            scale,
            CHANNELS,
            EXACT,
            masked == 1,
            ONE_BY_ONE,
            WIDTH,
            BLOCK_KEYS,
            BLOCK_WIDTH,
            PRECISION,
            COMPILED,
        )
    return state


@triton.jit(do_not_specialize=["rows", "columns", "sequences", "heads", "blocks"])
def _forward_kernel(
    query,  # (B, H, Sq, D), or (T, H, D)
    key,  # (B, H, Sk, D), or (T, H, D)
    value,  # like key
    output,  # like query
    logsumexp,  # (B, H, Sq), or (T, H), float64
    query_strides,  # of sequence (0 in the packed form), head, token, element
    key_strides,
    value_strides,
    output_strides,
    logsumexp_strides,
    biases,  # all tables
    queries,  # for each channel what is compared, (tokens, ·)
    keys,
    boundaries,  # for each channel
    query_lengths,  # (B,) int64, or None
    key_lengths,
    starts,  # (B + 1,) int32 in the packed form, or None
    rows,  # Sq, or T
    columns,  # Sk, or the longest sequence
    sequences,  # B
    heads,  # H
    blocks,  # of rows, in a sequence
    scale,  # in the units of _exp
    CHANNELS: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    batch, block = (tl.program_id(0) // blocks).to(tl.int64), blocks - 1 - tl.program_id(0) % blocks  # longest first
    head = tl.program_id(1)
    sizes = _sequence(batch, rows, columns, sequences, query_lengths, key_lengths, starts, PACKED)
    total, highest, weight = _attend_block(
        sizes,
        batch,
        head,
        block,
        query,
        key,
        value,
        query_strides,
        key_strides,
        value_strides,
        biases,
        queries,
        keys,
        boundaries,
        heads,
        scale,
        CHANNELS,
        EXACT,
        PACKED,
        IS_CAUSAL,
        False,
        WIDTH,
        BLOCK_ROWS,
        BLOCK_KEYS,
        BLOCK_WIDTH,
        PRECISION,
        COMPILED,
    )
    if IS_CAUSAL:
        if _has_nan(total):  # perhaps of a value that is hidden from the row
            total, highest, weight = _attend_block(
                sizes,
                batch,
                head,
                _elsewhere(block, COMPILED),
                query,
                key,
                value,
                query_strides,
                key_strides,
                value_strides,
                biases,
                queries,
                keys,
                boundaries,
                heads,
                scale,
                CHANNELS,
                EXACT,
                PACKED,
                IS_CAUSAL,
                True,
                WIDTH,
                BLOCK_ROWS,
                16,
                BLOCK_WIDTH,
                PRECISION,
                COMPILED,
            )
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    divisor = tl.where(weight == 0, 1.0, weight)
    total = tl.where((row < sizes[0])[:, None], total * (1.0 / divisor)[:, None], 0.0)
    sums = highest.to(tl.float64) * (1.0 if EXACT else _LN2) + tl.log2(divisor.to(tl.float64)) * _LN2
    sums = tl.where(row < sizes[0], sums, float("-inf"))
    at = _at(output, output_strides, batch, head, sizes[4], PACKED)
    _store_tile(at, output_strides, block * BLOCK_ROWS, row < sizes[2], total, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
    at = _at(logsumexp, logsumexp_strides, batch, head, sizes[4], PACKED)
    tl.store(at + row.to(tl.int64) * logsumexp_strides[2], sums, row < sizes[2])
    if PACKED:
        _clear_uncovered(
            output,
            output_strides,
            batch,
            head,
            starts,
            rows,
            columns,
            sequences,
            block,
            blocks,
            WIDTH,
            BLOCK_ROWS,
            BLOCK_WIDTH,
        )


# ---- backward -----------------------------------------------------------------------------------------------------


@triton.jit
def _zero_sums(SUMS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    sums = ()
    for _ in tl.static_range(len(SUMS)):
        sums = sums + (tl.zeros([BLOCK_ROWS], tl.float32),)
    return sums


@triton.jit
def _add_to_sum(
    total,
    gradient,
    compared,
    left,
    right,
    threshold,
    boundaries,
    k: tl.constexpr,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
    COMPILED: tl.constexpr,
):
    if CHANNELS[C][_KIND] == _PREFIX and CHANNELS[C][_BITS] > 0:
        compared = left[:, None] ^ right[None, :]
    reached = _reached(compared, k, threshold, boundaries, CHANNELS, C, COMPILED)
    return total + tl.sum(tl.where(reached, gradient, 0.0), 1)


@triton.jit
def _add_to_sums(
    sums,
    gradient,
    compared,
    again,
    right,
    thresholds,
    boundaries,
    CHANNELS: tl.constexpr,
    SUMS: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Adds score gradients `[ROWS, KEYS]` up, for each (channel, k) of SUMS where the bucket has reached k.

    Packed codes are compared once more, with `again` in place of the words of the rows: it costs one instruction, and
    keeping the answers since `_look_up`, packed into words, costs more.
    """
    new = ()
    for i in tl.static_range(len(SUMS)):
        total = _add_to_sum(
            sums[i],
            gradient,
            compared[SUMS[i][0]],
            again[SUMS[i][0]],
            right[SUMS[i][0]],
            thresholds[SUMS[i][0]],
            boundaries[SUMS[i][0]],
            SUMS[i][1],
            CHANNELS,
            SUMS[i][0],
            COMPILED,
        )
        new = new + (total,)
    return new


@triton.jit
def _weights(scores, logsumexp, rest, EXACT: tl.constexpr):
    """exp(score - logsumexp), given as two float32 that add up to it."""
    scores = scores - logsumexp
    if EXACT:
        scores = scores - rest
    return _exp(scores, EXACT)


@triton.jit
def _gradients_of_rows(
    state,  # what grad_query is `scale` times [ROWS, WIDTH], and sums of score gradients [ROWS]
    first,  # key of the first tile
    last,
    q,
    g,  # rows of grad
    logsumexp,
    rest,
    delta,
    limit,
    columns,
    key,
    key_strides,
    value,
    value_strides,
    key_token,
    keys,
    left,
    again,
    tables,
    scale,
    CHANNELS: tl.constexpr,
    SUMS: tl.constexpr,
    NEED_QUERY: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """The state after some more tiles of keys."""
    total, sums = state
    for start in range(first, last, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        inside = column < columns
        k = _tile(key, key_strides, start, inside, WIDTH, BLOCK_KEYS, BLOCK_WIDTH, MASKED)
        v = _tile(value, value_strides, start, inside, WIDTH, BLOCK_KEYS, BLOCK_WIDTH, MASKED)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        token = key_token + column
        right = keys, token, inside, _words(keys, token, inside, CHANNELS, MASKED, False)
        scores, compared = _scores(product, scale, left, right, tables, CHANNELS, EXACT, COMPILED)
        weights = _weights(scores, logsumexp[:, None], rest[:, None], EXACT)
        gradient = weights * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if MASKED:
            visible = column[None, :] < limit[:, None]
            gradient = tl.where(visible, gradient, 0.0)
        sums = _add_to_sums(sums, gradient, compared, again, right[3], tables[1], tables[3], CHANNELS, SUMS, COMPILED)
        if NEED_QUERY:
            if ONE_BY_ONE:
                total = _product_of_visible(gradient, k, visible, total)
            else:
                total = _product(gradient, k, total, PRECISION)
    return total, sums


@triton.jit
def _row_data(
    sizes,
    batch,
    head,
    block,
    grad,
    output,
    logsumexp,
    grad_strides,
    output_strides,
    logsumexp_strides,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a block of rows: grad, logsumexp as two float32 that add up to it, and delta = grad · output.

    The logsumexp is in the units of `_exp`. That of a row that sees nothing is infinite: its weights are zero.
    """
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < sizes[0]
    grad = _at(grad, grad_strides, batch, head, sizes[4], PACKED)
    output = _at(output, output_strides, batch, head, sizes[4], PACKED)
    logsumexp = _at(logsumexp, logsumexp_strides, batch, head, sizes[4], PACKED)
    g = _tile(grad, grad_strides, block * BLOCK_ROWS, inside, WIDTH, BLOCK_ROWS, BLOCK_WIDTH, True)
    o = _tile(output, output_strides, block * BLOCK_ROWS, inside, WIDTH, BLOCK_ROWS, BLOCK_WIDTH, True)
    # By the same product as grad · value: their difference is zero for a row that sees one key.
    index = tl.arange(0, BLOCK_ROWS)
    products = tl.dot(g, tl.trans(o), input_precision=PRECISION)
    delta = tl.sum(tl.where(index[:, None] == index[None, :], products, 0.0), 1)
    exact = tl.load(logsumexp + row.to(tl.int64) * logsumexp_strides[2], inside, float("-inf"))
    exact = exact * (1.0 if EXACT else 1 / _LN2)
    nothing = exact == float("-inf")
    rounded = tl.where(nothing, float("inf"), exact.to(tl.float32))
    rest = tl.where(nothing, 0.0, (exact - rounded.to(tl.float64)).to(tl.float32))
    return g, rounded, rest, delta


@triton.jit
def _gradients_of_row_block(
    sizes,
    batch,
    head,
    block,
    data,  # what _row_data gives
    query,
    key,
    value,
    query_strides,
    key_strides,
    value_strides,
    biases,
    queries,
    keys,
    boundaries,
    heads,
    scale,
    CHANNELS: tl.constexpr,
    SUMS: tl.constexpr,
    NEED_QUERY: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """What grad_query is `scale` times, and the sums of score gradients of each row."""
    rows, columns, all_rows, all_columns, query_token, key_token = sizes
    g, logsumexp, rest, delta = data
    shift = all_columns - all_rows
    query = _at(query, query_strides, batch, head, query_token, PACKED)
    key = _at(key, key_strides, batch, head, key_token, PACKED)
    value = _at(value, value_strides, batch, head, key_token, PACKED)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    q = _tile(query, query_strides, block * BLOCK_ROWS, inside, WIDTH, BLOCK_ROWS, BLOCK_WIDTH, True)
    limit = _limits(row, rows, columns, shift, IS_CAUSAL)
    left = queries, query_token + row, inside, _words(queries, query_token + row, inside, CHANNELS, True, False)
    again = _words(queries, query_token + row, inside, CHANNELS, True, True)
    tables = (
        _tables(biases, head, heads, CHANNELS, EXACT),
        _thresholds(boundaries, CHANNELS),
        biases,
        boundaries,
        head,
        heads,
    )
    clear, end = _tiles_of_keys(block, rows, columns, shift, IS_CAUSAL, BLOCK_ROWS, BLOCK_KEYS)
    state = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32), _zero_sums(SUMS, BLOCK_ROWS)
    for masked in tl.static_range(1 if ONE_BY_ONE else 0, 2):
        state = _gradients_of_rows(
            state,
            clear if masked == 1 and not ONE_BY_ONE else 0,
            clear if masked == 0 else end,
            q,
            g,
            logsumexp,
            rest,
            delta,
            limit,
            columns,
            key,
            key_strides,
            value,
            value_strides,
            key_token,
            keys,
            left,
            again,
            tables,
            scale,
            CHANNELS,
            SUMS,
            NEED_QUERY,
            EXACT,
            masked == 1,
            ONE_BY_ONE,
            WIDTH,
            BLOCK_KEYS,
            BLOCK_WIDTH,
            PRECISION,
            COMPILED,
        )
    return state


@triton.jit(do_not_specialize=["rows", "columns", "sequences", "heads", "blocks", "row_count"])
def _backward_rows_kernel(
    query,  # (B, H, Sq, D), or (T, H, D)
    key,
    value,
    grad,
    output,
    logsumexp,
    row_data,  # (3, row_count) float32: logsumexp, rest and delta of _row_data; laid out as logsumexp
    grad_query,
    partials,  # (H, ALL_SUMS, programs of a head) float32
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    output_strides,
    logsumexp_strides,
    grad_query_strides,
    biases,
    queries,
    keys,
    boundaries,
    query_lengths,
    key_lengths,
    starts,
    rows,
    columns,
    sequences,
    heads,
    blocks,
    row_count,
    scale,  # in the units of _exp
    grad_scale,
    CHANNELS: tl.constexpr,
    ALL_SUMS: tl.constexpr,  # rows of partials: of all pairs, and of what has reached k >= 1, for each channel
    FIRST_SUM: tl.constexpr,  # row of the first of SUMS
    SUMS: tl.constexpr,  # (channel, k): what is summed in this pass
    PREPARES: tl.constexpr,  # whether row_data is written in this pass
    NEED_QUERY: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Gradients of queries, sums that gradients of tables are made of, and what _backward_keys_kernel needs of rows."""
    batch, block = (tl.program_id(0) // blocks).to(tl.int64), blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(1)
    row_count = tl.cast(row_count, tl.int64)  # twice as many may be more than 2^31
    sizes = _sequence(batch, rows, columns, sequences, query_lengths, key_lengths, starts, PACKED)
    data = _row_data(
        sizes,
        batch,
        head,
        block,
        grad,
        output,
        logsumexp,
        grad_strides,
        output_strides,
        logsumexp_strides,
        EXACT,
        PACKED,
        WIDTH,
        BLOCK_ROWS,
        BLOCK_WIDTH,
        PRECISION,
    )
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if PREPARES:
        at = _at(row_data, logsumexp_strides, batch, head, sizes[4], PACKED)
        at += row.to(tl.int64) * logsumexp_strides[2]
        tl.store(at, data[1], row < sizes[2])
        tl.store(at + row_count, data[2], row < sizes[2])
        tl.store(at + 2 * row_count, data[3], row < sizes[2])

    partials += head.to(tl.int64) * ALL_SUMS * tl.num_programs(0) + tl.program_id(0)
    if FIRST_SUM == 1 and len(SUMS) > 0:  # all score gradients of a row cancel, unless one is NaN
        tl.store(partials, tl.sum(tl.where(data[1] == float("inf"), 0.0, 0.0 * (data[1] + data[3])), 0))
    if NEED_QUERY or len(SUMS) > 0:
        total, sums = _gradients_of_row_block(
            sizes,
            batch,
            head,
            block,
            data,
            query,
            key,
            value,
            query_strides,
            key_strides,
            value_strides,
            biases,
            queries,
            keys,
            boundaries,
            heads,
            scale,
            CHANNELS,
            SUMS,
            NEED_QUERY,
            EXACT,
            PACKED,
            IS_CAUSAL,
            False,
            WIDTH,
            BLOCK_ROWS,
            BLOCK_KEYS,
            BLOCK_WIDTH,
            PRECISION,
            COMPILED,
        )
        for i in tl.static_range(len(SUMS)):
            tl.store(partials + (FIRST_SUM + i) * tl.num_programs(0), tl.sum(sums[i], 0))
        if NEED_QUERY:
            if IS_CAUSAL:
                if _has_nan(total):  # perhaps of a key that is hidden from the row
                    hidden_block = _elsewhere(block, COMPILED)
                    data = _row_data(
                        sizes,
                        batch,
                        head,
                        hidden_block,
                        grad,
                        output,
                        logsumexp,
                        grad_strides,
                        output_strides,
                        logsumexp_strides,
                        EXACT,
                        PACKED,
                        WIDTH,
                        BLOCK_ROWS,
                        BLOCK_WIDTH,
                        PRECISION,
                    )
                    total, _ = _gradients_of_row_block(
                        sizes,
                        batch,
                        head,
                        hidden_block,
                        data,
                        query,
                        key,
                        value,
                        query_strides,
                        key_strides,
                        value_strides,
                        biases,
                        queries,
                        keys,
                        boundaries,
                        heads,
                        scale,
                        CHANNELS,
                        (),
                        True,
                        EXACT,
                        PACKED,
                        IS_CAUSAL,
                        True,
                        WIDTH,
                        BLOCK_ROWS,
                        16,
                        BLOCK_WIDTH,
                        PRECISION,
                        COMPILED,
                    )
            total = tl.where((row < sizes[0])[:, None], total * grad_scale, 0.0)
            at = _at(grad_query, grad_query_strides, batch, head, sizes[4], PACKED)
            first = block * BLOCK_ROWS
            _store_tile(at, grad_query_strides, first, row < sizes[2], total, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
            if PACKED:
                _clear_uncovered(
                    grad_query,
                    grad_query_strides,
                    batch,
                    head,
                    starts,
                    rows,
                    columns,
                    sequences,
                    block,
                    blocks,
                    WIDTH,
                    BLOCK_ROWS,
                    BLOCK_WIDTH,
                )


@triton.jit
def _gradients_of_keys(
    state,  # what grad_key is `scale` times, and grad_value, [KEYS, WIDTH]
    first,  # of the tiles of rows to go through
    count,
    together,  # as many lie together; `apart` others are between them and the rest
    apart,
    k,
    v,
    column,
    rows,
    columns,
    shift,
    query,
    query_strides,
    grad,
    grad_strides,
    row_data,
    row_stride,
    row_count,
    query_token,
    queries,
    left,
    tables,
    scale,
    CHANNELS: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    EXACT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """The state after some more tiles of rows. Scores lie as `[KEYS, ROWS]`."""
    key_total, value_total = state
    for index in range(count):
        tile = first + index
        if MASKED:
            tile += tl.where(index >= together, apart, 0)
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        q = _tile(query, query_strides, tile * BLOCK_ROWS, inside, WIDTH, BLOCK_ROWS, BLOCK_WIDTH, MASKED)
        g = _tile(grad, grad_strides, tile * BLOCK_ROWS, inside, WIDTH, BLOCK_ROWS, BLOCK_WIDTH, MASKED)
        at = row_data + row.to(tl.int64) * row_stride
        if MASKED:
            logsumexp = tl.load(at, inside, float("inf"))
            delta = tl.load(at + 2 * row_count, inside, 0.0)
        else:
            logsumexp = tl.load(at)
            delta = tl.load(at + 2 * row_count)
        rest = logsumexp
        if EXACT:
            rest = tl.load(at + row_count, inside, 0.0)
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        token = query_token + row
        right = queries, token, inside, _words(queries, token, inside, CHANNELS, MASKED, False)
        scores, _ = _scores(product, scale, left, right, tables, CHANNELS, EXACT, COMPILED)
        weights = _weights(scores, logsumexp[None, :], rest[None, :], EXACT)
        if MASKED:
            visible = column[:, None] < _limits(row, rows, columns, shift, IS_CAUSAL)[None, :]
            weights = tl.where(visible, weights, 0.0)
        if NEED_VALUE:
            if ONE_BY_ONE:
                value_total = _product_of_visible(weights, g, visible, value_total)
            else:
                value_total = _product(weights, g, value_total, PRECISION)
        if NEED_KEY:
            gradient = weights * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
            if MASKED:
                gradient = tl.where(visible, gradient, 0.0)
            if ONE_BY_ONE:
                key_total = _product_of_visible(gradient, q, visible, key_total)
            else:
                key_total = _product(gradient, q, key_total, PRECISION)
    return key_total, value_total


@triton.jit
def _gradients_of_key_block(
    sizes,
    batch,
    head,
    block,
    query,
    key,
    value,
    grad,
    row_data,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    row_strides,
    row_count,
    biases,
    queries,
    keys,
    boundaries,
    heads,
    scale,
    CHANNELS: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ONE_BY_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """What grad_key is `scale` times, and grad_value, of a block of keys."""
    rows, columns, all_rows, all_columns, query_token, key_token = sizes
    shift = all_columns - all_rows
    query = _at(query, query_strides, batch, head, query_token, PACKED)
    grad = _at(grad, grad_strides, batch, head, query_token, PACKED)
    row_data = _at(row_data, row_strides, batch, head, query_token, PACKED)
    key = _at(key, key_strides, batch, head, key_token, PACKED)
    value = _at(value, value_strides, batch, head, key_token, PACKED)
    first_key = block * BLOCK_KEYS
    column = first_key + tl.arange(0, BLOCK_KEYS)
    inside = column < columns
    k = _tile(key, key_strides, first_key, inside, WIDTH, BLOCK_KEYS, BLOCK_WIDTH, True)
    v = _tile(value, value_strides, first_key, inside, WIDTH, BLOCK_KEYS, BLOCK_WIDTH, True)
    left = keys, key_token + column, inside, _words(keys, key_token + column, inside, CHANNELS, True, False)
    tables = (
        _tables(biases, head, heads, CHANNELS, EXACT),
        _thresholds(boundaries, CHANNELS),
        biases,
        boundaries,
        head,
        heads,
    )

    # Tiles of rows: `first` of them see nothing here, those from `clear` to `whole` everything; the last may be a part.
    tiles = tl.where(first_key < columns, tl.cdiv(rows, BLOCK_ROWS), 0)
    first, clear = 0, 0
    if IS_CAUSAL:
        first = tl.minimum(tl.maximum(first_key - shift, 0) // BLOCK_ROWS, tiles)
        clear = tl.cdiv(tl.maximum(first_key + BLOCK_KEYS - 1 - shift, 0), BLOCK_ROWS)
    clear = tl.minimum(tl.maximum(clear, first), tiles)
    whole = tl.minimum(tl.maximum(rows // BLOCK_ROWS, clear), tiles)
    if ONE_BY_ONE:  # all of them one after the other
        whole = clear
    state = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32), tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32)
    for masked in tl.static_range(1 if ONE_BY_ONE else 0, 2):
        state = _gradients_of_keys(
            state,
            first if masked == 1 else clear,
            clear - first + tiles - whole if masked == 1 else whole - clear,
            clear - first,
            whole - clear,
            k,
            v,
            column,
            rows,
            columns,
            shift,
            query,
            query_strides,
            grad,
            grad_strides,
            row_data,
            row_strides[2],
            row_count,
            query_token,
            queries,
            left,
            tables,
            scale,
            CHANNELS,
            NEED_KEY,
            NEED_VALUE,
            EXACT,
            IS_CAUSAL,
            masked == 1,
            ONE_BY_ONE,
            WIDTH,
            BLOCK_ROWS,
            BLOCK_WIDTH,
            PRECISION,
            COMPILED,
        )
    return state


@triton.jit(do_not_specialize=["rows", "columns", "sequences", "heads", "blocks", "row_count"])
def _backward_keys_kernel(
    query,
    key,
    value,
    grad,
    row_data,  # (3, row_count) float32
    grad_key,
    grad_value,
    query_strides,
    key_strides,
    value_strides,
    grad_strides,
    row_strides,
    grad_key_strides,
    grad_value_strides,
    biases,
    queries,
    keys,
    boundaries,
    query_lengths,
    key_lengths,
    starts,
    rows,
    columns,
    sequences,
    heads,
    blocks,  # of keys, in a sequence
    row_count,
    scale,  # in the units of _exp
    grad_scale,
    CHANNELS: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Gradients of keys and values."""
    batch, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks  # causal: the first is longest
    head = tl.program_id(1)
    row_count = tl.cast(row_count, tl.int64)  # twice as many may be more than 2^31
    sizes = _sequence(batch, rows, columns, sequences, query_lengths, key_lengths, starts, PACKED)
    key_total, value_total = _gradients_of_key_block(
        sizes,
        batch,
        head,
        block,
        query,
        key,
        value,
        grad,
        row_data,
        query_strides,
        key_strides,
        value_strides,
        grad_strides,
        row_strides,
        row_count,
        biases,
        queries,
        keys,
        boundaries,
        heads,
        scale,
        CHANNELS,
        NEED_KEY,
        NEED_VALUE,
        EXACT,
        PACKED,
        IS_CAUSAL,
        False,
        WIDTH,
        BLOCK_ROWS,
        BLOCK_KEYS,
        BLOCK_WIDTH,
        PRECISION,
        COMPILED,
    )
    if IS_CAUSAL:
        if _has_nan(key_total) | _has_nan(value_total):  # perhaps of a row that does not see the key
            key_total, value_total = _gradients_of_key_block(
                sizes,
                batch,
                head,
                _elsewhere(block, COMPILED),
                query,
                key,
                value,
                grad,
                row_data,
                query_strides,
                key_strides,
                value_strides,
                grad_strides,
                row_strides,
                row_count,
                biases,
                queries,
                keys,
                boundaries,
                heads,
                scale,
                CHANNELS,
                NEED_KEY,
                NEED_VALUE,
                EXACT,
                PACKED,
                IS_CAUSAL,
                True,
                WIDTH,
                16,
                BLOCK_KEYS,
                BLOCK_WIDTH,
                PRECISION,
                COMPILED,
            )
    column = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    first = block * BLOCK_KEYS
    if NEED_KEY:
        key_total = tl.where((column < sizes[1])[:, None], key_total * grad_scale, 0.0)
        at = _at(grad_key, grad_key_strides, batch, head, sizes[5], PACKED)
        _store_tile(at, grad_key_strides, first, column < sizes[3], key_total, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
    if NEED_VALUE:
        value_total = tl.where((column < sizes[1])[:, None], value_total, 0.0)
        at = _at(grad_value, grad_value_strides, batch, head, sizes[5], PACKED)
        _store_tile(at, grad_value_strides, first, column < sizes[3], value_total, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
    if PACKED:
        if NEED_KEY:
            _clear_uncovered(
                grad_key,
                grad_key_strides,
                batch,
                head,
                starts,
                rows,
                columns,
                sequences,
                block,
                blocks,
                WIDTH,
                BLOCK_KEYS,
                BLOCK_WIDTH,
            )
        if NEED_VALUE:
            _clear_uncovered(
                grad_value,
                grad_value_strides,
                batch,
                head,
                starts,
                rows,
                columns,
                sequences,
                block,
                blocks,
                WIDTH,
                BLOCK_KEYS,
                BLOCK_WIDTH,
            )


@triton.jit(do_not_specialize=["programs", "heads"])
def _table_gradients_kernel(
    partials,  # (H, sums, programs) float32
    biases,
    grad_biases,
    programs,
    heads,
    CHANNELS: tl.constexpr,
    ALL_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one entry: what has reached its bucket, less what has reached the next. In a fixed order."""
    entry, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    partials += head * ALL_SUMS * programs
    for c in tl.static_range(len(CHANNELS)):
        bucket = entry - CHANNELS[c][_TABLE]
        if (bucket >= 0) & (bucket < CHANNELS[c][_BUCKETS]):
            following = CHANNELS[c][_SUM] + bucket
            reached = partials + tl.where(bucket == 0, 0, following - 1).to(tl.int64) * programs
            reached_next = partials + following.to(tl.int64) * programs
            next_size = tl.where(bucket + 1 < CHANNELS[c][_BUCKETS], programs, 0)
            total = tl.zeros([BLOCK], tl.float64)
            for start in range(0, programs, BLOCK):
                inside = start + at < programs
                part = tl.load(reached + start + at, inside, 0.0).to(tl.float64)
                part -= tl.load(reached_next + start + at, start + at < next_size, 0.0).to(tl.float64)
                total += part  # zero where all that reached the bucket has reached the next
            place = CHANNELS[c][_TABLE] * heads + head * CHANNELS[c][_BUCKETS] + bucket
            gradient = tl.sum(total, 0).to(tl.float32)
            forbidden = tl.load(biases + place) == float("-inf")
            tl.store(grad_biases + place, tl.where(forbidden, gradient * 0.0, gradient))


# ---- launchers: the implementations of the operators `<op>_triton` ------------------------------------------------


def forward_constants(
    width: int, dtype: torch.dtype, channels: tuple[tuple, ...], keys: int, architecture: int
) -> Constants:
    """Compile-time constants and launch options of `_forward_kernel`.

    `keys`: of the longest sequence; `architecture`: as in sm_90.
    """
    constants = _constants(_FORWARD, width, dtype, architecture)
    is_light = len(channels) <= _FEW and all(channel[_KIND.value] == _PREFIX.value for channel in channels)
    is_narrow = constants["BLOCK_WIDTH"] <= 64 and dtype != torch.float32
    return constants | _LONG if keys > _SHORT and is_light and is_narrow else constants


def backward_rows_constants(
    width: int, dtype: torch.dtype, channels: tuple[tuple, ...], architecture: int
) -> Constants:
    """The same for `_backward_rows_kernel`."""
    constants = _constants(_BACKWARD_ROWS, width, dtype, architecture)
    if architecture >= 100 and (_is_heavy(channels) or any(channel[_WORD.value] == 64 for channel in channels)):
        return constants | {"BLOCK_KEYS": max(16, constants["BLOCK_KEYS"] // 2), "num_stages": 1}
    return constants | {"BLOCK_KEYS": max(16, constants["BLOCK_KEYS"] // 2)} if _is_heavy(channels) else constants


def backward_keys_constants(
    width: int, dtype: torch.dtype, channels: tuple[tuple, ...], architecture: int
) -> Constants:
    """The same for `_backward_keys_kernel`."""
    constants = _constants(_BACKWARD_KEYS, width, dtype, architecture)
    return constants | {"BLOCK_ROWS": max(16, constants["BLOCK_ROWS"] // 2)} if _is_heavy(channels) else constants


_FEW = 2  # channels that a whole tile has registers for
_FEW_SUMS = 8  # and sums of score gradients


def _is_heavy(channels: tuple[tuple, ...]) -> bool:
    """Whether the backward has registers for half a tile only."""
    is_separate = any(c[_KIND.value] != _GAP.value and c[_BITS.value] == 0 for c in channels)
    return len(channels) > _FEW or len(sums_of(channels)) > _FEW_SUMS or is_separate


# For each width, and apart for float32: rows and keys of a tile, warps, tiles in flight.
_Tiles = dict[tuple[int, bool], tuple[int, int, int, int]]

# By major version of the architecture, 9 of sm_90: others have the tiles of 9, but for those named. 12: cards for
# workstations, sm_86 and sm_89 too, which have tensor cores like 8 and 99 KiB of shared memory. They cost the least
# instructions a score; without spills on sm_90 up to a width of 128 (of float32: 64), and few elsewhere, where operands
# of tensor cores take registers.
_FORWARD: dict[int, _Tiles] = {
    9: {
        (64, False): (64, 64, 4, 3),
        (128, False): (64, 64, 4, 3),
        (256, False): (128, 32, 8, 1),
        (64, True): (64, 32, 4, 1),
        (128, True): (64, 16, 4, 1),
        (256, True): (16, 32, 8, 1),
    },
    8: {(64, False): (64, 64, 4, 2), (64, True): (32, 32, 4, 1)},
    12: {(64, False): (64, 64, 4, 2), (64, True): (32, 32, 4, 1)},
}
# Wide tiles cost less, if there are keys to fill them and registers to hold them.
_SHORT = 512
_LONG = {"BLOCK_KEYS": 128, "num_stages": 2}
_BACKWARD_ROWS: dict[int, _Tiles] = {
    9: {
        (64, False): (64, 64, 4, 2),
        (128, False): (64, 32, 4, 2),
        (256, False): (128, 16, 8, 1),
        (64, True): (64, 16, 4, 1),
        (128, True): (16, 32, 4, 1),
        (256, True): (32, 16, 8, 1),
    },
    8: {(256, False): (64, 32, 8, 1)},
    12: {(256, False): (64, 32, 8, 1), (256, True): (16, 16, 8, 1)},
    10: {(256, False): (64, 32, 8, 1)},
}
_BACKWARD_KEYS: dict[int, _Tiles] = {
    9: {
        (64, False): (64, 64, 4, 2),
        (128, False): (32, 64, 4, 2),
        (256, False): (32, 32, 4, 1),
        (64, True): (16, 64, 4, 1),
        (128, True): (32, 32, 8, 1),
        (256, True): (16, 32, 8, 1),
    },
    8: {(64, True): (16, 32, 4, 1), (256, False): (32, 64, 8, 1)},
    12: {(64, True): (16, 32, 4, 1), (256, False): (32, 32, 8, 1), (256, True): (16, 16, 8, 1)},
    10: {(64, True): (16, 32, 4, 1), (256, False): (32, 64, 8, 1)},
}


def _constants(tiles: dict[int, _Tiles], width: int, dtype: torch.dtype, architecture: int) -> Constants:
    is_float32 = dtype == torch.float32
    block_width = max(16, triton.next_power_of_2(width))
    major = 12 if architecture in (86, 89) else architecture // 10
    major = major if major in (9, 10, 12) else 8
    rows, keys, warps, stages = (tiles[9] | tiles.get(major, {}))[max(64, block_width), is_float32]
    return {
        "EXACT": is_float32,
        "WIDTH": width,
        "BLOCK_ROWS": rows,
        "BLOCK_KEYS": keys,
        "BLOCK_WIDTH": block_width,
        # Three products of TF32 have the precision of float32; it means nothing to the other dtypes.
        "PRECISION": "tf32x3" if is_float32 else "tf32",
        "num_warps": warps,
        "num_stages": stages,
    }


def channels_of(kind: str, *, bits: int, buckets: int, width: int = 1, channels: int = 1) -> tuple[tuple, ...]:
    """The channels of one term alone, as the kernels' CHANNELS."""
    return _channels([KINDS.index(kind)], [bits], [buckets], [width], [channels])


def _channels(
    kinds: list[int], bits: list[int], buckets: list[int], widths: list[int], counts: list[int]
) -> tuple[tuple, ...]:
    """CHANNELS of terms: `counts` are their channels."""
    found, table, sums = [], 0, 1
    for kind, bit, size, width, count in zip(kinds, bits, buckets, widths, counts, strict=True):
        levels = size - 1 if bit else 0
        word = 32 if 0 < bit * levels <= 32 else 64
        is_long = size > (_GAP_CHAIN if kind == _GAP.value else _CHAIN)
        for channel in range(count):
            offset, stride = channel * width, count * width
            found.append((kind, bit, size, width, stride, offset, table, sums, word, is_long))
            table += size
            sums += size - 1
    return tuple(found)


def sums_of(channels: tuple[tuple, ...]) -> list[tuple[int, int]]:
    """(channel, k) of all sums, the SUMS of a kernel that keeps them all."""
    return [(c, k) for c, channel in enumerate(channels) for k in range(1, channel[_BUCKETS.value])]


def _architecture(device: torch.device) -> int:
    """Of a GPU, 90 of sm_90; the interpreter takes the tiles of that."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _launch(kernel, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Starts a kernel on the device of its first argument."""
    device = arguments[0].device
    if kernel is not _table_gradients_kernel:
        constants["COMPILED"] = device.type == "cuda"
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, **OPTIONS)


class _Problem(NamedTuple):
    """Checked arguments of an operator, as kernels want them."""

    heads: tuple[Tensor, Tensor, Tensor]  # query, key, value
    terms: tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]
    masks: tuple[Tensor | None, Tensor | None, Tensor | None]  # lengths of queries and keys, starts
    sizes: tuple[int, int, int]  # rows, columns, sequences: see _forward_kernel
    scale: float
    flags: dict[str, object]  # constants: CHANNELS, PACKED, IS_CAUSAL

    def strides(self, tensor: Tensor) -> tuple[int, ...]:
        """Of sequence, head, token (and element)."""
        return (0, tensor.stride(1), tensor.stride(0), *tensor.stride()[2:]) if self.packed else tensor.stride()

    @property
    def packed(self) -> bool:
        return self.flags["PACKED"]

    def kind(self, *what: Hashable) -> Hashable:
        """Of a call, for `tuned`: lengths count by their power of two."""
        query = self.heads[0]
        return *what, query.shape[-1], query.dtype, triton.next_power_of_2(self.sizes[1]), *self.flags.values()

    def blocks(self, tokens: int, size: int) -> int:
        """Of `size` tokens, in a sequence."""
        return max(1, triton.cdiv(tokens, size))

    def grid(self, blocks: int) -> tuple[int, int]:
        """One more sequence in the packed form: its programs clear the tokens that no sequence covers."""
        return blocks * (self.sizes[2] + self.packed), self.heads[0].shape[1]


def similarity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Tensor,
    term_queries: list[Tensor],
    term_keys: list[Tensor],
    boundaries: list[Tensor],
    kinds: list[int],
    bits: list[int],
    buckets: list[int],
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    terms = biases, term_queries, term_keys, boundaries, kinds, bits, buckets
    return _forward(_padded(query, key, value, terms, query_lengths, key_lengths, is_causal, scale))


def similarity_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Tensor,
    term_queries: list[Tensor],
    term_keys: list[Tensor],
    boundaries: list[Tensor],
    kinds: list[int],
    bits: list[int],
    buckets: list[int],
    cu_seqlens: Tensor,
    max_seqlen: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    terms = biases, term_queries, term_keys, boundaries, kinds, bits, buckets
    return _forward(_packed(query, key, value, terms, cu_seqlens, max_seqlen, is_causal, scale))


def similarity_attention_backward(
    grad: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Tensor,
    term_queries: list[Tensor],
    term_keys: list[Tensor],
    boundaries: list[Tensor],
    kinds: list[int],
    bits: list[int],
    buckets: list[int],
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms = biases, term_queries, term_keys, boundaries, kinds, bits, buckets
    problem = _padded(query, key, value, terms, query_lengths, key_lengths, is_causal, scale)
    return _backward(problem, grad, output, logsumexp, biases, *needs)


def similarity_attention_varlen_backward(
    grad: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Tensor,
    term_queries: list[Tensor],
    term_keys: list[Tensor],
    boundaries: list[Tensor],
    kinds: list[int],
    bits: list[int],
    buckets: list[int],
    cu_seqlens: Tensor,
    max_seqlen: int,
    is_causal: bool,
    scale: float,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms = biases, term_queries, term_keys, boundaries, kinds, bits, buckets
    problem = _packed(query, key, value, terms, cu_seqlens, max_seqlen, is_causal, scale)
    return _backward(problem, grad, output, logsumexp, biases, *needs)


def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    query = problem.heads[0]
    output = torch.empty_like(query)
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float64)
    if query.numel() == 0 or problem.sizes[2] == 0:
        return output.zero_(), logsumexp.fill_(-math.inf)
    tensors = *problem.heads, output, logsumexp
    arguments = *tensors, *map(problem.strides, tensors), *problem.terms, *problem.masks, *problem.sizes

    def launch(constants: Constants) -> None:
        blocks = problem.blocks(problem.sizes[1] if problem.packed else problem.sizes[0], constants["BLOCK_ROWS"])
        rest = query.shape[1], blocks, _score_scale(problem)
        _launch(_forward_kernel, problem.grid(blocks), *arguments, *rest, **problem.flags, **constants)

    kind = query.shape[-1], query.dtype, problem.flags["CHANNELS"]
    pinned = forward_constants(*kind, problem.sizes[1], _architecture(query.device))
    launch(tuned(problem.kind("forward"), pinned, launch))
    return output, logsumexp


def _score_scale(problem: _Problem) -> float:
    """Of products, in the units of `_exp`."""
    return problem.scale if problem.heads[0].dtype == torch.float32 else problem.scale * _LOG2E.value


def _backward(
    problem: _Problem,
    grad: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    biases: Tensor,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_biases: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = problem.heads
    for tensor, dtype in ((grad, query.dtype), (output, query.dtype), (logsumexp, torch.float64)):
        shape = query.shape[:-1] if tensor is logsumexp else query.shape
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError("grad, output, logsumexp: expected the shapes and dtypes that the forward gave")
    gradients = [
        torch.empty_like(t) if n else t.new_empty(0)
        for t, n in zip((query, key, value, biases), (need_query, need_key, need_value, need_biases), strict=True)
    ]
    if query.numel() == 0 or key.numel() == 0 or problem.sizes[2] == 0:
        for gradient in gradients:
            gradient.zero_()
        return tuple(gradients)
    grad_query, grad_key, grad_value, grad_biases = gradients
    rows, columns, _ = problem.sizes
    heads, width = query.shape[1], query.shape[-1]
    channels = problem.flags["CHANNELS"]
    logsumexp = logsumexp.contiguous()
    row_data = logsumexp.new_empty(3, logsumexp.numel(), dtype=torch.float32)
    scales = _score_scale(problem), problem.scale

    sums = sums_of(channels) if need_biases else []
    to_query = grad_query if need_query else query

    def launch_rows(constants: Constants, passes: slice = slice(None)) -> Tensor:
        """Returns the sums of score gradients of every program, head by head."""
        blocks = problem.blocks(columns if problem.packed else rows, constants["BLOCK_ROWS"])
        grid = problem.grid(blocks)
        partials = row_data.new_empty(heads, 1 + len(sums), grid[0])
        tensors = *problem.heads, grad, output, logsumexp
        arguments = *tensors, row_data, to_query, partials, *map(problem.strides, (*tensors, to_query)), *problem.terms
        arguments = *arguments, *problem.masks, *problem.sizes, heads, blocks, logsumexp.numel(), *scales
        for first in range(0, max(1, len(sums)), _SUMS)[passes]:
            is_first = first == 0
            some = {
                "ALL_SUMS": 1 + len(sums),
                "FIRST_SUM": 1 + first,
                "SUMS": tuple(sums[first : first + _SUMS]),
                "PREPARES": is_first and (need_key or need_value),
                "NEED_QUERY": is_first and need_query,
            }
            _launch(_backward_rows_kernel, grid, *arguments, **some, **problem.flags, **constants)
        return partials

    architecture = _architecture(query.device)
    pinned = backward_rows_constants(width, query.dtype, channels, architecture)
    kind = problem.kind("backward of rows", need_query, need_biases)
    partials = launch_rows(tuned(kind, pinned, lambda constants: launch_rows(constants, slice(1))))
    if need_biases and not sums:  # tables of one bucket change nothing
        grad_biases.zero_()
    elif need_biases:
        table = {"CHANNELS": channels, "ALL_SUMS": 1 + len(sums), "BLOCK": 1024, "num_warps": 4}
        entries = biases.numel() // heads, heads
        programs = partials.shape[2]
        _launch(_table_gradients_kernel, entries, partials, problem.terms[0], grad_biases, programs, heads, **table)

    if need_key or need_value:
        tensors = *problem.heads, grad
        targets = grad_key if need_key else key, grad_value if need_value else value
        strides = map(problem.strides, (*tensors, logsumexp, *targets))
        arguments = *tensors, row_data, *targets, *strides, *problem.terms, *problem.masks, *problem.sizes
        needs = {"NEED_KEY": need_key, "NEED_VALUE": need_value}

        def launch_keys(constants: Constants) -> None:
            blocks = problem.blocks(columns, constants["BLOCK_KEYS"])
            rest = heads, blocks, logsumexp.numel(), *scales
            grid = problem.grid(blocks)
            _launch(_backward_keys_kernel, grid, *arguments, *rest, **needs, **problem.flags, **constants)

        pinned = backward_keys_constants(width, query.dtype, channels, architecture)
        launch_keys(tuned(problem.kind("backward of keys", need_key, need_value), pinned, launch_keys))
    return tuple(gradients)


# The public functions check arguments in full; these keep addresses inside the tensors when an operator is called
# directly, with the sentences of the CPU kernels.


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: tuple,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    scale: float,
) -> _Problem:
    _check_heads(query, key, value, 4)
    batch, heads, rows, _ = query.shape
    columns = key.shape[2]
    for lengths in (query_lengths, key_lengths):
        if lengths is not None and (lengths.numel() != batch or lengths.dtype != torch.int64):
            raise ValueError("query_lengths, key_lengths: expected one int64 for each sequence")
    masks = *(None if lengths is None else lengths.contiguous() for lengths in (query_lengths, key_lengths)), None
    channels, described = _read_terms(*terms, heads, batch * rows, batch * columns)
    flags = {"CHANNELS": channels, "PACKED": False, "IS_CAUSAL": is_causal}
    return _Problem((query, key, value), described, masks, (rows, columns, batch), scale, flags)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: tuple,
    cu_seqlens: Tensor,
    max_seqlen: int,
    is_causal: bool,
    scale: float,
) -> _Problem:
    _check_heads(query, key, value, 3)
    tokens, heads, _ = query.shape
    wrong = cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype != torch.int32 or max_seqlen < 0
    if not wrong and is_on_cpu_to_look_at(cu_seqlens):
        lengths = cu_seqlens.diff()
        wrong = cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or bool(((lengths < 0) | (lengths > max_seqlen)).any())
    if wrong:
        raise ValueError(
            "cu_seqlens: expected int32 values that start at 0, never decrease, end at the number of tokens, and are "
            "at most max_seqlen apart"
        )
    channels, described = _read_terms(*terms, heads, tokens, tokens)
    flags = {"CHANNELS": channels, "PACKED": True, "IS_CAUSAL": is_causal}
    masks, sizes = (None, None, cu_seqlens.contiguous()), (tokens, max_seqlen, len(cu_seqlens) - 1)
    return _Problem((query, key, value), described, masks, sizes, scale, flags)


def _check_heads(query: Tensor, key: Tensor, value: Tensor, dims: int) -> None:
    if query.dim() != dims:
        raise ValueError(f"query: expected {dims} dimensions, got {query.dim()}")
    if query.dtype not in FLOATS:
        raise ValueError("query: expected dtype float32, bfloat16 or float16")
    if (
        not query.dtype == key.dtype == value.dtype
        or key.dim() != dims
        or key.shape != value.shape
        or key.shape[1] != query.shape[1]
        or key.shape[-1] != query.shape[-1]
        or key.shape[0] != query.shape[0]
    ):
        raise ValueError("query, key, value: expected shapes and dtypes that fit together")
    if not 1 <= query.shape[-1] <= 256:
        raise ValueError("query: expected a head size of 1 to 256")


def _read_terms(
    biases: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    boundaries: list[Tensor],
    kinds: list[int],
    bits: list[int],
    buckets: list[int],
    heads: int,
    query_tokens: int,
    key_tokens: int,
) -> tuple[tuple[tuple, ...], tuple]:
    """CHANNELS, and the kernels' arguments that describe the terms."""
    if len({len(each) for each in (queries, keys, boundaries, kinds, bits, buckets)}) != 1:
        raise ValueError("terms: expected lists of equal length")
    widths, counts, used = [], [], ([], [], [])
    for t, (query, key, kind, bit, size) in enumerate(zip(queries, keys, kinds, bits, buckets, strict=True)):
        is_code = kind in (_PREFIX.value, _MATCHES.value)
        one_value = kind == _GAP.value or bit != 0  # a channel: a position or a word
        levels, dtype = size - 1, torch.float32 if kind == _COSINE.value else torch.int64
        fits = 0 <= kind < len(KINDS) and (bit == 0 or is_code) and query.dim() >= (1 if one_value else 2)
        fits = fits and 1 <= size <= MAX_BUCKETS and query.dtype == key.dtype == dtype
        if fits:
            width = 1 if one_value else query.shape[-1]
            count = query.shape[-1 if one_value else -2]
            fits = query.numel() == query_tokens * count * width and key.numel() == key_tokens * count * width
            fits = fits and (bit == 0 or (bit > 0 and levels >= 1 and bit * levels <= 64))
            fits = fits and (not is_code or bit != 0 or width == levels)
            if kind == _COSINE.value:
                fits = fits and boundaries[t].numel() == levels and boundaries[t].dtype == torch.float32
        if not fits:
            raise ValueError(f"terms: tensors of term {t} do not fit together")
        widths.append(width)
        counts.append(count)
        for found, tensor in zip(used, (query, key, boundaries[t]), strict=True):
            found.extend([tensor.contiguous()] * count)
    channels = _channels(kinds, bits, buckets, widths, counts)
    if len(channels) > MAX_CHANNELS:
        raise ValueError(f"terms: got {len(channels)} channels together, expected at most {MAX_CHANNELS}")
    expected = sum(channel[_BUCKETS.value] for channel in channels) * heads
    if biases.numel() != expected or biases.dtype != torch.float32:
        raise ValueError(f"biases: got {biases.numel()} elements, expected {expected} of float32")
    return channels, (biases.contiguous(), *map(tuple, used))
