"""Studies on top of the library: comparisons, gradients, tasks, planning, reports, the demo.

The library never imports from here.
"""
