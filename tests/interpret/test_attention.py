"""The Triton kernels of similarity attention: tiles, sums in passes, long tables, tokens that nothing covers, NaN."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bbqrec_kernels import _autotune, similarity_attention_varlen
from bbqrec_kernels.similarity_attention import api
from bbqrec_kernels.similarity_attention import triton_kernels as tk
from bbqrec_kernels.testing import poisoned_outputs
from bbqrec_kernels.testing.similarity_attention import AttentionInputs, random_inputs, random_packed_inputs


def results(inputs: AttentionInputs, impl: str = "triton") -> dict[str, Tensor]:
    """Output and every gradient."""
    inputs = inputs.require_grad()
    grad = torch.randn(inputs.tensors["query"].shape, generator=torch.Generator().manual_seed(3))
    with poisoned_outputs():
        output = inputs.attend(impl)
        return {"output": output, **inputs.gradients(output, grad, list(inputs.tensors))}


def assert_like_float64(inputs: AttentionInputs) -> None:
    expected = results(inputs.to(torch.float64), "reference")
    for name, actual in results(inputs).items():
        error = (actual.double() - expected[name]).norm() / expected[name].norm().clamp(min=2)
        assert error < 3e-6, (name, float(error))


# Around 16, 32 and 64: rows and keys of a tile.
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(15, 17), (33, 31), (64, 64), (65, 129), (129, 65), (128, 192), (2, 96)])
def test_triton_tiles(rows: int, columns: int, is_causal: bool) -> None:
    inputs = random_inputs(batch=1, heads=1, rows=rows, columns=columns, width=9, channels=1, is_causal=is_causal)
    assert_like_float64(inputs)


@pytest.mark.parametrize("is_causal", [False, True])
def test_triton_wide_tiles_of_long_sequences(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    monkeypatch.setattr(tk, "_FORWARD", {9: tk._FORWARD[9] | {(64, True): (64, 128, 4, 2)}})  # as for bfloat16
    inputs = random_inputs(batch=1, heads=1, rows=70, columns=300, channels=1, is_causal=is_causal)
    assert_like_float64(inputs)
    channels = tk.channels_of("prefix", bits=3, buckets=4)
    tiles = [tk.forward_constants(64, torch.bfloat16, channels, keys, 90)["BLOCK_KEYS"] for keys in (200, 2048)]
    assert tiles == [64, 128]


@pytest.mark.parametrize("architecture", [80, 100, 120])
def test_triton_tiles_of_other_architectures(monkeypatch: pytest.MonkeyPatch, architecture: int) -> None:
    monkeypatch.setattr(tk, "_architecture", lambda _: architecture)
    if architecture == 120:  # has tiles of its own for the widest heads
        assert_like_float64(random_inputs(batch=1, heads=1, rows=20, width=200, channels=1, is_causal=True))
    kinds = {"kinds": ("prefix", "gap"), "channels": 1, "n_buckets": 12}
    assert_like_float64(random_inputs(batch=1, heads=1, rows=70, columns=90, is_causal=True, **kinds))


@pytest.mark.parametrize("n_buckets", [1, 2, 8, 9, 17, 18, 33])
def test_triton_tables_of_every_length(n_buckets: int) -> None:
    """In registers up to 17 buckets, 8 for a gap, and in memory; their gradients in passes of 16 sums."""
    generator = torch.Generator().manual_seed(n_buckets)
    far = tuple(torch.randint(0, 2 ** min(n_buckets, 62), (1, 20, 1), generator=generator) for _ in range(2))
    inputs = random_inputs(batch=1, heads=1, rows=20, kinds=("gap",), channels=1, n_buckets=n_buckets)
    assert_like_float64(replace(inputs, compared=(far,)))
    if n_buckets % 2 == 1:  # otherwise 0 is a boundary, and similarities are near it
        kinds = {"kinds": ("cosine",), "channels": 1, "n_buckets": n_buckets}
        assert_like_float64(random_inputs(batch=1, heads=1, rows=20, **kinds))


@pytest.mark.parametrize("kind", ["prefix", "matches"])
@pytest.mark.parametrize(("levels", "size"), [(1, 4), (4, 254), (4, 256), (8, 4), (16, 4), (16, 14)])
def test_triton_packed_words_give_the_bits_of_separate_codes(kind: str, levels: int, size: int) -> None:
    """Words of up to 32 bits, which are exactly filled by 4 levels of 254 codewords, and wider ones."""
    inputs = random_inputs(batch=1, heads=1, rows=20, kinds=(kind,), channels=1, levels=levels, codebook_size=size)
    packed, separate = results(inputs), results(replace(inputs, codebook_size=None))
    for name, tensor in packed.items():
        assert torch.equal(tensor, separate[name]), name


def test_triton_clears_tokens_that_no_sequence_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where starts are not looked at: zeros, and nothing is read out of bounds."""
    inputs = random_packed_inputs([5, 70, 9, 80], kinds=("prefix",), channels=1, is_causal=True)
    covered = {n: t if n.startswith("table") else t[5:84] for n, t in inputs.tensors.items()}
    inside = replace(
        inputs,
        tensors=covered,
        compared=tuple((left[5:84], right[5:84]) for left, right in inputs.compared),
        cu_seqlens=torch.tensor([0, 70, 79], dtype=torch.int32),
    )
    expected = results(inside, "reference")
    monkeypatch.setattr(tk, "is_on_cpu_to_look_at", lambda _: False)
    monkeypatch.setattr(api, "is_on_cpu_to_look_at", lambda _: False)
    some = replace(inputs, cu_seqlens=torch.tensor([5, 75, 84], dtype=torch.int32))
    grad = torch.randn(79, 2, 16, generator=torch.Generator().manual_seed(3))
    padded = torch.zeros(164, 2, 16)
    padded[5:84] = grad
    leaves = some.require_grad()
    with poisoned_outputs():
        output = leaves.attend("triton")
        found = {"output": output, **leaves.gradients(output, padded, list(leaves.tensors))}
    for name, tensor in found.items():
        if name.startswith("table"):
            torch.testing.assert_close(tensor, expected[name])
        else:
            torch.testing.assert_close(tensor[5:84], expected[name])
            assert (tensor[:5] == 0).all()
            assert (tensor[84:] == 0).all()


@pytest.mark.parametrize(
    ("starts", "longest"), [([0, 12, 20], 8), ([3, 43, 47], 40), ([0, 60, 77], 33), ([-9, 20, 900], 100), ([5, 50], 0)]
)
def test_triton_clears_tokens_beyond_the_longest_sequence(
    monkeypatch: pytest.MonkeyPatch, starts: list[int], longest: int
) -> None:
    """The test of the CUDA kernels, in tests/simt: a sequence may be longer than `max_seqlen` where nobody looks."""
    monkeypatch.setattr(tk, "is_on_cpu_to_look_at", lambda _: False)
    inputs = random_packed_inputs([77], kinds=("prefix",), channels=1)
    query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))
    masks = torch.tensor(starts, dtype=torch.int32), longest, True, 0.3
    arguments = query, key, value, *api._flatten(tuple(inputs.terms()), query), *masks
    with poisoned_outputs():
        output, logsumexp = tk.similarity_attention_varlen(*arguments)
        gradients = tk.similarity_attention_varlen_backward(output, output, logsumexp, *arguments, *[True] * 4)
    covered = torch.zeros(77, dtype=torch.bool)
    for start, end in pairwise(starts):
        covered[max(start, 0) : min(end, 77)][:longest] = True
    for tensor in (output, *gradients[:3]):
        assert tensor.isfinite().all()
        assert (tensor[~covered] == 0).all()
    assert (output[covered] != 0).all()
    assert gradients[3].isfinite().all()


def test_triton_clears_all_tokens_where_there_is_no_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_packed_inputs([5], kinds=("prefix",), channels=1).require_grad()
    monkeypatch.setattr(tk, "is_on_cpu_to_look_at", lambda _: False)
    monkeypatch.setattr(api, "is_on_cpu_to_look_at", lambda _: False)
    query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))
    packing = {"cu_seqlens": torch.zeros(1, dtype=torch.int32), "max_seqlen": 5, "impl": "triton"}
    with poisoned_outputs():
        output = similarity_attention_varlen(query, key, value, inputs.terms(), **packing)
        gradients = inputs.gradients(output, torch.ones_like(output), list(inputs.tensors))
    assert (output == 0).all()
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_triton_finds_what_it_knows_of_rows_past_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are 2^30 rows: their three numbers lie as far apart. Most of the memory is never touched."""
    inputs = random_inputs(batch=1, heads=1, rows=20, kinds=("prefix",), channels=1)
    expected = results(inputs)
    launch, far = tk._launch, {"row_data": torch.empty(2 * 2**30 + 20), "row_count": 2**30}

    def launch_far(kernel: object, grid: tuple, *arguments: object, **constants: object) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        moved = {name: far.get(name, argument) for name, argument in named.items()}
        launch(kernel, grid, *moved.values(), **constants)

    monkeypatch.setattr(tk, "_launch", launch_far)
    for name, tensor in results(inputs).items():
        assert torch.equal(tensor, expected[name]), name


def test_triton_gives_the_same_bits_twice() -> None:
    inputs = random_packed_inputs([3, 70, 20], kinds=("prefix", "gap"), channels=1, is_causal=True)
    for one, other in zip(results(inputs).values(), results(inputs).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("poisoned", ["query", "key", "value", "grad"])
def test_triton_nan_beyond_the_diagonal_of_a_tile_stays_there(poisoned: str) -> None:
    """Rows that do not see a token, and tokens that a row does not see, keep their outputs and gradients."""
    clean = random_inputs(batch=1, heads=1, rows=70, kinds=("prefix",), channels=1, is_causal=True).require_grad()
    dirty = clean.require_grad()
    grad, at = torch.randn(1, 1, 70, 16), 40
    dirty_grad = grad.clone()
    with torch.no_grad():
        (dirty_grad if poisoned == "grad" else dirty.tensors[poisoned])[0, 0, at] = torch.nan
    names = ["query", "key", "value"]
    outputs = [inputs.attend("triton") for inputs in (clean, dirty)]
    ups = (grad, dirty_grad)
    gradients = [i.gradients(o, g, names) for i, o, g in zip((clean, dirty), outputs, ups, strict=True)]
    found = {"output": [o[0, 0] for o in outputs]} | {name: [g[name][0, 0] for g in gradients] for name in names}
    row = torch.arange(70)
    is_row_bad = row == at if poisoned in ("query", "grad") else row >= at
    # A key that a bad row sees has a bad gradient: of one bad row those before it, of all rows from `at` on all keys.
    is_key_bad = row <= at if poisoned in ("query", "grad") else row >= 0
    bad = {"output": is_row_bad & (poisoned != "grad"), "query": is_row_bad, "key": is_key_bad, "value": is_key_bad}
    if poisoned == "value":
        bad["value"] = row < 0  # weights do not depend on values
    for name, (expected, actual) in found.items():
        assert torch.equal(actual.isnan().all(-1), bad[name]), name
        torch.testing.assert_close(actual[~bad[name]], expected[~bad[name]])


def test_triton_nan_reaches_the_gradient_of_the_first_bucket() -> None:
    """It is what the others leave of a sum that is zero, or NaN: here no pair of the bad row is in another bucket."""
    inputs = random_inputs(batch=1, heads=1, rows=20, kinds=("prefix",), channels=1).require_grad()
    inputs.compared[0][0][0, 3] = -1
    with torch.no_grad():
        inputs.tensors["query"][0, 0, 3] = torch.nan
    output = inputs.attend("triton")
    (gradient,) = inputs.gradients(output, torch.ones_like(output), ["table0"]).values()
    assert gradient[0, 0].isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("kinds", [("prefix",), ("gap", "cosine")])
def test_triton_gives_the_same_with_every_tile_that_tuning_may_choose(
    monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]
) -> None:
    """Each is run for its result here, in place of a measurement."""
    inputs = random_packed_inputs([3, 70], heads=1, kinds=kinds, channels=1, n_buckets=33, is_causal=True)
    expected = results(inputs)
    tried = []
    for change in range(8):

        def choose(_kind: object, pinned: dict, _run: object, change: int = change) -> dict:
            tiles = _autotune.neighbours(pinned)
            tried.append(tiles[change % len(tiles)])
            return tried[-1]

        monkeypatch.setattr(tk, "tuned", choose)
        for name, tensor in results(inputs).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=f"{name} with {tried[-1]}")
    assert len(tried) == 3 * 8


def test_triton_measures_launches_that_add_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(batch=1, heads=1, rows=40, kinds=("gap",), channels=1, n_buckets=33)
    expected = results(inputs)
    kinds = []

    def run_thrice(kind: object, pinned: dict, run: object) -> dict:
        kinds.append(kind[0])
        for _ in range(3):
            run(pinned)
        return pinned

    monkeypatch.setattr(tk, "tuned", run_thrice)
    for name, tensor in results(inputs).items():
        assert torch.equal(tensor, expected[name]), name
    assert kinds == ["forward", "backward of rows", "backward of keys"]
