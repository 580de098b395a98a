"""The benchmarks: their cases, baselines and results. See ``python -m benchmarks --help``."""
