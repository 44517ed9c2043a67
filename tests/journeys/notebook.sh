# In Python: look at a cache, train on it with the Trainer, load what was saved.
sparselogits cache --teacher demo --data notes.txt --out my-cache --window 256
python notebook.py
sparselogits eval my-student --data notes.txt --window 256 --limit 2
