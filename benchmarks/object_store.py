"""Count the requests that each operation sends to an S3 server.

    python -m benchmarks.object_store > benchmarks/object_store.json

The server is a local moto server; the counts do not depend on it. The three shards have
synthetic targets, 64 windows of 64 tokens and eight row groups each. Needs the extra `dev`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tests.store.draws import identity, records
from tests.store.s3 import S3, Proxy, S3Server

from sparselogits.data import CacheDataset
from sparselogits.store import Cache, CopyFolder, merge, repair, verify
from sparselogits.store.storage.objects import ObjectStorage

SHARD = 64
IDENTITY = identity(packing={"reset_attention": False})
TITLES = {"GET": "get", "PUT": "put", "HEAD": "head", "LIST": "list", "DELETE": "delete"}


def main() -> None:
    server = S3Server()
    proxy = Proxy(server.port)
    s3 = S3.reached(server, os.environ.__setitem__, proxy)
    counts: dict[str, dict[str, int]] = {}

    def count(name: str, act: Callable[[], object]) -> None:
        proxy.requests.clear()
        act()
        counts[name] = {TITLES[kind]: number for kind, number in sorted(proxy.requests.items())}

    made = [records("counts", start, start + SHARD) for start in range(0, 3 * SHARD, SHARD)]
    with tempfile.TemporaryDirectory() as folder:
        count("start a build", lambda: Cache.create(s3.url, IDENTITY))
        count("go on with a build", lambda: Cache.create(s3.url, IDENTITY))
        cache = Cache.create(s3.url, IDENTITY)
        for shard in made:
            count("commit a shard", lambda shard=shard: cache.commit(shard, {"batch": 4}))
        count("is a shard there", lambda: cache.holds((0, SHARD)))
        count("list shards, a thousand", cache.finished)
        count("compare a finished shard with the corpus", lambda: cache.provenance(0))
        count("open a cache", lambda: Cache.open(s3.url))
        cache = Cache.open(s3.url)
        cache.finished()
        count("read a window, shard not open", lambda: cache.read(0))
        count("read a window, row group at hand", lambda: cache.read(7))
        count("read a window, another row group", lambda: cache.read(9))
        copy = CopyFolder(Path(folder) / "copy")
        first, again = (CacheDataset(s3.url, copy=copy) for _ in range(2))
        count("the same through the copy, first time", lambda: first.cache.read(70))
        count("the same through the copy, again in another process", lambda: again.cache.read(70))
        count("statistics of three shards", cache.statistics)
        count("verify three shards", lambda: verify(cache))
        count("verify three shards, sample of two row groups", lambda: verify(cache, sample=2))
        count("merge three shards", lambda: merge([cache], f"{s3.url}-merged"))
        files, root = ObjectStorage(s3.url)._open()
        files.pipe_file(f"{root}/shards/windows-{0:012d}-{SHARD:012d}.parquet", b"?" * 1000)
        report = verify(Cache.open(s3.url))
        count("set a damaged shard aside", lambda: repair(Cache.open(s3.url), report))
    proxy.stop()
    server.stop()
    versions = {name: version(name) for name in ("s3fs", "fsspec", "aiobotocore", "moto")}
    print(json.dumps({"requests": counts, **versions}, indent=2))


if __name__ == "__main__":
    main()
