# A folder of texts, another one appended, a look at a window.
sparselogits cache --teacher demo --data notes --out my-cache --window 256 --holdout 0.1
sparselogits cache --teacher demo --data more.txt --append --out my-cache --window 256 --holdout 0.1
sparselogits verify my-cache
sparselogits view my-cache --window 1 --teacher demo --out window.html
sparselogits train --cache my-cache --student-config tiny --num-train-epochs 2 --out my-run
