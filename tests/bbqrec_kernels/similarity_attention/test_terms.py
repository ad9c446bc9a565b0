"""Buckets of every kind of term, packing, and the reference against a formula written with loops."""

import math

import pytest
import torch
from torch import Tensor

from bbqrec_kernels import PackedCodes, cosine, gap, matches, pack, prefix, similarity_attention
from bbqrec_kernels.similarity_attention.reference import buckets
from bbqrec_kernels.testing.similarity_attention import random_inputs

pytestmark = pytest.mark.usefixtures("target")
LOWEST, HIGHEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def buckets_seen(term, rows: int, columns: int, impl: str) -> Tensor:
    """`(Sq, Sk)` buckets as an implementation finds them, read off attention over the one-hot values."""
    n_buckets = term.bias.shape[2]
    found = torch.full((rows, columns), -1)
    query, key, value = torch.zeros(1, 1, rows, columns), torch.zeros(1, 1, columns, columns), torch.eye(columns)
    for bucket in range(n_buckets):  # everything else is forbidden: weights are positive where the bucket is this one
        table = torch.full_like(term.bias, -torch.inf)
        table[..., bucket] = 0
        weights = similarity_attention(query, key, value[None, None], term._replace(bias=table), impl=impl)[0, 0]
        assert (found[weights > 0] == -1).all()
        found[weights > 0] = bucket
    return found


@pytest.mark.parametrize("codebook_size", [None, 4, 2**20])
def test_prefix_and_matches_count_levels(impl: str, codebook_size: int | None) -> None:
    left = torch.tensor([[3, 1, 2], [3, 1, 0], [3, 0, 2], [0, 1, 2], [-1, 1, 2], [3, -1, 2]])
    expected_prefix = [[3, 2, 1, 0, 0, 1], [2, 3, 1, 0, 0, 1], [1, 1, 3, 0, 0, 1]]
    expected_matches = [[3, 2, 2, 2, 2, 2], [2, 3, 1, 1, 1, 1], [2, 1, 3, 1, 1, 2]]
    for kind, expected in ((prefix, expected_prefix), (matches, expected_matches)):
        term = kind(
            left[None, :3, None],
            torch.zeros(1, 1, 4),
            key_codes=left[None, :, None],
            codebook_size=codebook_size,
        )
        assert buckets_seen(term, 3, 6, impl).tolist() == expected


@pytest.mark.parametrize("codebook_size", [None, 4])
def test_negative_codes_agree_with_nothing_not_even_themselves(impl: str, codebook_size: int | None) -> None:
    codes = torch.tensor([[-1, -1], [-7, -7]])[None, :, None]
    for kind in (prefix, matches):
        term = kind(codes, torch.zeros(1, 1, 3), codebook_size=codebook_size)
        assert buckets_seen(term, 2, 2, impl).tolist() == [[0, 0], [0, 0]]


def test_gap_is_the_bit_length_of_the_distance(impl: str) -> None:
    keys = [0, 1, 2, 3, 4, 7, 8, 2**31, 2**62, HIGHEST, -1, -4, LOWEST]
    for origin in (0, 5, HIGHEST, LOWEST):
        term = gap(
            torch.tensor([origin])[None, :, None],
            torch.zeros(1, 1, 64),
            key_positions=torch.tensor(keys)[None, :, None],
        )
        expected = [min(abs(origin - k).bit_length(), 63) for k in keys]
        assert buckets_seen(term, 1, len(keys), impl)[0].tolist() == expected


def test_gap_on_both_sides_of_every_power_of_two(impl: str) -> None:
    distances = [2**bits + step for bits in range(2, 29) for step in (-1, 0, 1)]  # near ones: a float may round them
    term = gap(
        torch.zeros(1, 1, 1, dtype=torch.int64),
        torch.zeros(1, 1, 64),
        key_positions=torch.tensor(distances)[None, :, None],
    )
    expected = [distance.bit_length() for distance in distances]
    assert buckets_seen(term, 1, len(distances), impl)[0].tolist() == expected


def test_gap_puts_what_is_too_far_into_the_last_bucket(impl: str) -> None:
    term = gap(
        torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 4), key_positions=torch.arange(9)[None, :, None]
    )
    assert buckets_seen(term, 1, 9, impl)[0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("boundaries", "expected"),
    [
        (None, [0, 0, 1, 2, 3, 3]),  # -0.5, 0, 0.5; a similarity equal to a boundary belongs to the bucket above
        (torch.tensor([-1.0, 0.0, 1.0]), [1, 1, 1, 2, 2, 3]),
        (torch.tensor([2.0, 2.0, 3.0]), [0, 0, 0, 0, 0, 0]),
    ],
)
def test_cosine_searches_the_boundaries(impl: str, boundaries: Tensor | None, expected: list[int]) -> None:
    similarities = torch.tensor([-1.0, -0.51, -0.5, 0.25, 0.5, 1.0])
    keys = torch.stack([similarities, (1 - similarities.square()).sqrt()], -1)
    term = cosine(
        torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 4), key_vectors=keys[None, :, None], boundaries=boundaries
    )
    assert buckets_seen(term, 1, 6, impl)[0].tolist() == expected


def test_one_bucket_holds_everything(impl: str) -> None:
    for term in (
        cosine(torch.randn(1, 3, 1, 2), torch.zeros(1, 1, 1)),
        gap(torch.arange(3)[None, :, None], torch.zeros(1, 1, 1)),
    ):
        assert buckets_seen(term, 3, 3, impl).tolist() == [[0, 0, 0]] * 3


def test_nan_vector_makes_its_scores_nan(impl: str) -> None:
    vectors = torch.ones(1, 3, 1, 2)
    vectors[0, 1] = torch.nan
    term = cosine(vectors, torch.zeros(1, 1, 5))
    attended = similarity_attention(*torch.randn(3, 1, 1, 3, 4), term, is_causal=True, impl=impl)
    assert attended[0, 0].isnan().any(-1).tolist() == [False, True, True]


def test_words_use_all_bits_up_to_64(kernel: str) -> None:
    """32 levels would be too many; 16 levels of 4 bits fill the word, and 15 codewords need their 2 sentinels."""
    codes = torch.randint(-1, 14, (50, 1, 16), generator=torch.Generator().manual_seed(0))
    codes[25:, :, :12] = codes[:25, :, :12]
    packed = pack(codes, 14)
    assert packed.bits == 4
    assert packed.query.dtype == torch.int64
    assert (packed.query < 0).any()  # the sign bit is in use
    term = matches(packed, torch.zeros(1, 1, 17))
    assert term.bits == 4
    plain = matches(codes, torch.zeros(1, 1, 17))
    assert plain.bits == 0
    batched = [t._replace(query=t.query[None], key=t.key[None]) for t in (term, plain)]
    expected = buckets(batched[1], 0)[0][0]
    words = [t if t is None else t[None] for t in (term.query_words, term.key_words)]
    seen = buckets_seen(batched[0]._replace(query_words=words[0], key_words=words[1]), 50, 50, kernel)
    assert torch.equal(seen, expected)
    assert pack(codes, 15).bits == 0  # 5 bits a level: 80 bits
    assert pack(codes, 15).query is None


@pytest.mark.parametrize("codebook_size", [1, 2, 3, 6, 7, 254, 255, 256, 1022, 1023])
def test_fields_hold_the_codes_and_two_sentinels(codebook_size: int) -> None:
    packed = pack(torch.tensor([[[0, codebook_size - 1, -1]]]), codebook_size)
    assert packed.bits == math.ceil(math.log2(codebook_size + 2))
    fields = [
        [(int(word) >> (level * packed.bits)) & ((1 << packed.bits) - 1) for level in range(3)]
        for word in (packed.query, packed.key)
    ]
    assert fields == [[0, codebook_size - 1, codebook_size], [0, codebook_size - 1, codebook_size + 1]]


def test_packing_exports_where_the_number_of_tokens_is_data() -> None:
    class Chosen(torch.nn.Module):
        def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
            packed = pack(codes[(codes >= 0).all(-1).all(-1)], 5)
            return packed.query, packed.key

    codes = torch.tensor([[[0, 4]], [[-1, 3]], [[2, 2]]])
    program = torch.export.export(Chosen(), (codes,)).module()
    for given in (codes, codes.flip(0), codes.clamp_min(0), torch.full_like(codes, -1)):  # of the last, none is left
        for found, expected in zip(program(given), Chosen()(given), strict=True):
            assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="expected all codes below codebook_size"):
        program(codes + 1)


def test_packed_codes_serve_as_query_and_as_key() -> None:
    inputs = random_inputs(kinds=("prefix",), rows=5, columns=6)
    (left, right), table = inputs.compared[0], inputs.tensors["table0"]
    size = inputs.codebook_size
    expected = prefix(left, table, key_codes=right, codebook_size=size)
    packed = prefix(pack(left, size), table, key_codes=pack(right, size))
    assert isinstance(pack(left, size), PackedCodes)
    assert torch.equal(packed.query_words, expected.query_words)
    assert torch.equal(packed.key_words, expected.key_words)
    own = prefix(pack(left, size), table)
    assert not torch.equal(own.query_words, own.key_words)  # their sentinels differ


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_of_codes(dtype: torch.dtype, kernel: str) -> None:
    codes = torch.tensor([[[[0, 1]], [[0, 2]]]], dtype=dtype)
    for codebook_size in (None, 3):
        term = prefix(codes, torch.zeros(1, 1, 3), codebook_size=codebook_size)
        assert buckets_seen(term, 2, 2, kernel).tolist() == [[2, 1], [1, 2]]


def attention_with_loops(inputs) -> Tensor:
    """The formula of DESIGN 3.4, pair by pair, in Python floats."""
    query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))
    (batch, heads, rows, width), columns = query.shape, key.shape[2]
    output = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                if inputs.query_lengths is not None and i >= inputs.query_lengths[b]:
                    continue
                scores = {}
                for j in range(columns):
                    if inputs.is_causal and j > i + columns - rows:
                        continue
                    if inputs.key_lengths is not None and j >= inputs.key_lengths[b]:
                        continue
                    score = float(query[b, h, i].double() @ key[b, h, j].double()) / math.sqrt(width)
                    for index, (kind, (left, right)) in enumerate(zip(inputs.kinds, inputs.compared, strict=True)):
                        table = inputs.tensors[f"table{index}"]
                        for m in range(table.shape[0]):
                            score += float(
                                table[m, h, bucket_of_pair(kind, left[b, i, m], right[b, j, m], table.shape[2])]
                            )
                    scores[j] = score
                highest = max(scores.values(), default=-math.inf)
                if highest == -math.inf:
                    continue
                weights = {j: math.exp(score - highest) for j, score in scores.items()}
                for j, weight in weights.items():
                    output[b, h, i] += weight / sum(weights.values()) * value[b, h, j].double()
    return output


def bucket_of_pair(kind: str, a: Tensor, b: Tensor, n_buckets: int) -> int:
    if kind == "gap":
        return min(abs(int(a) - int(b)).bit_length(), n_buckets - 1)
    if kind == "cosine":
        similarity = float(a.double() @ b.double())
        return sum(-1 + 2 * (k + 1) / n_buckets <= similarity for k in range(n_buckets - 1))
    agree = [x == y and x >= 0 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return sum(agree) if kind == "matches" else [*agree, False].index(False)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 5), (5, 2)])
def test_reference_is_the_formula(rows: int, columns: int, is_causal: bool) -> None:
    for with_lengths in (False, True):
        inputs = random_inputs(
            batch=3, rows=rows, columns=columns, kinds=("prefix", "matches", "cosine", "gap"), is_causal=is_causal
        ).to(torch.float64)
        inputs.tensors["table0"][0, 0, 1] = -torch.inf
        if with_lengths:
            lengths = {"query_lengths": torch.tensor([rows, 1, 0]), "key_lengths": torch.tensor([0, columns, 1])}
            inputs = type(inputs)(**{**inputs.__dict__, **lengths})
        torch.testing.assert_close(inputs.attend("reference"), attention_with_loops(inputs), rtol=1e-12, atol=1e-12)


def test_reference_is_differentiated_right() -> None:
    inputs = random_inputs(batch=1, rows=3, columns=4, width=3, kinds=("prefix", "gap"), is_causal=True).to(
        torch.float64
    )
    names = list(inputs.tensors)

    def attend(*tensors: Tensor) -> Tensor:
        return type(inputs)(**{**inputs.__dict__, "tensors": dict(zip(names, tensors, strict=True))}).attend(
            "reference"
        )

    leaves = [tensor.requires_grad_() for tensor in inputs.tensors.values()]
    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)
