"""Store a cache's files in a folder or an object store, with local copies of remote files."""
