"""Shard files: a Parquet file with checksums of its own, written whole and read by row group."""
