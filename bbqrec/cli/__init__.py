"""The `bbqrec` command."""


def run() -> None:
    """The command itself; where the recommender's dependencies are missing, it says how to get them."""
    try:
        from bbqrec.cli.main import app
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("bbqrec", "bbqrec_kernels"):
            raise
        raise SystemExit(f"bbqrec: {error.name!r} is not installed; pip install 'bbqrec[models]'") from None
    app()
