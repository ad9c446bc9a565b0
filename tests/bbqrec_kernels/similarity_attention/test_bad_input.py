"""Every wrong argument gets one sentence that names it, what came and what was expected."""

import re

import pytest
import torch

from bbqrec_kernels import cosine, gap, matches, pack, prefix, similarity_attention, similarity_attention_varlen

QUERY = torch.zeros(2, 3, 5, 8)  # (B, H, S, D)
PACKED = torch.zeros(5, 3, 8)  # (T, H, D)
CODES = torch.zeros(2, 5, 1, 4, dtype=torch.int64)
TABLE = torch.zeros(1, 3, 5)
STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)


def attend(query=QUERY, key=QUERY, value=QUERY, terms=None, **options):
    return similarity_attention(query, key, value, terms, **options)


def attend_packed(query=PACKED, key=PACKED, value=PACKED, terms=None, cu_seqlens=STARTS, max_seqlen=3, **options):
    return similarity_attention_varlen(
        query, key, value, terms, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **options
    )


WRONG = {
    "query is no tensor": (lambda: attend(query=[1.0]), TypeError, "query: got list, expected a torch.Tensor"),
    "integer query": (
        lambda: attend(query=QUERY.long()),
        TypeError,
        "query: got dtype int64, expected float32 or bfloat16 or float16 or float64",
    ),
    "mixed dtypes": (
        lambda: attend(key=QUERY.half()),
        TypeError,
        "key: got dtype float16, expected float32 like query; mixed dtypes are not supported",
    ),
    "dimensions": (
        lambda: attend(query=QUERY[0]),
        ValueError,
        "query: got shape (3, 5, 8), expected 4 dimensions (B, H, S, D)",
    ),
    "grouped heads": (
        lambda: attend(key=QUERY[:, :1], value=QUERY[:, :1]),
        ValueError,
        "key: got 1 heads, expected 3 like query; grouped heads are not supported: repeat key and value",
    ),
    "head size of key": (
        lambda: attend(key=QUERY[..., :4]),
        ValueError,
        "key: got shape (2, 3, 5, 4), expected size 8 in dimension -1 (head size of query)",
    ),
    "batch of value": (
        lambda: attend(value=QUERY[:1]),
        ValueError,
        "value: got shape (1, 3, 5, 8), expected size 2 in dimension 0 (batch of query)",
    ),
    "value and key": (
        lambda: attend(value=QUERY[:, :, :4]),
        ValueError,
        "value: got shape (2, 3, 4, 8), expected (2, 3, 5, 8) like key",
    ),
    "head size": (
        lambda: attend(*[torch.zeros(1, 1, 1, 257)] * 3),
        ValueError,
        "query: got head size 257, expected 1 to 256",
    ),
    "head size of zero": (
        lambda: attend(*[torch.zeros(1, 1, 1, 0)] * 3),
        ValueError,
        "query: got head size 0, expected 1 to 256",
    ),
    "terms": (
        lambda: attend(terms=TABLE),
        TypeError,
        "terms: got Tensor, expected what prefix, matches, cosine, gap return, or a list of it",
    ),
    "list of terms": (
        lambda: attend(terms=[TABLE]),
        TypeError,
        "terms: got a Tensor, expected what prefix, matches, cosine, gap return",
    ),
    "too many channels": (
        lambda: attend(terms=[prefix(CODES.expand(2, 5, 5, 4), TABLE.expand(5, 3, 5))] * 2),
        ValueError,
        "terms: got 10 channels together, expected at most 8",
    ),
    "tokens of terms": (
        lambda: attend(terms=prefix(CODES[:, :4], TABLE)),
        ValueError,
        "terms: prefix got query tensors of shape (2, 4, 1, 4), expected (2, 5, M, ·) to go with query",
    ),
    "tokens of key terms": (
        lambda: attend(terms=gap(CODES[..., 0], TABLE, key_positions=CODES[:, :4, :, 0])),
        ValueError,
        "terms: gap got key tensors of shape (2, 4, 1), expected (2, 5, M, ·) to go with key",
    ),
    "heads of bias": (
        lambda: attend(terms=prefix(CODES, TABLE[:, :1])),
        ValueError,
        "bias: got 1 heads, expected 3 like query",
    ),
    "double bias": (
        lambda: attend(terms=prefix(CODES, TABLE.double())),
        TypeError,
        "bias: got dtype float64, expected float32 for query of float32",
    ),
    "single bias": (
        lambda: attend(*[QUERY.double()] * 3, terms=prefix(CODES, TABLE)),
        TypeError,
        "bias: got dtype float32, expected float64 for query of float64",
    ),
    "dtype of lengths": (
        lambda: attend(key_lengths=torch.ones(2)),
        TypeError,
        "key_lengths: got dtype float32, expected int64 or int32 or int16 or int8 or uint8",
    ),
    "shape of lengths": (
        lambda: attend(query_lengths=torch.ones(3, dtype=torch.int64)),
        ValueError,
        "query_lengths: got shape (3,), expected size 2 in dimension 0 (batch of query)",
    ),
    "device": (
        lambda: attend(key=QUERY.to("meta")),
        ValueError,
        "key: got device meta, expected cpu like query; move it there",
    ),
    "packed dimensions": (
        lambda: attend_packed(query=QUERY),
        ValueError,
        "query: got shape (2, 3, 5, 8), expected 3 dimensions (T, H, D)",
    ),
    "packed tokens": (
        lambda: attend_packed(key=PACKED[:4], value=PACKED[:4]),
        ValueError,
        "key: got 4 tokens, expected 5 like query",
    ),
    "dtype of cu_seqlens": (
        lambda: attend_packed(cu_seqlens=STARTS.long()),
        TypeError,
        "cu_seqlens: got dtype int64, expected int32",
    ),
    "start of cu_seqlens": (
        lambda: attend_packed(cu_seqlens=STARTS + 1),
        ValueError,
        "cu_seqlens: got [1] at the start, expected 0",
    ),
    "empty cu_seqlens": (
        lambda: attend_packed(cu_seqlens=STARTS[:0]),
        ValueError,
        "cu_seqlens: got [] at the start, expected 0",
    ),
    "end of cu_seqlens": (
        lambda: attend_packed(cu_seqlens=STARTS[:2]),
        ValueError,
        "cu_seqlens: got 2 at the end, expected 5, the number of tokens of query",
    ),
    "order of cu_seqlens": (
        lambda: attend_packed(cu_seqlens=torch.tensor([0, 3, 2, 5], dtype=torch.int32)),
        ValueError,
        "cu_seqlens: got 2 after 3 at index 2, expected values that never decrease",
    ),
    "max_seqlen": (
        lambda: attend_packed(max_seqlen=2),
        ValueError,
        "max_seqlen: got 2, expected at least 3, the longest sequence of cu_seqlens",
    ),
    "size of max_seqlen": (
        lambda: attend_packed(max_seqlen=2**40),
        ValueError,
        "max_seqlen: got 1099511627776, expected 0 to 2**31 - 1",
    ),
    "kind of is_causal": (lambda: attend(is_causal="no"), TypeError, "is_causal: got str, expected a bool"),
    "kind of scale": (lambda: attend_packed(scale="a"), TypeError, "scale: got str, expected a float"),
    "number as terms": (
        lambda: attend(terms=5),
        TypeError,
        "terms: got int, expected what prefix, matches, cosine, gap return, or a list of it",
    ),
    "mapping as terms": (
        lambda: attend(terms={}),
        TypeError,
        "terms: got dict, expected what prefix, matches, cosine, gap return, or a list of it",
    ),
    "sparse query": (
        lambda: attend(query=QUERY.to_sparse()),
        TypeError,
        "query: got layout sparse_coo, expected a dense tensor; convert it with .to_dense()",
    ),
    "dimensions of key_vectors": (
        lambda: cosine(CODES.float(), TABLE, key_vectors=torch.zeros(4)),
        ValueError,
        "key_vectors: got shape (4,), expected 4 dimensions like vectors",
    ),
    "dimensions of key_positions": (
        lambda: gap(CODES[..., 0], TABLE, key_positions=torch.tensor(3)),
        ValueError,
        "key_positions: got shape (), expected 3 dimensions like positions",
    ),
    "kind of codebook_size": (lambda: pack(CODES, 4.0), TypeError, "codebook_size: got float, expected an int"),
    "largest codebook_size": (
        lambda: pack(CODES, 2**63 - 1),
        ValueError,
        "codebook_size: got 9223372036854775807, expected at least 1 and less than 2**62",
    ),
    "kind of max_seqlen": (
        lambda: attend_packed(max_seqlen=3.0),
        TypeError,
        "max_seqlen: got float, expected an int",
    ),
    "kind of codes": (lambda: prefix([1], TABLE), TypeError, "codes: got list, expected a torch.Tensor"),
    "dtype of codes": (
        lambda: matches(CODES.float(), TABLE),
        TypeError,
        "codes: got dtype float32, expected int64 or int32 or int16 or int8 or uint8",
    ),
    "one dimension of codes": (
        lambda: prefix(CODES[0, 0, 0], TABLE),
        ValueError,
        "codes: got shape (4,), expected (..., M, L)",
    ),
    "levels": (
        lambda: prefix(CODES[..., :1].expand(2, 5, 1, 17), torch.zeros(1, 3, 18)),
        ValueError,
        "codes: got 17 levels, expected 1 to 16",
    ),
    "buckets for levels": (
        lambda: prefix(CODES, TABLE[..., :4]),
        ValueError,
        "bias: got 4 buckets, expected 5 for codes of 4 levels",
    ),
    "channels of bias": (
        lambda: prefix(CODES, TABLE.expand(2, 3, 5)),
        ValueError,
        "bias: got 2 channels, expected 1 like codes (..., M, L) of shape (2, 5, 1, 4)",
    ),
    "levels of key_codes": (
        lambda: prefix(CODES, TABLE, key_codes=CODES[..., :3]),
        ValueError,
        "key_codes: got shape (2, 5, 1, 3), expected size 4 in dimension -1 (levels of codes)",
    ),
    "key_codes to be packed that are too large": (
        lambda: prefix(CODES, TABLE, key_codes=torch.full_like(CODES, 12), codebook_size=4),
        ValueError,
        "key_codes: got 12, expected codes below codebook_size=4",
    ),
    "key_codes to be packed that are no integers": (
        lambda: prefix(CODES, TABLE, key_codes=CODES.float(), codebook_size=4),
        TypeError,
        "key_codes: got dtype float32, expected int64",
    ),
    "channels of key_codes": (
        lambda: prefix(CODES, TABLE, key_codes=CODES.expand(2, 5, 2, 4)),
        ValueError,
        "key_codes: got shape (2, 5, 2, 4), expected size 1 in dimension -2 (channels of codes)",
    ),
    "packed unlike": (
        lambda: prefix(pack(CODES, 4), TABLE, key_codes=pack(CODES, 5)),
        ValueError,
        "key_codes: got codes packed for codebook_size=5, expected 4 like codes",
    ),
    "packed twice": (
        lambda: prefix(pack(CODES, 4), TABLE, codebook_size=5),
        ValueError,
        "codebook_size: got 5, but codes were packed for 4; give neither",
    ),
    "code too large": (
        lambda: pack(CODES + 4, 4),
        ValueError,
        "codes: got 4, expected codes below codebook_size=4",
    ),
    "codebook_size": (lambda: pack(CODES, 0), ValueError, "codebook_size: got 0, expected at least 1 and less"),
    "dimensions of bias": (
        lambda: gap(CODES[..., 0], TABLE[0]),
        ValueError,
        "bias: got shape (3, 5), expected 3 dimensions (M, H, n_buckets)",
    ),
    "dtype of bias": (
        lambda: gap(CODES[..., 0], TABLE.half()),
        TypeError,
        "bias: got dtype float16, expected float32 or float64",
    ),
    "too many buckets": (
        lambda: gap(CODES[..., 0], torch.zeros(1, 3, 65)),
        ValueError,
        "bias: got 65 buckets, expected 1 to 64",
    ),
    "positions of float": (
        lambda: gap(CODES[..., 0].float(), TABLE),
        TypeError,
        "positions: got dtype float32, expected int64",
    ),
    "vectors of integers": (
        lambda: cosine(CODES, TABLE),
        TypeError,
        "vectors: got dtype int64, expected float32 or bfloat16 or float16 or float64",
    ),
    "width of key_vectors": (
        lambda: cosine(CODES.float(), TABLE, key_vectors=CODES[..., :2].float()),
        ValueError,
        "key_vectors: got shape (2, 5, 1, 2), expected size 4 in dimension -1 (width of vectors)",
    ),
    "number of boundaries": (
        lambda: cosine(CODES.float(), TABLE, boundaries=torch.zeros(5)),
        ValueError,
        "boundaries: got shape (5,), expected size 4 in dimension 0 (n_buckets of bias, less one)",
    ),
    "order of boundaries": (
        lambda: cosine(CODES.float(), TABLE, boundaries=torch.tensor([0.0, 1.0, 0.5, 2.0])),
        ValueError,
        "boundaries: got [0.0, 1.0, 0.5, 2.0], expected values that ascend; sort them",
    ),
    "NaN boundaries": (
        lambda: cosine(CODES.float(), TABLE, boundaries=torch.full((4,), torch.nan)),
        ValueError,
        "boundaries: got [nan, nan, nan, nan], expected values that ascend; sort them",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        call()


def test_the_right_arguments_pass() -> None:
    """What the table above starts from is valid, so each message comes from the one thing that is wrong."""
    attend(terms=[prefix(CODES, TABLE), matches(CODES, TABLE), gap(CODES[..., 0], TABLE), cosine(CODES.float(), TABLE)])
    attend_packed(terms=prefix(pack(CODES[0], 4), TABLE))
