"""Write and read shards: Parquet files with additional checksums."""
