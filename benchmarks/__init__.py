"""What is timed, against what, and the results kept: ``python -m benchmarks --help``."""
