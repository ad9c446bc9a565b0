"""The `bbqrec` command."""
