"""Generate conversations with the teacher's answers, on which its distribution is peaked.

    python experiments/healing/answers.py --text FILE --out ANSWERS.jsonl [--temperature 0]

Each prompt asks for an explanation of a passage of FILE. Temperature 0 is greedy decoding;
1 samples from the teacher's full distribution. Each line is a record with `messages`, so that a
cache built with `--completion-only` contains targets for the answers only.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from planned import PRECISION
from small_teacher import documents
from sparselogits.teacher.loading import load_language_model, load_tokenizer

BATCH = 16
REQUESTS = (
    "Explain in your own words what this passage says:",
    "Which question does this passage answer? State it, then answer it:",
    "Continue this speech:",
    "Write a short letter that answers this passage:",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--answers", type=int, default=128)
    parser.add_argument(
        "--tokens", type=int, default=128, help="maximum number of tokens per answer"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.teacher)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load_language_model(arguments.teacher, dtype=PRECISION).eval()
    passages = [text[:400].rpartition(" ")[0] for text in documents([arguments.text])]
    random.Random(arguments.seed).shuffle(passages)
    requests = [
        [{"role": "user", "content": f"{REQUESTS[i % len(REQUESTS)]}\n\n{passage}"}]
        for i, passage in enumerate(passages[: arguments.answers])
    ]
    sampling = {"do_sample": False}
    if arguments.temperature:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_k": 0,
            "top_p": 1.0,
        }
    torch.manual_seed(arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as out:
        for first in range(0, len(requests), BATCH):
            part = requests[first : first + BATCH]
            prompts = [
                tokenizer.apply_chat_template(own, add_generation_prompt=True, tokenize=False)
                for own in part
            ]
            given = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.no_grad():
                written = model.generate(
                    **given,
                    max_new_tokens=arguments.tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    **sampling,
                )
            for own, row in zip(part, written, strict=True):
                answer = tokenizer.decode(
                    row[given["input_ids"].shape[1] :], skip_special_tokens=True
                )
                reply = {"role": "assistant", "content": answer.strip()}
                out.write(json.dumps({"messages": [*own, reply]}) + "\n")
            print(f"{first + len(part)} of {len(requests)} answers", flush=True)


if __name__ == "__main__":
    main()
