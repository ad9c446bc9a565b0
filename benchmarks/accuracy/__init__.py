"""How good the recommendations are, on public data: one command a row of the tables in docs/accuracy.md."""
