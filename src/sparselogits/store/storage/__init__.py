"""Where the files of a cache are kept: a folder, an object store, memory, and local copies."""
