"""Modules here that need Triton's interpreter are collected only in a process that runs it: see test_interpreter.py."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_attention.py", "test_filter.py"]
