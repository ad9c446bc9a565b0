"""The layers against direct formulas: what a step changes, what revival moves, which tokens attention compares."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from bbqrec_kernels import (
    ResidualQuantizer,
    SimilarityAttention,
    codebook_usage,
    cosine,
    matches,
    pack,
    residual_decode,
    residual_kmeans,
    residual_quantize,
)

DECAY = 0.75


def quantizer(dim: int = 6, levels: int = 2, codebook_size: int = 4, **options) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(dim, levels, codebook_size, **options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestTraining:
    def test_by_gradient_it_is_the_operator_and_codebooks_learn(self) -> None:
        layer, x = quantizer(), torch.randn(3, 5, 6, requires_grad=True)
        codebooks, like = layer.codebooks.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
        for result in (found := layer(x), expected := residual_quantize(like, codebooks)):
            (result.codebook_loss.sum() + 0.25 * result.commitment_loss.sum() + result.quantized.sum()).backward()
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got, wanted)
        assert layer.codebooks.grad.abs().sum() > 0
        assert torch.equal(layer.codebooks.grad, codebooks.grad)
        assert torch.equal(x.grad, like.grad)
        assert torch.equal(layer.decode(found.codes), residual_decode(found.codes, codebooks))
        assert [name for name, _ in layer.named_parameters()] == ["codebooks"]

    def test_averages_are_their_formula(self) -> None:
        layer = quantizer(ema_decay=DECAY)
        assert not list(layer.parameters())
        codebooks = layer.codebooks.double()
        counts, sums = torch.ones(2, 4).double(), codebooks.clone()
        for _ in range(4):
            x = torch.randn(7, 6)
            result = layer(x)
            before, residual = codebooks.clone(), x.double()
            for level in range(2):
                for k in range(4):
                    chosen = result.codes[:, level] == k
                    counts[level, k] = DECAY * counts[level, k] + (1 - DECAY) * chosen.sum()
                    sums[level, k] = DECAY * sums[level, k] + (1 - DECAY) * residual[chosen].sum(0)
                    if chosen.any():
                        codebooks[level, k] = sums[level, k] / counts[level, k]
                residual = residual - before[level, result.codes[:, level]]
            torch.testing.assert_close(layer.codebooks.double(), codebooks, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(layer.ema_counts.double(), counts)
            assert torch.equal(result.quantized, residual_decode(result.codes, before.float()))  # not yet the new ones
            codebooks, sums = layer.codebooks.double(), layer.ema_sums.double()

    def test_a_codeword_out_of_use_neither_moves_nor_becomes_nan(self) -> None:
        layer = quantizer(codebook_size=2, levels=1, ema_decay=0.5)
        layer.codebooks.copy_(torch.tensor([[[0.0] * 6, [100.0] * 6]]))
        for _ in range(400):  # 0.5^400 is no float32
            layer(torch.randn(8, 6))
        assert torch.equal(layer.codebooks[0, 1], torch.full((6,), 100.0))
        layer(torch.full((1, 6), 90.0))
        torch.testing.assert_close(layer.codebooks[0, 1], torch.full((6,), 90.0))

    def test_the_backward_reads_the_codebooks_that_were_searched(self) -> None:
        layer, x = quantizer(ema_decay=DECAY), torch.randn(9, 6)
        before, grads = layer.codebooks.clone(), []
        for quantize in (layer, lambda rows: residual_quantize(rows, before)):
            rows = x.clone().requires_grad_()
            quantize(rows).commitment_loss.sum().backward()
            grads.append(rows.grad)
        assert torch.equal(*grads)
        assert not torch.equal(layer.codebooks, before)

    @pytest.mark.parametrize("ema_decay", [None, DECAY])
    def test_unused_steps_are_counted_in_training_only(self, ema_decay: float | None) -> None:
        layer, expected = quantizer(codebook_size=8, ema_decay=ema_decay), torch.zeros(2, 8, dtype=torch.int64)
        for _ in range(5):
            codes = layer(torch.randn(4, 6)).codes
            for level in range(2):
                for k in range(8):
                    expected[level, k] = 0 if (codes[:, level] == k).any() else expected[level, k] + 1
            assert torch.equal(layer.steps_unused, expected)
        assert expected.max() > 1
        state = copy.deepcopy(layer.eval().state_dict())
        layer(torch.randn(4, 6))
        for name, value in layer.state_dict().items():
            assert torch.equal(value, state[name]), name

    def test_random_rows_are_drawn_on_the_cpu_whatever_the_default_device(self) -> None:
        x, layer = torch.randn(3, 6), quantizer(codebook_size=8)
        layer.steps_unused.fill_(9)
        found = []
        for device in ("cpu", "meta"):
            draw = torch.Generator().manual_seed(0)
            with torch.device(device):
                found.append(residual_kmeans(x, 2, 8, generator=draw))
                layer.revive(x, window=1, generator=draw)
        assert torch.equal(*found)

    def test_a_bad_row_leaves_the_averages_healthy(self) -> None:
        layer, alone = quantizer(ema_decay=DECAY), quantizer(ema_decay=DECAY)
        rows = torch.randn(5, 6)
        assert (layer(torch.cat([rows, torch.full((1, 6), torch.nan)])).codes[-1] == -1).all()
        alone(rows)
        assert torch.equal(layer.codebooks, alone.codebooks)

    @pytest.mark.parametrize("ema_decay", [None, DECAY])
    def test_saved_and_loaded_it_goes_on_as_if_nothing_was(self, ema_decay: float | None) -> None:
        layer, batches = quantizer(ema_decay=ema_decay), torch.randn(6, 5, 6)
        for x in batches[:3]:
            layer(x)
        other = ResidualQuantizer(6, 2, 4, ema_decay=ema_decay)
        other.load_state_dict(layer.state_dict())
        for x in batches[3:]:
            layer(x)
            other(x)
        assert len(layer.state_dict()) == (2 if ema_decay is None else 4)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name

    @pytest.mark.parametrize("ema_decay", [None, DECAY])
    def test_bfloat16_rows_and_compiling(self, ema_decay: float | None) -> None:
        eager, x = quantizer(ema_decay=ema_decay), torch.randn(5, 6, dtype=torch.bfloat16)
        traced = copy.deepcopy(eager)
        compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(eager(x).quantized, compiled(x).quantized)
        assert eager(x).quantized.dtype == torch.bfloat16
        compiled(x)
        assert torch.equal(eager.codebooks, traced.codebooks)
        assert torch.equal(eager.steps_unused, traced.steps_unused)

    @pytest.mark.parametrize("ema_decay", [None, DECAY])
    def test_exports(self, ema_decay: float | None) -> None:
        layer, x = quantizer(ema_decay=ema_decay).eval(), torch.randn(7, 6)
        program = torch.export.export(layer, (x,))
        assert torch.equal(program.module()(x).codes, layer(x).codes)

    def test_codebooks_are_float32_whatever_the_default(self) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert quantizer().codebooks.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)


class TestInitialization:
    def run(self, x: Tensor, levels: int = 2, size: int = 4, seed: int = 0, **options) -> Tensor:
        return residual_kmeans(x, levels, size, generator=seeded(seed), **options)

    def test_finds_planted_clusters(self) -> None:
        centres = 10 * torch.eye(4, 6)
        x = (centres[:, None] + 0.01 * torch.randn(4, 50, 6)).flatten(0, 1)
        tries = [self.run(x, levels=1, seed=seed)[0] for seed in range(5)]
        best = min(tries, key=lambda c: torch.cdist(x, c).amin(1).sum())
        assert torch.cdist(centres, best).amin(1).max() < 0.05

    def test_each_level_and_each_iteration_leaves_less(self) -> None:
        x = torch.randn(300, 6)
        rest = [residual_quantize(x, self.run(x, levels=3, size=8, iterations=n)).commitment_loss for n in (0, 10)]
        assert (rest[1].diff() < 0).all()
        assert rest[1][-1] < rest[0][-1]

    def test_repeats_with_the_same_generator_only(self) -> None:
        x = torch.randn(100, 6)
        assert torch.equal(self.run(x), self.run(x))
        assert not torch.equal(self.run(x), self.run(x, seed=1))
        assert torch.equal(self.run(x), self.run(x.view(20, 5, 6)))

    @pytest.mark.parametrize("rows", [1, 3])
    def test_fewer_rows_than_codewords(self, rows: int) -> None:
        codebooks = self.run(torch.randn(rows, 6), size=8)
        assert codebooks.shape == (2, 8, 6)
        assert codebooks.isfinite().all()
        assert len(codebooks[0].unique(dim=0)) == 8

    @pytest.mark.parametrize("ema_decay", [None, DECAY])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_a_layer_starts_its_statistics_anew(self, ema_decay: float | None, dtype: torch.dtype) -> None:
        layer, x = quantizer(ema_decay=ema_decay), torch.randn(40, 6).to(dtype)
        for _ in range(3):
            layer(x[:1])
        layer.initialize(x, iterations=3, generator=seeded(1))
        expected = self.run(x.float(), seed=1, iterations=3)
        assert torch.equal(layer.codebooks, expected)
        assert isinstance(layer.codebooks, nn.Parameter) == (ema_decay is None)
        assert (layer.steps_unused == 0).all()
        if ema_decay is not None:
            assert (layer.ema_counts == 1).all()
            assert torch.equal(layer.ema_sums, expected)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.empty(0, 6), r"x: got shape \(0, 6\), expected at least one row"),
            (torch.tensor([[0.0] * 5 + [math.inf]]), "x: got values that are not finite"),
            (torch.zeros(3, 5), "x: got shape .* expected size 6"),
            (torch.tensor(1.0), "x: got a scalar"),
        ],
    )
    def test_bad_rows_are_refused(self, x: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            quantizer().initialize(x)


class TestRevival:
    def stale(self, unused: list[list[int]], ema_decay: float | None = DECAY) -> ResidualQuantizer:
        """A layer whose codewords went unused for so many steps."""
        layer = quantizer(levels=len(unused), codebook_size=len(unused[0]), ema_decay=ema_decay)
        layer.steps_unused.copy_(torch.tensor(unused))
        return layer

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ema_decay", [None, DECAY])
    def test_moves_dead_codewords_only_and_starts_their_statistics_anew(
        self, ema_decay: float | None, dtype: torch.dtype
    ) -> None:
        layer, x = self.stale([[0, 5, 4, 9], [5, 0, 2, 1]], ema_decay), torch.randn(30, 6).to(dtype)
        if ema_decay is not None:
            layer.ema_counts.fill_(3)
            layer.ema_sums.fill_(7)
        before = layer.codebooks.detach().clone()
        moved = layer.revive(x, window=5, generator=seeded())
        dead = torch.tensor([[False, True, False, True], [True, False, False, False]])
        assert torch.equal(moved, dead)
        assert torch.equal(layer.codebooks[~dead], before[~dead])
        residual = x.float()
        for level in range(2):
            for word in layer.codebooks[level][dead[level]]:
                assert (residual == word).all(1).sum() == 1  # each is a row, of what the new codebooks leave over
            residual = residual - residual_quantize(residual, layer.codebooks[level : level + 1]).quantized.detach()
        assert torch.equal(layer.steps_unused, torch.tensor([[0, 0, 4, 0], [0, 0, 2, 1]]))
        if ema_decay is not None:
            assert torch.equal(layer.ema_counts, torch.where(dead, 1.0, 3.0))
            assert torch.equal(layer.ema_sums[dead], layer.codebooks[dead])
            assert (layer.ema_sums[~dead] == 7).all()

    def test_a_revived_codeword_learns_without_its_past(self) -> None:
        layer = self.stale([[0, 9]])
        layer.codebooks.copy_(torch.tensor([[[0.0] * 6, [50.0] * 6]]))
        layer.ema_sums.copy_(layer.codebooks * 1000)
        layer.ema_counts.fill_(1000)
        x = torch.full((1, 6), -3.0)
        assert layer.revive(x, window=5)[0, 1]
        layer(x)
        torch.testing.assert_close(layer.codebooks[0, 1], x[0])

    def test_rows_are_drawn_by_how_badly_they_fit(self) -> None:
        x = torch.zeros(3, 6)
        x[1, 0], x[2, 0] = 1, 3**0.5  # squared distances 0, 1 and 3
        drawn = []
        for seed in range(400):
            layer = self.stale([[0, 9]])
            layer.codebooks.copy_(torch.tensor([[[0.0] * 6, [50.0] * 6]]))
            layer.revive(x, window=9, generator=seeded(seed))
            drawn.append(layer.codebooks[0, 1, 0].item())
        assert 0 not in drawn
        assert 0.68 < sum(value > 1.5 for value in drawn) / 400 < 0.82

    def test_no_more_move_than_rows_fit_badly(self) -> None:
        layer = self.stale([[9, 9, 9, 9]])
        layer.codebooks.copy_(layer.codebooks[:, :1].expand(1, 4, 6))
        x = torch.cat([layer.codebooks[0, :1], torch.randn(2, 6), torch.full((1, 6), torch.nan)])
        moved = layer.revive(x, window=9)
        assert moved.sum() == 2
        assert layer.codebooks.isfinite().all()
        assert torch.equal(layer.steps_unused, torch.tensor([[0, 0, 9, 9]]))
        assert layer.revive(x[:0], window=9).sum() == 0

    def test_repeats_with_the_same_generator_only(self) -> None:
        x, found = torch.randn(50, 6), []
        for seed in (0, 0, 1):
            layer = self.stale([[9, 9, 9, 9]])
            layer.revive(x, window=9, generator=seeded(seed))
            found.append(layer.codebooks)
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_brings_a_collapsed_codebook_back_to_use(self) -> None:
        torch.manual_seed(0)
        centres = 10 * torch.eye(8)
        layer = ResidualQuantizer(8, 1, 8, ema_decay=0.9)
        layer.codebooks.copy_(torch.arange(8.0)[None, :, None].expand(1, 8, 8) * 100)
        x = centres.repeat(20, 1) + 0.01 * torch.randn(160, 8)
        before = layer(x)
        assert layer.usage(before.codes).usage == 1 / 8
        for step in range(60):
            layer(x)
            if step % 10 == 9:
                layer.revive(x, window=10, generator=seeded(step))
        after = layer(x)
        assert layer.usage(after.codes).usage == 1
        assert after.commitment_loss < before.commitment_loss / 4


class TestUsage:
    def test_share_and_perplexity(self) -> None:
        codes = torch.tensor([[0, 3, -1], [1, 3, -1], [0, 3, -1], [-1, -1, -1]])
        found = quantizer(levels=3, codebook_size=4).usage(codes.view(2, 2, 3))
        entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
        assert found.usage.tolist() == [0.5, 0.25, 0]
        assert found.perplexity.tolist() == pytest.approx([math.exp(entropy), 1, 1])
        assert codebook_usage(torch.arange(8)[:, None], 8).perplexity.item() == pytest.approx(8)
        assert codebook_usage(codes[:0], 4).usage.tolist() == [0, 0, 0]

    def test_codes_of_another_codebook_are_refused(self) -> None:
        with pytest.raises(IndexError, match="got 4, expected codes below codebook_size=4"):
            codebook_usage(torch.tensor([[4]]), 4)
        with pytest.raises(TypeError, match="codes: got dtype float32"):
            codebook_usage(torch.zeros(1, 1), 4)
        for codes in (torch.tensor(1), torch.zeros(3, 0, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"codes: got shape .* with a level at least"):
                codebook_usage(codes, 4)
        with pytest.raises(ValueError, match="codebook_size: got 0"):
            codebook_usage(torch.tensor([[-1]]), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim: got 0"),
        ({"levels": 0}, "levels: got 0"),
        ({"codebook_size": 0}, "codebook_size: got 0"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0"),
        ({"ema_decay": -0.1}, "ema_decay: got -0.1"),
    ],
)
def test_a_quantizer_that_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantizer(**arguments)


def test_steps_and_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="window: got 0"):
        quantizer().revive(torch.zeros(1, 6), window=0)
    with pytest.raises(ValueError, match=r"x: got shape .* expected size 6"):
        quantizer().revive(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="levels: got 0"):
        residual_kmeans(torch.zeros(1, 6), 0, 4)
    with pytest.raises(TypeError, match="x: got dtype bfloat16, expected float32 or float64"):
        residual_kmeans(torch.zeros(1, 6, dtype=torch.bfloat16), 2, 4)
    with pytest.raises(ValueError, match=r"x: got shape \(10, 0\), expected at least one column"):
        residual_kmeans(torch.zeros(10, 0), 2, 4)


RANK = """
import sys
import torch
from torch import distributed
from bbqrec_kernels import ResidualQuantizer

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
inputs = torch.load(f"{folder}/inputs.pt")
mine = inputs["x"][:20] if rank == 0 else inputs["x"][20:]  # ranks hold different numbers of rows
found = {}
for ema_decay in (None, 0.75):
    layer = ResidualQuantizer(6, 2, 8, ema_decay=ema_decay)
    layer.load_state_dict({**layer.state_dict(), **inputs[f"state {ema_decay}"]})
    for _ in range(3):
        layer(mine)
    found[f"trained {ema_decay}"] = {name: value.clone() for name, value in layer.state_dict().items()}
    torch.manual_seed(rank)  # ranks need not draw alike
    layer.steps_unused[:, 5:] = 7
    found[f"moved {ema_decay}"] = layer.revive(mine if rank == 0 else mine[:0], window=7)
    found[f"revived {ema_decay}"] = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.initialize(mine)
    found[f"initialized {ema_decay}"] = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.initialize(mine, iterations=0)
    found[f"drawn {ema_decay}"] = layer.codebooks.detach().clone()
    single = ResidualQuantizer(6, 1, 1, ema_decay=ema_decay)
    single.initialize(mine)
    found[f"single {ema_decay}"] = single.codebooks.detach()
torch.save(found, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def assert_equal(left: Tensor | dict, right: Tensor | dict) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
        return
    assert left.keys() == right.keys()
    for name in left:
        assert_equal(left[name], right[name])


def test_two_ranks_train_as_one(tmp_path) -> None:
    """With the rows shared out, averages and unused steps are those of all rows, and ranks stay equal throughout."""
    x, together, inputs = torch.randn(33, 6), {}, {}
    for ema_decay in (None, DECAY):
        together[ema_decay] = quantizer(codebook_size=8, ema_decay=ema_decay)
        inputs[f"state {ema_decay}"] = copy.deepcopy(together[ema_decay].state_dict())
    torch.save({"x": x, **inputs}, tmp_path / "inputs.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_equal(first, second)
    for ema_decay, layer in together.items():
        for _ in range(3):
            layer(x)
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(first[f"trained {ema_decay}"][name], value, rtol=1e-5, atol=1e-6)
        assert first[f"moved {ema_decay}"].sum() == 6
        assert not torch.equal(first[f"revived {ema_decay}"]["codebooks"], layer.codebooks)
        drawn = first[f"drawn {ema_decay}"][0]
        assert (drawn[:, None] == x[:20]).all(-1).any(1).all()  # rows of rank 0
        torch.testing.assert_close(first[f"single {ema_decay}"][0, 0], x.mean(0))


B, S, M, L, DIM, HEADS, K = 3, 7, 2, 3, 8, 2, 3
ALL_TERMS = {"levels": L, "prefix": [(0, 0), (0, 1)], "matches": [(1, 1)], "gaps": 2, "gap_buckets": 5}


def attention(**options) -> SimilarityAttention:
    torch.manual_seed(0)
    layer = SimilarityAttention(DIM, HEADS, **options)
    for name, parameter in layer.named_parameters():
        if name.endswith("table"):
            assert (parameter == 0).all(), name
            nn.init.normal_(parameter)
    return layer


def tokens(seed: int = 1) -> dict[str, Tensor]:
    codes = torch.randint(-1, K, (B, S, M, L), generator=seeded(seed))
    return {"codes": codes, "positions": torch.randint(0, 20, (B, S, 2), generator=seeded(seed + 1))}


def formula(layer: SimilarityAttention, x: Tensor, codes: Tensor, positions: Tensor) -> Tensor:
    """One sequence `(S, dim)`, with loops over pairs of tokens, in float64."""
    weight, bias = layer.qkv.weight.double(), layer.qkv.bias.double()
    query, key, value = (x.double() @ weight.T + bias).view(len(x), 3, HEADS, -1).unbind(1)
    out = torch.zeros_like(query)
    for h in range(HEADS):
        scores = query[:, h] @ key[:, h].T / math.sqrt(DIM / HEADS)
        for i in range(len(x)):
            for j in range(len(x)):
                for c, (m, n) in enumerate(layer.prefix):
                    agree = [bool(a == b and a >= 0) for a, b in zip(codes[i, m], codes[j, n], strict=True)]
                    scores[i, j] += layer.prefix_table[c, h, [*agree, False].index(False)]
                for c, (m, n) in enumerate(layer.matches):
                    agree = [bool(a == b and a >= 0) for a, b in zip(codes[i, m], codes[j, n], strict=True)]
                    scores[i, j] += layer.matches_table[c, h, sum(agree)]
                for g in range(positions.shape[1] if layer.gap_table is not None else 0):
                    distance = abs(int(positions[i, g]) - int(positions[j, g]))
                    bucket = min(distance.bit_length(), layer.gap_table.shape[2] - 1)
                    scores[i, j] += layer.gap_table[g, h, bucket]
                if layer.is_causal and j > i:
                    scores[i, j] = -math.inf
        out[:, h] = scores.softmax(1) @ value[:, h]
    return out.flatten(1) @ layer.project.weight.double().T + layer.project.bias.double()


class TestAttention:
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize(
        "options",
        [{}, {"levels": L, "prefix": [(1, 0)]}, {"levels": L, "matches": [(0, 0)]}, {"gaps": 2}, ALL_TERMS],
        ids=["plain", "prefix", "matches", "gaps", "all"],
    )
    def test_is_its_formula_padded_and_packed(self, options: dict, is_causal: bool) -> None:
        layer, x, inputs = attention(**options, is_causal=is_causal), torch.randn(B, S, DIM), tokens()
        lengths = torch.tensor([S, 2, 5])
        given = {
            "codes": inputs["codes"] if "levels" in options else None,
            "positions": inputs["positions"] if "gaps" in options else None,
        }
        padded = layer(x, **given, lengths=lengths)
        valid = torch.arange(S) < lengths[:, None]
        packed = layer(
            x[valid],
            **{name: value if value is None else value[valid] for name, value in given.items()},
            cu_seqlens=torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32),
            max_seqlen=S,
        )
        with torch.no_grad():
            expected = torch.cat(
                [
                    formula(layer, x[b, :n], inputs["codes"][b, :n], inputs["positions"][b, :n])
                    for b, n in enumerate(lengths.tolist())
                ]
            ).float()
        torch.testing.assert_close(padded[valid], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)

    def test_new_it_is_plain_attention(self) -> None:
        layer, x = SimilarityAttention(DIM, HEADS, **ALL_TERMS), torch.randn(B, S, DIM)
        peer = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        peer.load_state_dict(
            {
                "in_proj_weight": layer.qkv.weight,
                "in_proj_bias": layer.qkv.bias,
                "out_proj.weight": layer.project.weight,
                "out_proj.bias": layer.project.bias,
            }
        )
        torch.testing.assert_close(layer(x, **tokens()), peer(x, x, x)[0], rtol=1e-4, atol=1e-5)

    def test_everything_learns(self) -> None:
        layer, x = attention(**ALL_TERMS), torch.randn(B, S, DIM, requires_grad=True)
        layer(x, **tokens()).square().sum().backward()
        names = {"qkv.weight", "qkv.bias", "project.weight", "project.bias"}
        assert {name for name, _ in layer.named_parameters()} == {*names, "prefix_table", "matches_table", "gap_table"}
        for name, parameter in layer.named_parameters():
            assert parameter.grad.abs().sum() > 0, name
        assert x.grad.abs().sum() > 0

    @pytest.mark.parametrize("codebook_size", [K, 2**40])  # fields of 41 bits do not fit into a word
    def test_packed_codes_are_the_same_codes(self, codebook_size: int) -> None:
        layer, x, inputs = attention(**ALL_TERMS), torch.randn(B, S, DIM), tokens()
        words = {**inputs, "codes": pack(inputs["codes"], codebook_size)}
        assert (words["codes"].query is None) == (codebook_size > K)
        assert torch.equal(layer(x, **words), layer(x, **inputs))

    def test_more_terms_are_added(self) -> None:
        x, table = torch.randn(B, S, DIM), torch.randn(1, HEADS, 4)
        own, given = attention(levels=L, matches=[(1, 1)]), attention()
        given.load_state_dict(own.state_dict(), strict=False)
        codes = tokens()["codes"]
        terms = [matches(codes[:, :, 1:], own.matches_table)]
        assert torch.equal(given(x, terms=terms), own(x, codes=codes))
        vectors = nn.functional.normalize(torch.randn(B, S, 1, 5), dim=-1)
        assert not torch.allclose(given(x, terms=[*terms, cosine(vectors, table)]), given(x, terms=terms), atol=1e-3)

    def test_padding_is_not_read(self) -> None:
        layer, x, lengths = attention(**ALL_TERMS), torch.randn(B, S, DIM), torch.tensor([S, 2, 5])
        expected = layer(x, **tokens(), lengths=lengths)
        padding = torch.arange(S) >= lengths[:, None]
        found = layer(x.masked_fill(padding[..., None], torch.nan), **tokens(), lengths=lengths)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        layer, x = attention(**ALL_TERMS), torch.randn(B, S, DIM)
        expected = layer(x, **tokens())
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", dtype):
                torch.testing.assert_close(layer(x, **tokens()).float(), expected, rtol=0.05, atol=0.05)
        found = layer.to(dtype)(x.to(dtype), **tokens())
        assert found.dtype == dtype
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found.float(), expected, **tolerance)

    def test_compiling(self) -> None:
        layer, x = attention(**ALL_TERMS), torch.randn(B, S, DIM)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, **tokens()), layer(x, **tokens()))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"heads": 3}, "dim: got 8, expected a multiple of heads=3"),
            ({"heads": 0}, "dim: got 8, expected a multiple of heads=0"),
            ({"prefix": [(0, 0)]}, "levels: got 0, expected at least 1, as there are channels in prefix"),
            ({"matches": [(0, 0)]}, "levels: got 0, .* matches"),
            ({"levels": L, "prefix": [(0, -1)]}, r"prefix: got \[\(0, -1\)\], expected pairs of modalities"),
            ({"levels": L, "matches": [(0,)]}, r"matches: got \[\(0,\)\], expected pairs"),
            ({"dim": 514}, "dim: got 514, expected at most 512 \\(256 a head\\)"),
            ({"levels": 17, "prefix": [(0, 0)]}, "levels: got 17, expected 0 to 16"),
            ({"gaps": -1}, "gaps: got -1, expected 0 to 8"),
            ({"gaps": 1, "gap_buckets": 65}, "gap_buckets: got 65, expected 1 to 64"),
            ({"levels": L, "prefix": [(0, 0)] * 8, "gaps": 1}, "channels: got 8 of prefix, 0 of matches and 1 gaps"),
        ],
    )
    def test_a_layer_that_cannot_be_is_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SimilarityAttention(**{"dim": DIM, "heads": HEADS, **options})

    @pytest.mark.parametrize(
        ("options", "inputs", "message"),
        [
            ({"levels": L, "prefix": [(0, 0)]}, {}, "codes: got None"),
            ({"gaps": 2}, {}, "positions: got None"),
            ({}, {"codes": tokens()["codes"]}, "codes: got Tensor, expected None"),
            ({}, {"positions": tokens()["positions"]}, "positions: got Tensor, expected None"),
            ({"levels": L, "prefix": [(0, 2)]}, {"codes": tokens()["codes"]}, r"expected \(..., M, L\) with M above 2"),
            ({"levels": L + 1, "prefix": [(0, 0)]}, {"codes": tokens()["codes"]}, r"codes: .*, expected \(..., M, 4\)"),
            ({"gaps": 1}, {"positions": tokens()["positions"]}, r"positions: .*, expected \(..., 1\)"),
            ({"gaps": 2}, {"positions": tokens()["positions"][..., 0]}, r"positions: .*, expected \(..., 2\)"),
            ({}, {"cu_seqlens": torch.tensor([0, S], dtype=torch.int32)}, r"x: got shape .* expected 2 dimensions"),
            ({}, {"x": torch.zeros(S, DIM)}, r"expected 3 dimensions \(B, S, dim\), as cu_seqlens is not"),
            (
                {},
                {
                    "x": torch.zeros(S, DIM),
                    "cu_seqlens": torch.tensor([0, S], dtype=torch.int32),
                    "max_seqlen": S,
                    "lengths": torch.tensor([S]),
                },
                "lengths: got a tensor, expected None",
            ),
        ],
    )
    def test_inputs_that_do_not_fit_are_refused(self, options: dict, inputs: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            attention(**options)(**{"x": torch.zeros(B, S, DIM), **inputs})
