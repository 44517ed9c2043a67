"""Run zero-shot tasks by lm-evaluation-harness: three with data made here, and those of the hub.

The three need no download: `continuation` and `last_word` ask about held-out text of the given
corpus, `agreement` about sentences of a small grammar. Each is a YAML file in lm-eval's form in
this folder; its data are one file of JSON lines, which `write_tasks` makes.
"""

from sparselogits.lab.tasks.local import LIMIT, LOCAL_TASKS, write_tasks
from sparselogits.lab.tasks.running import (
    TaskScore,
    check_task,
    is_perplexity,
    require_lm_eval,
    run_tasks,
)

__all__ = [
    "LIMIT",
    "LOCAL_TASKS",
    "TaskScore",
    "check_task",
    "is_perplexity",
    "require_lm_eval",
    "run_tasks",
    "write_tasks",
]
