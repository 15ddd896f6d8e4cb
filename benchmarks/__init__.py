"""The benchmarks: run them with ``nox -s bench``, or ``pytest benchmarks``."""
