"""The version of the distribution: read by setup.py, by the run folders and by `--version`."""

__version__ = "0.1.0"
