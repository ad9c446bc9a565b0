"""Speed and memory of the operators against what a user would pick instead: `python -m benchmarks`."""
