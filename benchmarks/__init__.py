"""Benchmarks of embedding lookups: verified first, then timed side by side in one process.

Run ``python -m benchmarks --help`` from the root of the repository.
"""
