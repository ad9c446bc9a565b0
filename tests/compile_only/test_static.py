"""Every GPU kernel compiles without a GPU, and none costs more than benchmarks/results/static.csv says."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import static

ROOT = Path(__file__).parents[2]
QUANTIZATION = ("quantize", "segment_sums", "join_segments", "decode", "grad_x", "prepare", "wide_level")
ATTENTION = ("forward", "backward_rows", "backward_keys", "table_gradients")
KERNELS = QUANTIZATION + ATTENTION
OLD_TRITON = ROOT / "build" / "triton-3.6.0"  # `make check` puts it there


def run(*arguments: str, **environment: str) -> str:
    """Runs benchmarks.static in a process of its own: Triton must not be in the interpreter's mode."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.check
@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
def test_no_kernel_costs_more_than_recorded(architecture: int) -> None:
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton: pip install triton")
    recorded = any(row.architecture.startswith(f"sm_{architecture}") for row in static.read())
    output = run("--arch", str(architecture), *(["--check"] if recorded else []))  # otherwise it only has to compile
    for case in KERNELS:
        assert f"\n{case} " in output


@pytest.mark.check
@pytest.mark.parametrize("architecture", [86, 120])
def test_every_tile_fits_cards_for_workstations(architecture: int) -> None:
    """Their blocks may have 99 KiB of shared memory: Triton only says when it launches that this is not enough.

    For one of them all kernels, for the other those that need the most: compiling takes minutes.
    """
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton: pip install triton")
    code = f"""
from benchmarks import static
cases = [*static.triton_cases({architecture}), *static.widest_attention_cases({architecture})]
for case in cases if {architecture} == 120 else [c for c in cases if "D=512" in c.name or "D=256" in c.name]:
    print(static.compile_triton(case, {architecture}).metadata.shared, case.kernel.__name__, case.name)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("_quantize_kernel L=4 K=1024 D=512" in line for line in lines)
    assert any("_backward_keys_kernel D=256 prefix L=3 fp32" in line for line in lines)
    assert [line for line in lines if int(line.split()[0]) > static.SHARED_BYTES[architecture]] == []


@pytest.mark.check
def test_the_oldest_triton_compiles_every_kernel() -> None:
    if not (OLD_TRITON / "triton").is_dir():
        pytest.skip(f"no Triton 3.6 at {OLD_TRITON.relative_to(ROOT)}; `make check` installs it where pip has it")
    path = os.pathsep.join([str(OLD_TRITON), os.environ.get("PYTHONPATH", "")])
    code = "import triton; print(triton.__version__)"
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).startswith("3.6.")
    output = run("--arch", "90", "--triton-only", PYTHONPATH=path)
    for case in KERNELS:
        assert f"\n{case} " in output


def test_recorded_table_keeps_the_rules() -> None:
    rows = static.read()
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.loop_spills <= row.spills_allowed, row
        assert row.loop_spills == 0 or row.architecture in ("sm_80", "sm_100"), row
        if row.kernel == "quantize" and row.unit:  # without, its search is unrolled
            assert row.tensor_core_instructions > 0, row
        assert row.unit or row.kernel != "quantize" or row.architecture == "sm_80", row
        if row.kernel in ("segment_sums", "join_segments", "quantize", "decode", "grad_x", *ATTENTION):
            assert row.global_atomics == 0, row


# Lane-instructions of a score, with a prefix of 3 levels: what similarity attention has to keep to on sm_90.
@pytest.mark.parametrize(
    ("kernel", "shape", "most"),
    [
        ("forward", "D=64 prefix L=3, long bf16", 16),
        ("forward", "D=64 prefix L=3 bf16", 19),
        ("backward_rows", "D=64 prefix L=3 bf16", 36),
        ("backward_keys", "D=64 prefix L=3 bf16", 36),
    ],
)
def test_recorded_attention_keeps_its_targets(kernel: str, shape: str, most: float) -> None:
    (row,) = (r for r in static.read() if (r.kernel, r.shape, r.architecture) == (kernel, shape, "sm_90"))
    assert row.instructions_per_unit <= most, row
    assert row.tensor_core_instructions > 0, row


def test_what_is_worse_is_a_fault() -> None:
    row = next(row for row in static.read() if (row.kernel, row.architecture) == ("quantize", "sm_90"))
    assert static.faults(row, row) == []
    worse = {
        "loop_spills": (2, "2 spills in the main loop, expected none"),
        "loop_instructions": (int(row.loop_instructions * 1.2), "instructions in the main loop, recorded"),
        "tensor_core_instructions": (0, "no tensor-core instruction in the main loop"),
        "global_atomics": (1, "1 global atomics, recorded 0"),
    }
    for name, (value, sentence) in worse.items():
        (fault,) = static.faults(replace(row, **{name: value}), row)
        assert sentence in fault
    assert static.faults(row, None) == []
    assert static.faults(replace(row, loop_spills=1), None)


ASSEMBLY = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0020*/                   STL [R1], R4 ;
.L_x_2:
        /*0030*/              @!P0 FADD R2, R2, R3 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   FMNMX R2, R2, R3, !PT ;
.L_x_3:
        /*0060*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0070*/                   LDL R4, [R1] ;
        /*0080*/                   FADD R2, R2, R3 ;
        /*0090*/               @P1 BRA `(.L_x_3) ;
        /*00a0*/               @P0 BRA `(.L_x_1) ;
        /*00b0*/                   REDG.E.ADD.F32 desc[UR4][R2.64], R5 ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""


def test_counts_of_known_machine_code() -> None:
    counts = static.measure(ASSEMBLY)
    assert counts == {
        "instructions": 14,
        "loop_instructions": 4,  # of the innermost loop with a tensor-core instruction
        "loop_spills": 1,
        "tensor_core_instructions": 1,
        "global_atomics": 1,
    }
