"""Prune a teacher on a laptop, and train the pruned student by several methods."""

from sparselogits.lab.demo.demo import DemoResult, Scale, run_demo

__all__ = ["DemoResult", "Scale", "run_demo"]
