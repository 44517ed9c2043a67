# Parquet in and out: a cache with Top-K targets, read by other tools.
sparselogits cache --teacher demo --data pages.parquet --sampler topk --k 8 --out my-cache --window 256
sparselogits export my-cache --format datasets --out plain
python -c 'import datasets; print(datasets.load_from_disk("plain"))'
python -c 'import polars, sparselogits; row = polars.read_parquet("my-cache/shards/*.parquet").row(0, named=True); print(sparselogits.decode(row, "my-cache"))'
