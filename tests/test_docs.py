"""The documentation: its examples run, its links lead somewhere, and the names in it exist."""

import json
import re
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "bbqrec*/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)
OPTION = re.compile(r"`((?:tokenizer|model|training)\.(?!safetensors|json|py)\w+)(?:=[^`]*)?`")


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Fenced blocks of a page, as pairs of language and content."""
    fenced = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, content) for language, content in fenced if language in languages]


def is_of_the_recommender(code: str) -> bool:
    return re.search(r"^(from|import) bbqrec\b", code, re.MULTILINE) is not None


def commands(code: str) -> list[str]:
    """Arguments of `bbqrec` in a block; `demo` takes minutes, `embed` downloads, and the third changes a shell."""
    left_out = "demo|embed|--install-completion"
    return [line.strip() for line in re.findall(rf"^bbqrec ((?!{left_out})[^#\n]*)", code, re.MULTILINE)]


def uses_the_recommender(page: Path) -> bool:
    found = blocks(page, "python", "sh")
    return any(is_of_the_recommender(code) if language == "python" else commands(code) for language, code in found)


def names_of_options() -> list[str]:
    return pytest.importorskip("bbqrec.config").option_names()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small data set `shop` that the examples speak of, and `new-items`; training ends after one epoch."""
    fit = pytest.importorskip("bbqrec.training.fit")
    from bbqrec.data.demo import make_demo_dataset

    data = make_demo_dataset(n_users=150, n_items=60)
    data.save(tmp_path / "shop")
    new = tmp_path / "new-items"
    (new / "features").mkdir(parents=True)
    (new / "items.csv").write_text("item\nnew-a\nnew-b\n")
    for name, feature in data.features.items():
        np.save(new / "features" / f"{name}.npy", feature.values[:2])
        (new / "features" / f"{name}.items.txt").write_text("new-a\nnew-b\n")
    monkeypatch.chdir(tmp_path)
    stage = fit.Stage
    monkeypatch.setattr(fit, "Stage", lambda folder, name, epochs, *patience: stage(folder, name, 1, *patience))


def run_examples_of_operators(page: Path) -> dict:
    namespace: dict = {}
    for _, code in blocks(page, "python"):
        if not is_of_the_recommender(code):
            exec(compile(code, str(page), "exec"), namespace)  # a block goes on where the one before it stopped
    return namespace


@pages
def test_examples_of_operators_run(page: Path) -> None:
    run_examples_of_operators(page)


def test_tables_of_zeros_leave_a_hugging_face_model_as_it_is() -> None:
    names = run_examples_of_operators(ROOT / "README.md")
    model, tokens, lengths = names["model"].eval(), torch.randint(0, 1000, (8, 50)), names["lengths"]
    inside = torch.arange(50) < lengths[:, None]
    states = model(tokens, semantic_ids=names["codes"], lengths=lengths).last_hidden_state
    model.set_attn_implementation("sdpa")
    expected = model(tokens, attention_mask=inside.long()).last_hidden_state
    torch.testing.assert_close(states[inside], expected[inside], rtol=1e-4, atol=1e-5)
    states[inside].square().sum().backward()
    assert all(table.grad.abs().sum() > 0 for table in names["tables"])


@pytest.mark.parametrize("page", [*filter(uses_the_recommender, PAGES)], ids=name_of)
@pytest.mark.usefixtures("shop")
def test_examples_of_the_recommender_run(page: Path) -> None:
    """In the order of the page, with the `bbqrec` commands of the shell blocks in between."""
    from typer.testing import CliRunner

    from bbqrec.cli.main import app

    namespace: dict[str, object] = {}
    for language, code in blocks(page, "python", "sh"):
        if language == "python":
            exec(compile(code, str(page), "exec"), namespace)
            continue
        for command in commands(code):
            result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
            assert result.exit_code == 0, f"{command}\n{result.output}"
            assert result.stdout, command


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebooks_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell; what they printed is not committed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    content = json.loads(notebook.read_text())
    nbformat.validate(content)
    namespace: dict = {}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"{notebook} {cell['id']}", "exec"), namespace)
    if notebook.name == "own_model.ipynb":
        within, across = namespace["agreement"]
        assert within > 2 * across
        assert namespace["losses"][-1] < 4 < 5.4 < namespace["losses"][0]
        factors = namespace["factors"]
        assert (factors[:, 0] > 1.5 * factors[:, 1:].amax(1)).all()
        metrics = namespace["run"].metrics
        assert metrics["test"]["ndcg@10"] > metrics["most_popular"]["test"]["ndcg@10"]
        assert len(namespace["recommended"]) == 5


def test_table_of_accuracy_is_what_the_rows_say() -> None:
    from benchmarks.accuracy.runs import NAMES, Runs
    from benchmarks.accuracy.table import headline

    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- python -m benchmarks.accuracy --headline -->\n(.*?)\n<!-- end -->", readme, re.DOTALL)
    assert shown[1] == headline(map(Runs.load, NAMES))


def test_tables_of_speed_are_what_the_rows_say() -> None:
    from benchmarks.summary import tables

    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- python -m benchmarks.summary .*? -->\n(.*?)\n<!-- end -->", readme, re.DOTALL)
    assert shown[1] == tables(sorted((ROOT / "benchmarks" / "results").glob("*_cpu_*.csv")))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pages
def test_paths_of_a_machine_are_not_named(page: Path) -> None:
    assert not re.findall(r"(?<![\w.:~])/(?:home|root|Users|work|tmp|mnt|opt|var)/\S*", page.read_text())


@pytest.mark.parametrize("drawing", sorted((ROOT / "docs").rglob("*.svg")), ids=name_of)
def test_drawings_can_be_read(drawing: Path) -> None:
    """By ear, and on a dark page: whatever has a colour in light has one in dark."""
    text = drawing.read_text()
    root = ElementTree.fromstring(text)
    assert root.find("{*}title").text
    light, dark = re.search(r"<style>(.*?)@media \(prefers-color-scheme: dark\)(.*?)</style>", text, re.DOTALL).groups()
    coloured = re.compile(r"\.(\w+) \{[^}]*(?:fill|stroke): #")
    assert set(coloured.findall(light)) == set(coloured.findall(dark))
    used = {name for element in root.iter() for name in element.get("class", "").split()}
    assert used <= set(re.findall(r"\.(\w+) \{", light))


@pages
def test_names_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets
    assert set(OPTION.findall(text)) <= set(names_of_options())
    for path in re.findall(r"`((?:bbqrec|bbqrec_kernels|csrc|docs|examples|tests|tools|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for path, test in re.findall(r"`(tests/[\w./]*)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / path).read_text(), f"{page.name} names {path}::{test}"


def variables_read() -> set[str]:
    """Environment variables that the sources read, set, or hand on, and variables of make."""
    found: set[str] = set()
    folders = (
        ROOT / name for name in ("bbqrec", "bbqrec_kernels", "benchmarks", "csrc", "docs", "tests", "tools", ".ci")
    )
    for path in [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]:
        if path.suffix == ".py":
            code = re.sub(r"(?<=[(\[{,])\n\s*", "", path.read_text())
            code = re.sub(r'(\b(?:get|setdefault)\("\w+"), "\w*"', r"\1", code)  # without defaults
            lines = re.findall(r"^.*(?:environ|getenv|delenv|setenv).*$", code, re.MULTILINE)
            found.update(name for line in lines for name in re.findall(r'"([A-Z][A-Z0-9_]+[A-Z0-9])"', line))
            if "tests" not in path.relative_to(ROOT).parts:  # by name, through a variable
                found.update(re.findall(r'"(BBQ(?:REC)?_\w+|\w+FLAGS)"', code))
        elif path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            found.update(re.findall(r'getenv\("(\w+)"', path.read_text()))
        elif path.suffix == ".sh" or path.match(".ci/*"):
            code = path.read_text()
            found.update(re.findall(r"(?:\$\{|\bexport )([A-Z][A-Z0-9_]+)", code))
            found.update(re.findall(r"(?<![-\w])([A-Z][A-Z0-9_]+)=", code))
        elif path.name == "CMakeLists.txt":
            found.update(re.findall(r"\$ENV\{(\w+)\}", path.read_text()))
        elif path.name == "Makefile":
            found.update(re.findall(r"^(?:export )?(\w+) \?=", path.read_text(), re.MULTILINE))
    return found


def test_every_environment_variable_is_described() -> None:
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    described = {name for cell in table for name in re.findall(r"`(\w+)`", cell)}
    assert described == variables_read()


def test_every_option_is_described() -> None:
    described = set(OPTION.findall((ROOT / "docs" / "recommender.md").read_text()))
    assert set(names_of_options()) - described == {"model_name"}
