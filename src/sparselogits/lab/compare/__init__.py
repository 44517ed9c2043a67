"""Compare training methods: train the same students with each, and evaluate the results."""

from sparselogits.lab.compare.comparison import compare
from sparselogits.lab.compare.recipe import CompareRecipe, load_compare_recipe, parse_compare_recipe
from sparselogits.lab.compare.results import MethodRow, Results, RunRow, read_results

__all__ = [
    "CompareRecipe",
    "MethodRow",
    "Results",
    "RunRow",
    "compare",
    "load_compare_recipe",
    "parse_compare_recipe",
    "read_results",
]
