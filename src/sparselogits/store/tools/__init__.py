"""Tools for existing caches: verify, repair, merge, push, export, sample, and the dataset card."""
