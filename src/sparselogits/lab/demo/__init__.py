"""The whole way on a laptop: a teacher is pruned, and the student healed by each method."""

from sparselogits.lab.demo.demo import DemoResult, Scale, run_demo

__all__ = ["DemoResult", "Scale", "run_demo"]
