"""Measurements of the operators: see the docstring of each module."""
