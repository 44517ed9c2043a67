"""Zero-shot tasks through lm-evaluation-harness: three whose data are made here, and the hub's.

The three need no download: `continuation` and `last_word` ask about held-out text of the corpus at
hand, `agreement` about sentences of a small grammar. Each is a YAML file of this folder, as lm-eval
reads them, and its data are one file of JSON lines, which `write_tasks` makes.
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
