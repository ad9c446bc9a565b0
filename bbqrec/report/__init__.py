"""What a finished run is like: its facts as plain values, and a page that shows them."""

from bbqrec.report.facts import collect
from bbqrec.report.page import render, save

__all__ = ["collect", "render", "save"]
