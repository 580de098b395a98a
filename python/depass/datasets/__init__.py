"""Attributes data sets: reads rows, writes Parquet shards, on one machine or a Ray cluster."""
