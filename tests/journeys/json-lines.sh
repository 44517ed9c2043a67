# JSON lines with a field of another name; evaluation on other text.
sparselogits cache --teacher demo --data pages.jsonl --text-field body --out my-cache --window 256
sparselogits train --cache my-cache --student-config tiny --alpha 0.1 --out my-run
sparselogits eval my-run --data notes.txt --window 256 --teacher demo
