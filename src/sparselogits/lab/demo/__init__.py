"""The whole way on a real teacher and real text, on a laptop: teacher, cache, students, table."""

from sparselogits.lab.demo.demo import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
