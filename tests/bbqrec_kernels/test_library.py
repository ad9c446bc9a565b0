"""Loading of the compiled libraries, and what is said where there is none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bbqrec_kernels
from bbqrec_kernels import _library, collect_env

PACKAGE = Path(bbqrec_kernels.__file__).parent


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code with the packages of `folder` before all others."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def pure_package(tmp_path: Path) -> Path:
    """A copy of the package as it is installed where there was no compiler."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "*.dylib", "__pycache__"))
    summary = {"cpu": {"built": False, "reason": "no C++ compiler on the PATH"}}
    (tmp_path / PACKAGE.name / "_build.json").write_text(json.dumps(summary))
    return tmp_path


def test_library_of_this_tree_is_loaded() -> None:
    assert _library.CPU.blocker is None
    assert _library.CPU.build["built"] is True
    assert {"torch", "compiler", "flags"} <= _library.CPU.build.keys()


def test_missing_library_gives_the_reason_of_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    library = _library._load("_C", "CPU", {"built": False, "reason": "the moon was full"})
    assert not library.loaded
    assert library.path is None
    assert library.blocker == "the CPU library was not built: the moon was full"


def test_library_that_does_not_load_says_against_which_torch_it_was_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    library = _library._load("_C", "CPU", {"built": True, "torch": "2.10.0"})
    assert not library.loaded
    assert "built against torch 2.10.0) does not load into torch" in library.blocker
    assert "\n" not in library.blocker


@pytest.mark.parametrize("content", [None, "", "{", '{"cpu": {"built": false, "reason": "x"}}'])
def test_build_summary_is_never_in_the_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "_build.json").write_text(content)
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    expected = {"cpu": {"built": False, "reason": "x"}} if content and "cpu" in content else {}
    assert _library._read_build_summary() == expected


def test_pure_package_computes_warns_once_and_refuses_by_name(pure_package: Path) -> None:
    code = """
import warnings, torch, bbqrec_kernels
x, books = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert bbqrec_kernels.residual_quantize(x, books).codes.tolist() == [[1]]
assert [str(w.message) for w in caught] == [
    "residual_quantize runs as the slow reference: the CPU library was not built: no C++ compiler on the PATH"], caught
try:
    bbqrec_kernels.residual_quantize(x, books, impl="cpu")
except ValueError as error:
    print(error)
"""
    done = run_python(code, pure_package)
    assert done.returncode == 0, done.stderr
    assert "cannot run as 'cpu': the CPU library was not built: no C++ compiler on the PATH" in done.stdout


def test_report_of_the_pure_package_gives_reasons(pure_package: Path) -> None:
    code = "import json; from bbqrec_kernels import collect_env; print(json.dumps(collect_env.collect()))"
    done = run_python(code, pure_package)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    reason = "the CPU library was not built: no C++ compiler on the PATH"
    assert report["libraries"]["cpu"] == {"loaded": False, "reason": reason}
    assert report["operators"]
    for blockers in report["operators"].values():
        assert blockers["cpu"] == reason
        assert blockers["reference"] is None


def test_import_is_light(tmp_path: Path) -> None:
    code = "import sys, bbqrec_kernels; print([m for m in ('triton', 'bbqrec', 'lightning') if m in sys.modules])"
    done = run_python(code, PACKAGE.parent)
    assert done.stdout.strip() == "[]", done.stderr


def test_report_covers_every_public_operator(capsys: pytest.CaptureFixture[str]) -> None:
    collect_env.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["libraries"]["cpu"]["loaded"]
    assert set(report["operators"]) == set(collect_env.public_operators())
    assert {"residual_quantize", "residual_decode", "residual_statistics"} <= report["operators"].keys()
    for name, blockers in report["operators"].items():
        assert list(blockers) == ["reference", "cpu", "triton", "cuda"]
        assert blockers["reference"] is None, name
    assert report["operators"]["residual_quantize"]["cpu"] is None
    assert report["versions"]["bbqrec"] == bbqrec_kernels.__version__


def test_report_shows_what_stops_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, impl: str) -> None:
        raise RuntimeError(f"{impl} is broken")

    monkeypatch.setattr(bbqrec_kernels, "residual_decode", broken)
    assert collect_env.collect()["operators"]["residual_decode"]["cpu"] == "cpu is broken"


def test_report_as_text_names_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    collect_env.main([])
    text = capsys.readouterr().out
    assert "CPU library: loaded" in text
    for name in collect_env.public_operators():
        assert f"\n{name}\n" in text
