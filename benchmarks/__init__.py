"""Benchmarks: what bertfast is measured by. Each is a module to run, `python -m benchmarks.<name>`."""
