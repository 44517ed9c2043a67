"""Verify, repair, merge, publish, export, sample and describe caches."""
