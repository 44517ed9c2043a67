"""Store a cache's files in a folder, an object store or memory, and copy remote files locally."""
