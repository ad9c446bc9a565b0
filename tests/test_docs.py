"""The documentation: its examples run, its links lead somewhere, and the names in it exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "bbqrec*/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
OPTION = re.compile(r"`((?:tokenizer|model|training)\.(?!safetensors|json|py)\w+)(?:=[^`]*)?`")


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Fenced blocks of a page, as pairs of language and content."""
    fenced = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, content) for language, content in fenced if language in languages]


def is_of_the_recommender(code: str) -> bool:
    return re.search(r"^(from|import) bbqrec\b", code, re.MULTILINE) is not None


def names_of_options() -> list[str]:
    return pytest.importorskip("bbqrec.config").option_names()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small data set `shop` that the examples speak of, in the current folder; training ends after one epoch."""
    fit = pytest.importorskip("bbqrec.training.fit")
    from bbqrec.data.demo import make_demo_dataset

    make_demo_dataset(n_users=150, n_items=60).save(tmp_path / "shop")
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


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(is_of_the_recommender(code) for _, code in blocks(p, "python"))]
)
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
        for command in re.findall(r"^bbqrec ((?!demo)[^#\n]*)", code, re.MULTILINE):
            result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
            assert result.exit_code == 0, f"{command}\n{result.output}"
            assert result.stdout, command


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
def test_names_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets
    assert set(OPTION.findall(text)) <= set(names_of_options())
    for path in re.findall(r"`((?:bbqrec|bbqrec_kernels|csrc|docs|tests|tools|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_every_option_is_described() -> None:
    described = set(OPTION.findall((ROOT / "docs" / "recommender.md").read_text()))
    assert set(names_of_options()) - described == {"model_name"}
