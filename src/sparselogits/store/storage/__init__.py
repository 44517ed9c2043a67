"""Storages of a cache's files: a folder, an object store, memory, and local copies."""
