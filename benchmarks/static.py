"""What the GPU kernels cost, told without a GPU: `python -m benchmarks.static`.

Compiles every Triton kernel, and the library of csrc/cuda where nvcc is at hand, and counts in the machine code:
registers, spills, shared memory, instructions of the main loop, tensor-core instructions, global atomics. The main loop
is the innermost one with the most tensor-core instructions, or the longest innermost loop where none has any (as in
attention over codes that are not packed, whose innermost loop compares levels). Attention has one for whole tiles, the
shorter, which counts, and one for tiles in which pairs are hidden; neither may spill (see `Row.spills_allowed`).

The table is benchmarks/results/static.csv (`--write` renews it); `--check` compares with it and fails where a kernel
got worse. tests/compile_only/test_static.py is that comparison.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "static.csv"
CUDA_BUILD = ROOT / "build" / "cuda"
ARCHITECTURES = (80, 90, 100)
# That a block may have. Cards for workstations, the last three, are not in the table: they only have to have enough.
SHARED_BYTES = dict.fromkeys((90, 100), 227 * 1024) | {80: 163 * 1024} | dict.fromkeys((86, 89, 120), 99 * 1024)
INSTRUCTIONS_A_SPILL = 20  # of a main loop, at least, where spills are allowed
SLACK = 1.05  # of the instructions of a main loop: other versions of a compiler place a few more or less

_SPILLS = ("STL", "LDL")
_ATOMICS = ("RED", "REDG", "ATOM", "ATOMG")


@dataclass(frozen=True)
class Case:
    """A Triton kernel with the constants of one shape."""

    name: str
    kernel: Any
    types: dict[
        str, Any
    ]  # of the arguments, by name, as Triton writes them; a tuple for a tuple, a number for a constant
    constants: dict[str, Any]  # and num_warps, num_stages
    options: dict[str, Any]  # of the launcher
    unit: str  # what a thread does in one turn of the main loop ...
    units: float  # ... and how many of them


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kernel: str
    shape: str
    architecture: str
    compiler: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    loop_instructions: int
    loop_spills: int
    unit: str
    instructions_per_unit: float
    tensor_core_instructions: int
    global_atomics: int

    @property
    def spills_allowed(self) -> int:
        """In the main loop: none. Triton may trade a few for a larger tile on other architectures than sm_90."""
        is_free = self.compiler.startswith("triton") and self.architecture != "sm_90"
        return self.loop_instructions // INSTRUCTIONS_A_SPILL if is_free else 0

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.kernel, self.shape, self.architecture, self.compiler.split()[0]


# ---- machine code -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    start: int
    end: int


def loops(instructions: list[str], labels: dict[str, int]) -> list[Loop]:
    """All loops: backward jumps. A jump to itself ends a program."""
    found = []
    for i, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", text)
        if target and labels.get(target[1], i) < i:
            found.append(Loop(labels[target[1]], i))
    return found


def innermost(found: list[Loop]) -> list[Loop]:
    """Those that no other of them lies within."""
    return [a for a in found if not any(b != a and a.start <= b.start and b.end <= a.end for b in found)]


def opcodes(instructions: list[str]) -> Counter[str]:
    """How often each instruction occurs, without its predicate and modifiers."""
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in instructions)


def tensor_core_instructions(counts: Counter[str]) -> int:
    return sum(n for name, n in counts.items() if re.fullmatch(r"(H|I|Q|D|O|B)?G?MMA|UTC\w*MMA|WGMMA", name))


def parse(assembly: str) -> tuple[list[str], dict[str, int]]:
    """Instructions of what `nvdisasm -c` printed for one function, and where its labels are."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"^(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    return instructions, labels


def measure(assembly: str) -> dict[str, int]:
    """The counts of a row that come from machine code."""
    instructions, labels = parse(assembly)
    counts = opcodes(instructions)
    inner = [opcodes(instructions[loop.start : loop.end + 1]) for loop in innermost(loops(instructions, labels))]
    with_tensor_cores = [loop for loop in inner if tensor_core_instructions(loop)]
    if with_tensor_cores:
        main = max(with_tensor_cores, key=lambda loop: (tensor_core_instructions(loop), -loop.total()))
    else:
        main = max(inner, key=lambda loop: loop.total(), default=Counter())
    return {
        "instructions": counts.total(),
        "loop_instructions": main.total(),
        "loop_spills": max(sum(loop[name] for name in _SPILLS) for loop in with_tensor_cores or [main]),
        "tensor_core_instructions": tensor_core_instructions(main),
        "global_atomics": sum(counts[name] for name in _ATOMICS),
    }


@functools.cache
def tool(name: str) -> str:
    """A binary utility of CUDA: that of the Triton wheel, or the one on the PATH.

    Raises:
        FileNotFoundError: neither exists.
    """
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton else None
    if bundled and bundled.exists():
        return str(bundled)
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(f"{name}: found neither in the triton wheel nor on the PATH; pip install triton")


def usage(binary: Path) -> dict[str, dict[str, int]]:
    """Registers, stack and static shared memory of each function of a cubin."""
    output = subprocess.check_output([tool("cuobjdump"), "-res-usage", binary], text=True)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return {
        name: {"registers": int(registers), "stack_bytes": int(stack), "shared_bytes": int(shared)}
        for name, registers, stack, shared in re.findall(pattern, output)
    }


def disassemble(binary: Path) -> dict[str, str]:
    """Machine code of each function of a cubin."""
    output = subprocess.check_output([tool("nvdisasm"), "-c", binary], text=True, stderr=subprocess.DEVNULL)
    parts = re.split(r"^\.text\.(\S+):$", output, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ---- Triton -------------------------------------------------------------------------------------------------------


def triton_cases(architecture: int) -> list[Case]:
    """Every Triton kernel, for shapes that make a difference to it, with the constants of an architecture."""
    return [*_residual_quantization_cases(SHARED_BYTES[architecture]), *_similarity_attention_cases(architecture)]


def _residual_quantization_cases(shared_bytes: int) -> Iterator[Case]:
    from bbqrec_kernels.residual_quantization import triton_kernels as rq

    types = {
        **dict.fromkeys(("x", "values", "quantized", "grad_quantized", "grad_x", "source"), "*fp32"),
        **dict.fromkeys(("codebooks", "codebook", "half_norms", "partials", "residuals", "norms"), "*fp32"),
        **dict.fromkeys(("commitment_loss", "codebook_loss", "grad_commitment_loss", "upstream"), "*fp32"),
        **dict.fromkeys(("decoded", "counts", "sums", "edges"), "*fp32"),
        **dict.fromkeys(("codes", "order", "offsets"), "*i64"),
        **dict.fromkeys(("rows", "elements", "programs", "chunks"), "i32"),
        "words": "*fp16",
        "ranges": "*i32",
        "keys": "*i16",
    }

    def per_thread(constants: dict[str, Any], *blocks: str) -> float:
        elements = functools.reduce(lambda n, block: n * constants[block], blocks, 1)
        return elements / (32 * constants["num_warps"])

    def case(name: str, kernel: Any, constants: dict[str, Any], unit: str, units: float, **typed: str) -> Case:
        return Case(name, kernel, types | typed, constants, rq.OPTIONS, unit, units)

    def quantize(levels: int, size: int, width: int, dtype: str = "fp32") -> Case:
        constants = rq.quantize_constants(levels, size, width, shared_bytes)
        name = f"L={levels} K={size} D={width}" + ("" if dtype == "fp32" else f" {dtype}")
        typed = {"x": f"*{dtype}", "quantized": f"*{dtype}"}
        units = per_thread(constants, "BLOCK_ROWS", "BLOCK_SIZE")
        return case(name, rq._quantize_kernel, constants, "distance", units, **typed)

    yield quantize(3, 256, 64)
    yield quantize(3, 256, 64, "bf16")
    yield quantize(4, 1024, 256)
    yield quantize(4, 500, 100)
    yield quantize(4, 1024, 512)
    yield quantize(3, 3000, 48)
    for levels, size, width in ((3, 256, 64), (4, 1024, 256)):
        shape = f"L={levels} K={size} D={width}"
        books = rq.codebook_constants(levels, size, width)
        padded = {"PADDED_SIZE": rq.quantize_constants(levels, size, width, shared_bytes)["PADDED_SIZE"]}
        yield case(shape, rq._range_kernel, books, "", 0)
        yield case(shape, rq._prepare_kernel, books | padded, "", 0)
        rows = rq.row_constants(levels, size, width)
        elements = per_thread(rows, "BLOCK_ROWS", "BLOCK_WIDTH")
        yield case(shape, rq._decode_kernel, rows, "element and level", elements)
        both = rows | {"HAS_QUANTIZED": True, "HAS_COMMITMENT": True}
        yield case(shape, rq._grad_x_kernel, both, "element and level", elements)
        segments = rq.segment_constants(levels, size, width)
        for of in ("value", "residual", "rest"):
            units = per_thread(segments, "BLOCK_ROWS", "BLOCK_WIDTH")
            yield case(f"{shape} {of}", rq._segment_sums_kernel, segments | {"OF": of}, "element", units)
        join = rq.join_constants(size, width) | {"COUNT": True}
        units = per_thread(join, "BLOCK_CHUNKS", "BLOCK_WIDTH")
        yield case(shape, rq._join_segments_kernel, join, "element", units)
    wide = rq.wide_constants(256, 768)
    units = per_thread(wide, "BLOCK_ROWS", "BLOCK_SIZE", "BLOCK_WIDTH")
    yield case("K=256 D=768", rq._wide_level_kernel, wide, "element of a distance", units)
    yield case("L=3", rq._losses_kernel, {"LEVELS": 3, "BLOCK": 1024, "num_warps": 4}, "", 0)
    keys = {"SIZE": 256, "LEVELS": 3, "BLOCK_ROWS": 1024, "num_warps": 4}
    yield case("L=3 K=256", rq._keys_kernel, keys, "", 0)


def widest_attention_cases(architecture: int) -> Iterator[Case]:
    """Of heads that need the most shared memory. Not in the table: some of their loops spill."""
    shapes = [(256, "bf16", "prefix L=3", False), (256, "fp32", "prefix L=3", False)]
    return _similarity_attention_cases(architecture, [*shapes, (128, "fp32", "prefix L=3", False)])


def _similarity_attention_cases(
    architecture: int, chosen: list[tuple[int, str, str, bool]] | None = None
) -> Iterator[Case]:
    """Padded, causal, with rows of more than one tile; strides as those of dense tensors."""
    import torch

    from bbqrec_kernels.similarity_attention import triton_kernels as attention

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    integers = dict.fromkeys(("rows", "columns", "sequences", "heads", "blocks", "row_count", "programs"), "i32")
    floats = dict.fromkeys(("scale", "grad_scale"), "fp32")
    tables = {"biases": "*fp32", "partials": "*fp32", "row_data": "*fp32", "grad_biases": "*fp32", "logsumexp": "*fp64"}
    heads = ("query", "key", "value", "output", "grad", "grad_query", "grad_key", "grad_value")
    strides = {f"{name}_strides": ("i32:16", "i32:16", "i32:16", 1) for name in heads}
    strides |= dict.fromkeys(("logsumexp_strides", "row_strides"), ("i32:16", "i32:16", 1))

    def case(kernel: Any, constants: dict[str, Any], channels: tuple, kinds: str, dtype: str, packed: bool) -> Case:
        types = integers | floats | tables | strides | dict.fromkeys(heads, f"*{dtype}")
        compared = tuple("*fp32" if channel[0] == 2 else "*i64" for channel in channels)
        types |= {"queries": compared, "keys": compared, "boundaries": ("*fp32",) * len(channels)}
        types |= {"query_lengths": None, "key_lengths": None, "starts": "*i32" if packed else None}
        constants = {"CHANNELS": channels, "PACKED": packed, "IS_CAUSAL": True, "COMPILED": True} | constants
        units = constants["BLOCK_ROWS"] * constants["BLOCK_KEYS"] / (32 * constants["num_warps"])
        name = f"D={constants['WIDTH']} {kinds} {dtype}" + (" packed" if packed else "")
        if "cosine" in kinds or "not packed" in kinds:  # the innermost loop is over elements or levels
            return Case(name, kernel, types, constants, attention.OPTIONS, "", 0)
        return Case(name, kernel, types, constants, attention.OPTIONS, "score", units)

    prefix = attention.channels_of("prefix", bits=10, buckets=4)
    terms = {
        "no bias": (),
        "prefix L=3": prefix,
        "4 x prefix L=3": attention.channels_of("prefix", bits=10, buckets=4, channels=4),
        "matches L=3": attention.channels_of("matches", bits=10, buckets=4),
        "prefix L=4, 40 bits": attention.channels_of("prefix", bits=10, buckets=5),
        "prefix L=3, not packed": attention.channels_of("prefix", bits=0, buckets=4, width=3),
        "gap of 16": attention.channels_of("gap", bits=0, buckets=16),
        "gap of 32": attention.channels_of("gap", bits=0, buckets=32),
        "cosine of 8": attention.channels_of("cosine", bits=0, buckets=8, width=64),
    }
    shapes = [(64, "bf16", kinds, False) for kinds in terms]
    shapes += [(64, "bf16", "prefix L=3", True), (128, "bf16", "prefix L=3", False)]
    shapes += [(60, "fp16", "prefix L=3", False), (64, "fp32", "prefix L=3", False)]
    for width, dtype, kinds, packed in chosen or shapes:
        channels, torch_dtype = terms[kinds], dtypes[dtype]
        for keys in (512, 2048) if kinds in ("no bias", "prefix L=3") and (width, dtype) == (64, "bf16") else (512,):
            constants = attention.forward_constants(width, torch_dtype, channels, keys, architecture)
            name = kinds if keys == 512 else f"{kinds}, long"
            yield case(attention._forward_kernel, constants, channels, name, dtype, packed)
        sums = attention.sums_of(channels)
        some = {"ALL_SUMS": 1 + len(sums), "FIRST_SUM": 1, "SUMS": tuple(sums[: attention._SUMS])}
        some |= {"PREPARES": True, "NEED_QUERY": True}
        constants = attention.backward_rows_constants(width, torch_dtype, channels, architecture) | some
        yield case(attention._backward_rows_kernel, constants, channels, kinds, dtype, packed)
        constants = attention.backward_keys_constants(width, torch_dtype, channels, architecture)
        constants |= {"NEED_KEY": True, "NEED_VALUE": True}
        yield case(attention._backward_keys_kernel, constants, channels, kinds, dtype, packed)
    constants = {"CHANNELS": prefix, "ALL_SUMS": 4, "BLOCK": 1024, "num_warps": 4}
    yield Case("prefix L=3", attention._table_gradients_kernel, integers | tables, constants, attention.OPTIONS, "", 0)


def compile_triton(case: Case, architecture: int) -> Any:
    """Compiles a kernel with the options of its launcher."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(case.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature, values, attributes = {}, {}, {}

    def describe(type_or_constant: Any, *path: int) -> Any:
        """The signature of an argument, or of an element of a tuple."""
        if isinstance(type_or_constant, tuple):
            return tuple(describe(each, *path, i) for i, each in enumerate(type_or_constant))
        if not isinstance(type_or_constant, str):
            values[path] = type_or_constant
            return "constexpr"
        name, _, multiple = type_or_constant.partition(":")
        if multiple or name.startswith("*"):  # what the allocator guarantees of pointers
            attributes[path] = [["tt.divisibility", 16]]
        return name

    for i, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        else:
            signature[name] = describe(case.types[name], i)
    source = ASTSource(case.kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options | case.options)


def measure_triton(case: Case, architecture: int) -> Row:
    """Compiles a kernel, and counts."""
    import triton

    compiled = compile_triton(case, architecture)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        (function, resources), *_ = usage(binary).items()
        code = disassemble(binary)[function]
        counts = measure(code)
    # Few turns are unrolled: what then is the longest loop left says nothing of a unit.
    is_unrolled = counts["tensor_core_instructions"] == 0 and tensor_core_instructions(opcodes(parse(code)[0])) > 0
    units = 0 if is_unrolled else case.units
    per_unit = round(counts["loop_instructions"] / units, 2) if units else 0.0
    return Row(
        kernel=function.strip("_").removesuffix("_kernel"),
        shape=case.name,
        architecture=f"sm_{architecture}",
        compiler=f"triton {triton.__version__}",
        unit=case.unit if units else "",
        instructions_per_unit=per_unit,
        **(resources | {"shared_bytes": compiled.metadata.shared} | counts),
    )


# ---- CUDA C++ -----------------------------------------------------------------------------------------------------


def missing_tool() -> str | None:
    """What keeps the CUDA sources from being compiled here, None if nothing."""
    return next((f"no {tool} on this machine" for tool in ("nvcc", "cmake", "ninja") if not _which(tool)), None)


@functools.cache
def cuda_library() -> Path:
    """`_C_cuda.so` for every architecture, as setup.py makes it, warnings being errors; built where sources are new.

    Raises:
        RuntimeError: a command fails; the message is its output.
    """
    import torch

    options = [f"-DBBQ_TORCH_DIR={Path(torch.__file__).parent}", f"-DCMAKE_CUDA_COMPILER={_which('nvcc')}"]
    options += ["-DBBQ_CUDA=ON", "-DBBQ_WERROR=ON", "-DCMAKE_CUDA_FLAGS=--threads=0"]
    CUDA_BUILD.mkdir(parents=True, exist_ok=True)
    with (CUDA_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests of several processes ask for it
        _run(["cmake", "-S", ROOT, "-B", CUDA_BUILD, "-G", "Ninja", *options])
        _run(["cmake", "--build", CUDA_BUILD, "--target", "_C_cuda"])
    return CUDA_BUILD / "_C_cuda.so"


def measure_cuda(architecture: int) -> list[Row]:
    """Counts in each kernel of the library. Dynamic shared memory is not in the machine code."""
    target = f"sm_{architecture}" + ("a" if architecture >= 90 else "")
    objects = sorted(cuda_library().parent.glob("CMakeFiles/_C_cuda.dir/**/*.cu.o"))
    release = re.search(r"release ([\d.]+)", _run([_which("nvcc"), "--version"]))[1]
    rows = []
    for compiled in objects:
        with tempfile.TemporaryDirectory() as folder:
            _run([tool("cuobjdump"), "-arch", target, "-xelf", "all", compiled], cwd=folder)
            (binary,) = Path(folder).iterdir()
            code, used = disassemble(binary), usage(binary)
        for function, resources in used.items():
            source = compiled.name.partition(".")[0]
            which = _kernel_name(function), source, target, f"nvcc {release}"
            rows.append(Row(*which, unit="", instructions_per_unit=0.0, **resources, **measure(code[function])))
    return rows


def _kernel_name(function: str) -> str:
    """The functor that the kernel `entry` runs."""
    name = _run(["c++filt", "-p", function]).strip() if shutil.which("c++filt") else function
    return re.sub(r"^void bbq::entry<(?:bbq::)?(.*?) ?>\(.*$|^bbq::entry<(?:bbq::)?(.*?) ?>$", r"\1\2", name)


def _run(command: list[object], cwd: str | None = None) -> str:
    environment = {**os.environ, "PATH": _path()}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}")
    return done.stdout


def _path() -> str:
    """The scripts beside this Python come first: the machine's own CMake may be too old."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"])


def _which(name: str) -> str | None:
    return shutil.which(name, path=_path())


# ---- table --------------------------------------------------------------------------------------------------------


def read(path: Path = TABLE) -> list[Row]:
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        return [Row(**{f.name: kinds[f.type](line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]


def write(rows: list[Row], path: Path = TABLE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def faults(row: Row, recorded: Row | None) -> list[str]:
    """What is worse than the rules allow, or than the table says. Empty: nothing."""
    where = f"{row.kernel} ({row.shape}, {row.architecture}, {row.compiler})"
    found = []
    if row.loop_spills > row.spills_allowed:
        allowed = row.spills_allowed or "none"
        found.append(f"{where}: {row.loop_spills} spills in the main loop, expected {allowed}")
    if recorded is None:  # no architecture or kernel that the table has not seen is held to more
        return found
    if row.loop_instructions > recorded.loop_instructions * SLACK:
        found.append(
            f"{where}: {row.loop_instructions} instructions in the main loop, recorded {recorded.loop_instructions}"
        )
    if recorded.tensor_core_instructions and not row.tensor_core_instructions:
        found.append(f"{where}: no tensor-core instruction in the main loop")
    if row.global_atomics > recorded.global_atomics:
        found.append(f"{where}: {row.global_atomics} global atomics, recorded {recorded.global_atomics}")
    return found


def render(rows: list[Row]) -> str:
    header = ("kernel", "shape", "arch", "regs", "stack", "shared", "loop", "spills", "per unit", "mma", "atomics")
    lines = [header]
    for r in rows:
        per_unit = f"{r.instructions_per_unit:g} / {r.unit}" if r.unit else ""
        numbers = r.registers, r.stack_bytes, r.shared_bytes, r.loop_instructions, r.loop_spills
        lines.append(
            (r.kernel, r.shape, r.architecture, *numbers, per_unit, r.tensor_core_instructions, r.global_atomics)
        )
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(str(cell).ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"renew {TABLE.relative_to(ROOT)} for --arch")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a kernel got worse than the table")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--triton-only", action="store_true", help="leave out the CUDA kernels")
    options = parser.parse_args(arguments)
    if options.write and (options.kernel or options.triton_only):
        parser.error("--write renews whole architectures: leave out --kernel and --triton-only")
    rows = []
    for architecture in options.arch or ARCHITECTURES:
        if importlib.util.find_spec("triton"):
            cases = triton_cases(architecture)
            rows += [measure_triton(c, architecture) for c in cases if options.kernel in c.kernel.__name__]
        else:
            print("no Triton kernels: pip install triton", file=sys.stderr)
        if options.triton_only:
            continue
        if missing := missing_tool():
            print(f"no CUDA kernels: {missing}", file=sys.stderr)
        else:
            rows += [row for row in measure_cuda(architecture) if options.kernel in row.kernel]
    print(render(rows))
    if options.write:
        renewed = {row.architecture for row in rows}
        kept = [row for row in read() if row.architecture not in renewed] if TABLE.exists() else []
        write(sorted(kept + rows, key=lambda row: int(row.architecture[3:].rstrip("a"))))
    if not options.check:
        return 0
    recorded = {row.key: row for row in read()}
    found = [fault for row in rows for fault in faults(row, recorded.get(row.key))]
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
