"""Data sets: rows in, Parquet shards out, on one machine or a Ray cluster."""
