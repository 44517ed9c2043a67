# From a text file to a trained, evaluated, loadable student.
sparselogits cache --teacher demo --data notes.txt --out my-cache --window 256 --holdout 0.05
sparselogits info my-cache
sparselogits train --cache my-cache --student-config tiny --out my-run
sparselogits eval my-run --cache my-cache --teacher demo
python -c 'from transformers import pipeline; print(pipeline("text-generation", "my-run/model")("The first", max_new_tokens=5))'
