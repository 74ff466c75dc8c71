"""Architectures compared on equal terms: a grid of training runs, what is measured of each, and the report."""
