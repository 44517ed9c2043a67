"""Compare, plan, report and demonstrate distillation; the library does not import this package."""
