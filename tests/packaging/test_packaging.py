"""What is built and installed: contents of sdist and wheel, every way of `pip install`, machines without a compiler."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import bbqrec_kernels

ROOT = Path(__file__).parents[2]
PACKAGES = ("bbqrec_kernels/", "bbqrec/")
LIBRARY_FILES = {"bbqrec_kernels/_C.so", "bbqrec_kernels/_build.json"}
pytestmark = [pytest.mark.check, pytest.mark.xdist_group("packaging")]  # one worker: it builds the wheel once

SMOKE = """
import json, warnings, torch, bbqrec_kernels
from bbqrec_kernels import _library
warnings.simplefilter("ignore")
x, books = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
print(json.dumps({
    "file": bbqrec_kernels.__file__,
    "codes": bbqrec_kernels.residual_quantize(x, books).codes.tolist(),
    "blocker": _library.CPU.blocker,
    "build": _library.CPU.build,
}))
"""


def run(command: list[object], cwd: Path, succeeds: bool = True, **environment: str) -> str:
    """Runs a command as a user without an activated environment would, and returns all that it printed."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("BBQ_", "VIRTUAL_ENV", "PYTHON", "CONDA_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def repository_files() -> set[str]:
    listing = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    return {name for name in listing.splitlines() if (ROOT / name).is_file()}


def copy_of_the_repository(folder: Path) -> Path:
    """Without anything that was built in it."""
    for name in repository_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_of_the_repository(tmp_path / "tree")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    tree = copy_of_the_repository(folder / "tree")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder], tree, BBQ_REQUIRE_CPU="1", BBQ_CUDA="0")
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment with everything but this project, linked from the one that runs the tests; its Python."""
    return linked_environment(tmp_path / "environment")


def linked_environment(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for source in Path(pytest.__file__).parents[1].iterdir():
        if "bbqrec" not in source.name:
            (site / source.name).symlink_to(source)
    return folder / "bin" / "python"


def smoke(python: Path, cwd: Path) -> dict:
    """Imports what was installed, from a folder that holds no source, and runs an operator."""
    result = json.loads(run([python, "-c", SMOKE], cwd).splitlines()[-1])
    assert Path(result["file"]).is_relative_to(python.parents[1]), result["file"]
    assert result["codes"] == [[1]]
    return result


def wheel_metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
        return archive.read(entry).decode()


def test_sdist_holds_the_repository_and_nothing_built(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        shipped = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    not_shipped = {name for name in repository_files() if name.startswith(".")}
    assert repository_files() - not_shipped - shipped == set()
    assert not [name for name in shipped if name.endswith((".so", ".dylib", "_build.json", ".pyc"))]


def test_wheel_holds_the_packages_the_library_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == {name for name in repository_files() if name.startswith(PACKAGES)} | LIBRARY_FILES
    assert {f"{package}py.typed" for package in PACKAGES} <= files
    assert wheel.name.startswith(f"bbqrec-{bbqrec_kernels.__version__}-py3-none-")  # for every Python
    assert not wheel.name.endswith("-any.whl")
    assert "Root-Is-Purelib: false" in wheel_metadata(wheel, "WHEEL")
    assert "bbqrec = bbqrec.cli:run" in wheel_metadata(wheel, "entry_points.txt")
    assert wheel_metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    metadata = wheel_metadata(wheel, "METADATA").partition("\n\n")[0].splitlines()
    assert {f"Version: {bbqrec_kernels.__version__}", "Requires-Dist: torch>=2.10"} <= set(metadata)


def test_wheel_works_where_it_is_installed(dist: Path, environment: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    run([environment, "-m", "pip", "install", "--no-index", wheel], tmp_path)
    result = smoke(environment, tmp_path)
    assert result["blocker"] is None
    assert result["build"]["built"] is True
    assert "residual_quantize" in run([environment, "-m", "bbqrec_kernels.collect_env"], tmp_path)
    assert "recommend" in run([environment.parent / "bbqrec", "--help"], tmp_path)


@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf on this machine")
def test_library_needs_torch_and_the_system_alone(dist: Path, tmp_path: Path) -> None:
    """By name, and from no folder of the machine that built it."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("bbqrec_kernels/_C.so", tmp_path)
    dynamic = run(["readelf", "-dW", "bbqrec_kernels/_C.so"], tmp_path)
    needed = {name.partition(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)}
    assert "libtorch_cpu" in needed
    assert needed <= {"libtorch_cpu", "libstdc++", "libgcc_s", "libm", "libc", "ld-linux-aarch64"}
    assert not re.findall(r"\((?:RPATH|RUNPATH)\)", dynamic)


def test_a_wheel_is_tried_beside_a_torch(dist: Path, tree: Path, tmp_path: Path) -> None:
    """tools/try_wheel.py, with the torch that is here: nothing is downloaded."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}-torch-{torch.__version__}"
    linked_environment(tree / "build" / "try_wheel" / name)
    command = [sys.executable, "tools/try_wheel.py", "--dist", dist, "--torch", torch.__version__, "--"]
    tried = "tests/bbqrec_kernels/test_library.py"
    output = run([*command, tried], tree, PIP_NO_INDEX="1", BBQ_SIMD="none of the wheel's")
    assert re.search(rf"^passed  torch {re.escape(torch.__version__)} +\d+ passed in ", output, re.MULTILINE), output

    output = run([*command, tried, "-k", "no_such_test"], tree, succeeds=False, PIP_NO_INDEX="1")
    assert re.search(r"^FAILED  torch .* tests: exit code 5, ", output, re.MULTILINE), output


def test_plain_pip_install_finds_the_torch_of_the_environment(tree: Path, environment: Path, tmp_path: Path) -> None:
    """pip builds in an isolated environment of its own, where torch cannot be imported."""
    command = [environment, "-m", "pip", "install", "-v", "--no-deps", "."]
    quick = {"CMAKE_BUILD_TYPE": "Debug"}  # compiling is no part of this
    output = run(command, tree, BBQ_REQUIRE_CPU="1", PIP_CONSTRAINT=str(tree / "constraints.txt"), **quick)
    assert "bbqrec: CPU library built" in output
    assert smoke(environment, tmp_path)["blocker"] is None


def test_without_a_compiler_pip_installs_a_pure_package_that_says_so(
    tree: Path, environment: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    command = [environment, "-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "."]
    output = run(command, tree, PATH=str(tmp_path / "empty"))
    reason = "no C++ compiler on the PATH (c++, g++ or clang++)"
    assert f"bbqrec: CPU library not built: {reason}; " in output
    assert "py3-none-any.whl" in output
    result = smoke(environment, tmp_path)
    assert result["blocker"] == f"the CPU library was not built: {reason}"
    assert reason in run([environment, "-m", "bbqrec_kernels.collect_env"], tmp_path)


def build_in_place(tree: Path, succeeds: bool = True, **environment: str) -> tuple[str, dict]:
    output = run([sys.executable, "setup.py", "-q", "build_libraries", "--inplace"], tree, succeeds, **environment)
    summary = tree / "bbqrec_kernels" / "_build.json"
    return output, json.loads(summary.read_text())["cpu"] if summary.exists() else {}


def test_a_compiler_that_does_not_exist_is_named(tree: Path) -> None:
    output, cpu = build_in_place(tree, CC="/nowhere/cc", CXX="/nowhere/c++")
    assert cpu == {"built": False, "reason": "no C++ compiler: CXX names '/nowhere/c++', which does not exist"}
    assert "this is a pure-Python package" in output


def test_a_failing_compile_shows_the_error_and_leaves_no_old_library(tree: Path) -> None:
    (tree / "bbqrec_kernels" / "_C.so").write_bytes(b"of an earlier build")
    (tree / "csrc" / "cpu" / "broken.cpp").write_text("#error broken on purpose\n")
    output, cpu = build_in_place(tree)
    assert "csrc/cpu/broken.cpp:1:2: error: #error broken on purpose" in cpu["reason"]
    assert "compiling failed" in cpu["reason"]
    assert "1 | #error broken on purpose" in output  # the compiler's own words
    assert not (tree / "bbqrec_kernels" / "_C.so").exists()
    assert "BBQ_REQUIRE_CPU=1, but" in build_in_place(tree, succeeds=False, BBQ_REQUIRE_CPU="1")[0]


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "which is not the folder of an installed torch"),
        ("2.9.1+cpu", "torch 2.9.1+cpu is too old, 2.10 or newer is needed"),
    ],
)
def test_torch_that_does_not_fit_is_named(tree: Path, tmp_path: Path, version: str | None, reason: str) -> None:
    torch_folder = tmp_path / "torch"
    torch_folder.mkdir()
    if version:
        (torch_folder / "version.py").write_text(f"__version__ = '{version}'\n")
    cpu = build_in_place(tree, BBQ_TORCH_DIR=str(torch_folder))[1]
    assert cpu["built"] is False
    assert reason in cpu["reason"]


NO_NVCC = {"CXX": "/nowhere/c++", "CUDACXX": "/nowhere/nvcc"}


def test_demanding_cuda_is_an_error(tree: Path) -> None:
    output, _ = build_in_place(tree, succeeds=False, BBQ_CUDA="1", **NO_NVCC)
    reason = "CUDACXX names '/nowhere/nvcc', which does not exist"
    assert f"BBQ_CUDA=1, but the CUDA library was not built: {reason}" in output


@pytest.mark.parametrize(
    ("wish", "reason"), [("", "CUDACXX names '/nowhere/nvcc', which does not exist"), ("0", "BBQ_CUDA=0")]
)
def test_without_cuda_the_summary_says_why(tree: Path, wish: str, reason: str) -> None:
    (tree / "bbqrec_kernels" / "_C_cuda.so").write_bytes(b"of an earlier build")
    output, _ = build_in_place(tree, BBQ_CUDA=wish, **NO_NVCC)
    summary = json.loads((tree / "bbqrec_kernels" / "_build.json").read_text())
    assert summary["cuda"] == {"built": False, "reason": reason}
    assert f"CUDA library not built: {reason}" in output
    assert not (tree / "bbqrec_kernels" / "_C_cuda.so").exists()
