# Conversations, of which only the answers are learnt; the student starts from a model that is there.
sparselogits cache --teacher demo --data chat.jsonl --completion-only --out my-cache --window 256 --holdout 0.1
sparselogits train --cache my-cache --student demo --per-device-train-batch-size 2 --out my-run
sparselogits eval my-run --cache my-cache --limit 4
