"""Benchmarks: each figure of docs/results.md, with its reference in the same run."""
