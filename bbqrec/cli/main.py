"""The `bbqrec` command. Each subcommand imports what it needs when called, so that --help is quick."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial, wraps
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from bbqrec.serving.recommender import BBQRec

app = typer.Typer(
    help="Multi-modal sequential recommendation on semantic IDs.",
    epilog="Exit codes: 0 done; 1 failed, and a sentence on stderr says why; 2 wrong usage; 130 interrupted, 143 by "
    "SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _model_names() -> list[str]:
    """For completion in a shell."""
    from bbqrec.config import Config

    return list(get_args(Config.model_fields["model_name"].annotation))


def _option_starts(incomplete: str) -> list[str]:
    """For completion in a shell."""
    from bbqrec.config import option_names

    return [start for name in option_names() if (start := f"{name}=").startswith(incomplete)]


INTERRUPTED, TERMINATED = 130, 143  # exit codes: 128 and the number of the signal
RESUMING = ("fit", "tokenize", "embed", "demo")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as `bbqrec fit` makes it.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One option, e.g. training.seed=1; repeat.", autocompletion=_option_starts
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for programs.")]
KeepHistory = Annotated[bool, typer.Option("--keep-history", help="Leave items of the history among the candidates.")]


class HistoryCommand(TyperCommand):
    """Items of `--history` come first, those after it follow; an item before it would change places, and is refused."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        starts = [n for n, token in enumerate(args) if token.partition("=")[0] == "--history"]
        if starts:
            before, _, _ = self.make_parser(ctx).parse_args(args[: starts[-1]])
            items = before.get("items")
            if isinstance(items, (list, tuple)) and items:  # click 8.3 has an object for none, which is true
                raise typer.BadParameter("write all items after one --history, e.g. --history A B C or --history A,B,C")
        return super().parse_args(ctx, args)


def command(
    function: Callable[..., None] | None = None, *, name: str | None = None, cls: type[TyperCommand] | None = None
) -> Callable[..., Any]:
    """Registers a command whose expected errors are one sentence on stderr and exit code 1."""
    if function is None:
        return partial(command, name=name, cls=cls)

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        # Read when torch is imported: threads that wait while spinning make small steps slow where cores are shared.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        interrupted = INTERRUPTED

        def terminate(*_: Any) -> None:
            nonlocal interrupted
            interrupted = TERMINATED
            raise KeyboardInterrupt  # as Ctrl-C does: what is half done is cleaned up

        handler = signal.signal(signal.SIGTERM, terminate)
        try:
            function(*args, **kwargs)
        except BrokenPipeError:  # as of `| head`: who read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
            raise typer.Exit(1) from None
        except (ValueError, TypeError, OSError, ImportError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from None
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            typer.echo(
                "Error: memory: there is not enough; close other programs, or lower training.batch_tokens, "
                "model.dim or tokenizer.codebook_size, where one is large",
                err=True,
            )
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            where = f" {error}" if str(error) else ""
            then = "resumes" if function.__name__ in RESUMING else "starts anew"
            typer.echo(f"Interrupted{where}; the same command {then}.", err=True)
            raise typer.Exit(interrupted) from None
        finally:
            signal.signal(signal.SIGTERM, handler)

    return app.command(name, cls=cls)(guarded)


def _is_out_of_memory(error: Exception) -> bool:
    """NumPy's, PyTorch's on a GPU, or PyTorch's on the CPU, which has no type of its own."""
    is_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_gpu or "can't allocate memory" in str(error)


@command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Data set: a folder in one of the formats read.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder, in the format of bbqrec itself.")],
    k_core: Annotated[
        int, typer.Option(min=0, help="Leave out users and items with fewer interactions, again and again.")
    ] = 0,
    keep_repeats: Annotated[
        bool, typer.Option("--keep-repeats", help="Keep interactions that are there twice: same user, item and time.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a data set of any format into bbqrec's own, and say what was read, what was left out, and why."""
    from bbqrec import Dataset
    from bbqrec.data.preparation import prepare

    prepared = prepare(Dataset.load(source), k_core=k_core, keep_repeats=keep_repeats)
    prepared.data.save(target)
    if as_json:
        _print_json({"source": str(source), "data": str(target), **prepared.figures})
        return
    rows = [{"": name, **row} for name, row in prepared.figures["counts"].items()]
    _print_table(prepared.data.name, rows)
    for name, share in prepared.figures["features"].items():
        typer.echo(f"Items with {name} features: {share:.1%}")
    if prepared.figures["time_ties"] is None:
        typer.echo("No timestamps: the order is that of the source.")
    else:
        typer.echo(
            f"Interactions at the same time as the user's one before: {prepared.figures['time_ties']:,} "
            "(their order is that of the source)"
        )
    typer.echo(f"Data set: {target}")


@command
def embed(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Data set: a folder in the format of bbqrec itself.")],
    text: Annotated[
        str | None,
        typer.Option(metavar="sentence-transformers:MODEL", help="Make text features by this model: a folder or name."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Make image features by this vision model of transformers: a folder or name."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, <item>.jpg or the like; by default DATA/images.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make features from the texts and images of items by pretrained models; an interrupted call resumes."""
    from bbqrec.data.embedding import embed as embed_data

    made = embed_data(data, text=text, image=image, images=images)
    if as_json:
        _print_json({"data": str(data), "features": made})
        return
    for modality, figures in made.items():
        _print_unreadable(figures["unreadable"])
        counts = {
            f"without {modality}": figures["without"],
            "unreadable": len(figures["unreadable"]),
            f"{modality}s of no item": figures.get("strays", 0),
        }
        rest = "".join(f", {count:,} {words}" for words, count in counts.items() if count)
        made = f"{figures['made']:,} of {figures['items']:,} items, {figures['width']} wide"
        typer.echo(f"{modality}: {made}{rest}: {figures['file']}")


@command
def fit(
    data: Annotated[Path, typer.Option(help="Data set: a folder in one of the formats read.")],
    out: Annotated[Path, typer.Option(help="Run folder to write; an unfinished one is resumed.")],
    model: Annotated[
        str | None,
        typer.Option(help="bbqrec, sasrec or tiger; by default what the options say.", autocompletion=_model_names),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options.")] = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Train a model and write its run folder; resumes an unfinished one."""
    from bbqrec import Config
    from bbqrec import fit as fit_run
    from bbqrec.processes import is_first, together

    options = (Config.load(config) if config else Config()).override(assignments or [])
    with together():
        run = fit_run(data, out, model=model, config=options)
        if not is_first():
            return
    if as_json:
        _print_json({"run": str(out), **run.metrics})
    else:
        _print_metrics({split: run.metrics[split] for split in ("validation", "test")}, "history removed")
        typer.echo(f"Run folder: {out}")


@command
def tokenize(
    data: Annotated[Path, typer.Option(help="Data set: a folder in one of the formats read.")],
    out: Annotated[Path, typer.Option(help="Run folder to write; `bbqrec fit` on it goes on from there.")],
    model: Annotated[
        str | None,
        typer.Option(help="The model that they are for; by default what options say.", autocompletion=_model_names),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options.")] = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Make the semantic IDs of a data set, without a recommender yet, and say how good they are."""
    from bbqrec import Config
    from bbqrec import tokenize as tokenize_data
    from bbqrec.processes import is_first, together

    options = (Config.load(config) if config else Config()).override(assignments or [])
    with together():
        run = tokenize_data(data, out, model=model, config=options)
        if not is_first():
            return
    figures = run.tokenizer_figures
    if as_json:
        _print_json({"run": str(out), **figures})
        return
    _print_tokenizer_figures(figures)
    typer.echo(f"Semantic IDs: {out / 'semantic_ids.parquet'}")


@command
def evaluate(
    run: RunFolder,
    split: Annotated[
        str, typer.Option(help="validation or test.", autocompletion=lambda: ["validation", "test"])
    ] = "test",
    data: Annotated[Path | None, typer.Option(help="The run's data set, if it is no longer where it was.")] = None,
    keep_history: KeepHistory = False,
    as_json: AsJson = False,
) -> None:
    """Rank all items for every user's held-out item."""
    from bbqrec import Dataset, Run

    opened = Run(run, Dataset.load(data) if data else None)
    metrics = opened.evaluate(split, keep_history=keep_history)
    candidates = "history kept" if keep_history else "history removed"
    if as_json:
        _print_json({"run": str(run), "split": split, "candidates": candidates, **metrics})
    else:
        _print_metrics({split: metrics}, candidates)


@command
def inspect(
    run: RunFolder,
    report: Annotated[Path | None, typer.Option(help="Write the run's page anew, to this HTML file.")] = None,
    data: Annotated[Path | None, typer.Option(help="The run's data set, if it is no longer where it was.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a finished run is like: metrics, codes, what attention learned, and some users; see its report.html."""
    from bbqrec import Dataset, Run
    from bbqrec.report import collect, save

    if report is not None and not report.parent.is_dir():
        raise ValueError(f"report: got {report}, in a folder that does not exist; make {report.parent} first")
    if report is not None and report.is_dir():
        raise ValueError(f"report: {report} is a folder, expected a file; name one, e.g. {report / 'report.html'}")
    opened = Run(run, Dataset.load(data) if data else None)
    facts = collect(opened, opened.metrics)
    if report is not None:
        save(report, facts)
    page = report or run / "report.html"
    if as_json:
        _print_json({"run": str(run), "report": str(page) if page.is_file() else None, "facts": facts})
        return
    _print_facts(facts)
    typer.echo(f"Page: {page}" if page.is_file() else f"No page yet: bbqrec inspect {run} --report {page}")


@command(name="add-items")
def add_items(
    run: RunFolder,
    items: Annotated[
        Path,
        typer.Argument(
            metavar="ITEMS", help="Folder with items.parquet or items.csv, and features/ as in a data set; or the file."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Add items that training did not know to a run: `bbqrec recommend` then recommends them, and reads them."""
    from bbqrec import BBQRec, Run
    from bbqrec.data.files import held
    from bbqrec.serving.files import add_items_of

    with held(Run(run).folder, "run"):  # of items that two calls add at once, those of one would be lost
        model = BBQRec.load(run)
        names, unused = add_items_of(model, items)
        model.save_new_items()
    if unused:
        typer.echo(f"Left out, as {run} uses no such features: {', '.join(unused)}", err=True)
    rows = [{"item": name, "title": model.title(name), "semantic_id": model.semantic_id(name)} for name in names]
    if as_json:
        _print_json({"run": str(run), "new_items": len(model.item_ids) - model.n_trained, "items": rows})
        return
    _print_table(f"Added to {run}", rows)


@command(cls=HistoryCommand)
def recommend(
    run: RunFolder,
    items: Annotated[list[str] | None, typer.Argument(help="Item ids of the history, oldest first.")] = None,
    history: Annotated[
        list[str] | None,
        typer.Option("--history", help="The same, separated by spaces or commas; it can be repeated."),
    ] = None,
    timestamps: Annotated[
        str | None, typer.Option(help="Times of the items, separated by commas, for a model that reads times.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    keep_history: KeepHistory = False,
    candidates: Annotated[
        Path | None, typer.Option(help="File of the items to recommend from, an id a line; by default all.")
    ] = None,
    requests: Annotated[
        str | None,
        typer.Option(help='File of many histories, or -, in lines {"user": "u", "history": ["a", "b"]} or ["a", "b"].'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --requests: file to write, .jsonl or .parquet; by default stdout.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recommend the next items of one history, or of many from a file (then as JSON lines)."""
    from bbqrec import BBQRec
    from bbqrec.data.formats.tables import read_utf8

    wanted = None if candidates is None else read_utf8(candidates).replace("\r\n", "\n").split("\n")
    options = {"keep_history": keep_history, "candidates": wanted and [item for item in wanted if item]}
    if requests is not None:
        if history or items or timestamps:
            raise ValueError("requests: got a file and a history as well; give one of them")
        _recommend_file(BBQRec.load(run), requests, k, options, out)
        return
    if out is not None:
        raise ValueError("out: is for --requests; a single history is printed")
    given = [item.strip() for part in history or [] for item in part.split(",") if item.strip()] + (items or [])
    if not given:
        raise ValueError("history: no item given; name items, e.g. `bbqrec recommend RUN --history A,B`")
    model = BBQRec.load(run)
    rows = _recommendations(model, given, k, None if timestamps is None else _integers(timestamps), **options)
    if as_json:
        _print_json({"run": str(run), "history": given, "items": rows})
    else:
        _print_recommendations(rows, f"Next items after {len(given)} interactions")


@command
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, named .pt2.")],
    k: Annotated[int, typer.Option("-k", help="How many items it recommends.")] = 10,
    keep_history: KeepHistory = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Machine code for machines like this one; needs a C++ compiler.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the recommender as one file that runs without bbqrec: torch and bbqrec_kernels load it."""
    from bbqrec import BBQRec

    model = BBQRec.load(run)
    model.export(out, k, keep_history=keep_history, compiled=compiled)
    facts = {"file": str(out), "items": len(model.item_ids), "k": k, "megabytes": round(out.stat().st_size / 1e6, 1)}
    if as_json:
        _print_json({"run": str(run), **facts})
    else:
        typer.echo(f"Exported: {out}, {facts['items']:,} items, {facts['megabytes']} MB")


@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the catalogue and the runs.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the catalogue and of training.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Generate a catalogue, train SASRec and BBQRec on it, compare them, and recommend to one user."""
    from bbqrec import BBQRec, Config, Dataset, fit
    from bbqrec.data.demo import make_demo_dataset

    generated = make_demo_dataset(seed=seed)
    folder = out / "demo-shop"  # its name is the name of the data
    if not folder.exists():
        generated.save(folder)
    data = Dataset.load(folder)
    if data.fingerprint() != generated.fingerprint():
        raise ValueError(f"out: {out} holds the demo of another seed or version; choose another --out, or delete it")

    config = Config().override({"training.seed": seed, **DEMO_OPTIONS})
    runs = {name: fit(data, out / name, model=name, config=config) for name in ("sasrec", "bbqrec")}
    rows = {"most popular": runs["bbqrec"].metrics["most_popular"]["test"]}
    rows |= {"SASRec": runs["sasrec"].metrics["test"], "BBQRec": runs["bbqrec"].metrics["test"]}
    rows = {name: _without_cold_targets(row) for name, row in rows.items()}  # there is hardly one

    model = BBQRec.load(out / "bbqrec")
    user = int(runs["bbqrec"].split.test.users[0])
    name = data.user_ids[user]
    history = [data.item_ids[i] for i in data.histories[user][:-1]]
    recommended = _recommendations(model, history, 10)
    if as_json:
        _print_json(
            {"run": str(out), "test": rows, "user": data.user_ids[user], "history": history, "items": recommended}
        )
        return
    _print_metrics(rows, "test, history removed")
    seen = [{"item": item, "title": model.title(item), "semantic_id": model.semantic_id(item)} for item in history]
    _print_table(f"History of {name}, oldest first", seen)
    _print_recommendations(recommended, f"Recommended to {name} by BBQRec")
    typer.echo(f"Next: bbqrec recommend {out / 'bbqrec'} --history {','.join(history[-2:])}")


@command
def doctor(as_json: AsJson = False) -> None:
    """Say what this installation can do; exit code 1 if it cannot train and recommend."""
    from bbqrec_kernels.collect_env import collect, render

    report = collect()
    for extra in ("models", "embed"):
        report[extra] = {name: _version(name) for name in _requirements(extra)}
    missing = [name for name, version in report["models"].items() if version is None]
    idle = [name for name, blockers in report["operators"].items() if all(blockers.values())]
    if as_json:
        _print_json({**report, "ready": not (missing or idle)})
    else:
        typer.echo(render(report))
        for extra, title in (("models", "extra [models]"), ("embed", "extra [embed], for `bbqrec embed` only")):
            typer.echo(f"\n{title}")
            for name, version in report[extra].items():
                typer.echo(f"  {name:<21} {version or 'missing'}")
        typer.echo()
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: pip install 'bbqrec[models]'")
    if idle:
        raise ValueError(f"no implementation of {', '.join(idle)} runs; the report above says why")
    if not as_json:
        typer.echo("Ready: `bbqrec demo` shows the whole way.")


DEMO_OPTIONS: dict[str, Any] = {"tokenizer.epochs": 10, "training.epochs": 30, "training.patience": 4}


def _print_unreadable(reasons: list[str], shown: int = 10) -> None:
    for reason in reasons[:shown]:
        typer.echo(f"Left out: {reason}", err=True)
    if len(reasons) > shown:
        typer.echo(f"Left out: {len(reasons) - shown:,} more; --json names all", err=True)


def _without_cold_targets(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("cold/")}


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"timestamps: got {text!r}, expected whole numbers separated by commas") from None


def _recommend_file(model: BBQRec, source: str, k: int, options: dict[str, Any], out: Path | None) -> None:
    """Answers every line of `source`; a file is written whole or not at all."""
    import polars as pl

    from bbqrec.data.files import atomically
    from bbqrec.serving.files import read_requests, recommend_all

    if out is not None and out.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"out: got {out}, expected a name that ends in .jsonl or .parquet")

    def write(target: Any) -> None:
        for row in rows:
            target.write(json.dumps(row, ensure_ascii=False) + "\n")

    def write_file(path: str | Path) -> None:
        if out.suffix == ".parquet":
            found = [{"user": row["user"], "rank": n, **item} for row in rows for n, item in enumerate(row["items"], 1)]
            kinds = {"user": pl.String, "rank": pl.Int64, "item": pl.String, "title": pl.String, "score": pl.Float64}
            pl.DataFrame(found, schema=kinds).write_parquet(path)  # the same, also where there are no rows, or no users
            return
        with Path(path).open("w", encoding="utf-8") as file:
            write(file)

    with sys.stdin if source == "-" else Path(source).open(encoding="utf-8") as file:
        rows = recommend_all(model, read_requests(file, "stdin" if source == "-" else source), k, **options)
        if out is None:
            write(sys.stdout)
        else:
            atomically(out, write_file)


def _recommendations(
    model: BBQRec, history: list[str], k: int, timestamps: list[int] | None = None, **options: Any
) -> list[dict[str, Any]]:
    times = None if timestamps is None else [timestamps]
    [best] = model.recommend([history], k, timestamps=times, **options)
    return [
        {
            "rank": rank,
            "item": item,
            "title": model.title(item),
            "score": score,
            "semantic_id": model.semantic_id(item),
        }
        for rank, (item, score) in enumerate(best, start=1)
    ]


def _print_recommendations(rows: list[dict[str, Any]], title: str) -> None:
    _print_table(title, [{**row, "score": f"{row['score']:.3f}"} for row in rows])


def _print_metrics(rows: dict[str, dict[str, float]], candidates: str) -> None:
    """A line for each row, and one for its cold targets (items that training never saw), where there are any."""
    from bbqrec.evaluation.ranking import METRICS

    table = []
    for name, row in rows.items():
        table.append({"": name, "users": row["users"], **{key: f"{row[key]:.4f}" for key in METRICS}})
        if row.get("cold/users"):
            cold = {key: f"{row[f'cold/{key}']:.4f}" for key in METRICS}
            table.append({"": f"{name}, cold targets", "users": row["cold/users"], **cold})
    _print_table(f"Metrics over all items ({candidates})", table)


def _print_tokenizer_figures(figures: dict[str, Any]) -> None:
    levels = range(len(figures["usage"]))
    rows = [
        {
            "level": level,
            "codewords in use": f"{figures['usage'][level]:.1%}",
            "perplexity": f"{figures['perplexity'][level]:.1f}",
            **{f"{name} left": f"{rest[level]:.1%}" for name, rest in figures["residual"].items()},
        }
        for level in levels
    ]
    _print_table("Codebooks, and what each level leaves of the vectors", rows)
    for name, share in figures["reconstruction"].items():
        explained = "nothing, all items are alike" if share is None else f"{share:.1%}"
        typer.echo(f"{name} features explained by codes and specific part: {explained}")
    typer.echo(f"Items whose codes another item has as well: {figures['collision_rate']:.1%}")
    if figures["agreement"] is not None:
        typer.echo(f"Items whose modalities agree on the first code: {figures['agreement']:.1%}")
    typer.echo()


def _print_facts(facts: dict[str, Any]) -> None:
    """All that `bbqrec.report.collect` found, but for what needs a drawing."""
    run, metrics = facts["run"], facts["metrics"]
    users = "" if run["users"] is None else f"{run['users']:,} users, "
    typer.echo(f"{run['model']} on {run['data']}: {users}{run['items']:,} items, seed {run['seed']}")
    if "left_out" in facts:
        typer.echo(facts["left_out"])
    rows = {}
    for split in ("validation", "test"):
        rows |= {split: metrics[split], f"{split}, most popular": metrics["most_popular"][split]}
    _print_metrics(rows, metrics["candidates"].rpartition(", ")[2])
    if added := run["similarity"]:
        typer.echo(f"Scores add similarity to the history: weight {added['weight']:g}, decay {added['decay']:g}\n")
    for stage, columns in facts["curves"].items():
        rows = [{"": name, "first": f"{ys[0]:.4f}", "last": f"{ys[-1]:.4f}"} for name, ys in _logged(columns).items()]
        _print_table(f"{stage.replace('_', ' ').capitalize()}, {len(columns['epoch'])} epochs", rows)
    if "codebooks" in facts:
        _print_tokenizer_figures({**facts["codebooks"], "collision_rate": facts["collisions"]["rate"]})
        sizes = facts["collisions"]["sizes"]
        rows = [{"items that share an ID": size, "such IDs": groups, "items": size * groups} for size, groups in sizes]
        _print_table(f"{facts['collisions']['distinct']:,} different semantic IDs", rows)
        rows = [
            {"first code": g["code"], "items": g["items"], "such as": "; ".join(g["titles"])} for g in facts["groups"]
        ]
        _print_table("First codes that most items have", rows)
    for table in facts.get("reweighting", []):
        heads = [
            (f"layer {n} head {h}", weights)
            for n, layer in enumerate(table["log_weights"], start=1)
            for h, weights in enumerate(layer, start=1)
        ]
        rows = [
            {"": bucket, **{name: f"×{math.exp(weights[n]):.2f}" for name, weights in heads}}
            for n, bucket in enumerate(table["buckets"])
            if table["kind"] != "time" or any(weights[n] for _, weights in heads)  # 0: training never met it
        ]
        _print_table(f"Weight of a pair in attention, by {table['kind']}: {table['channel']}", rows)
    for example in facts.get("examples", []):
        history = [
            {
                "item": row["item"],
                "title": row["title"],
                **({"attention": f"{row['attention']:.1%}"} if "attention" in row else {}),
                **({"reweighted": f"×{row['reweighting']:.2f}"} if "reweighting" in row else {}),
            }
            for row in reversed(example["history"])
        ]
        of_all = f"{len(history)} of {example['interactions']}"
        _print_table(f"History of {example['user']}, latest first, {of_all}", history)
        target = example["target"]
        place = "not found by the search" if target["rank"] is None else f"rank {target['rank']:,}"
        rows = [
            {**row, "score": f"{row['score']:.3f}", "is_target": "held out" if row["is_target"] else ""}
            for row in example["recommended"]
        ]
        _print_table(f"Recommended; held out is {target['item']}, {place}", rows)


def _logged(columns: dict[str, list]) -> dict[str, list[float]]:
    """Losses and metrics of a stage, the epochs that have them."""
    known = {name: [y for y in ys if y is not None] for name, ys in columns.items() if name != "epoch"}
    return {name: ys for name, ys in known.items() if ys}


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from bbqrec.evaluation.ranking import METRICS

    if not rows:
        typer.echo(f"{title}: none\n")
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in rows[0]:
        numeric = name in ("rank", "score", "users", "items", "interactions", "level", "perplexity", *METRICS)
        table.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    # A pipe or a file has no width: nothing is cut or folded there.
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _requirements(extra: str) -> Iterable[str]:
    """Distributions that an extra of this package names."""
    for line in metadata.requires("bbqrec") or []:
        requirement, _, marker = line.partition(";")
        if f'extra == "{extra}"' in marker:
            yield requirement.strip().partition(">")[0].strip()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    app()
