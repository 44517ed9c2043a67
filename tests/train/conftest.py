"""Provide caches whose windows have very different numbers of labels, at two temperatures."""

from itertools import cycle
from pathlib import Path

import pytest

from sparselogits.caching import CacheRequest, build_caches
from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
from sparselogits.samplers import Systematic
from sparselogits.teacher import load_teacher
from tests.conftest import documents, write_lines

HOT = 2.0
"""Temperature of the second cache."""
LENGTHS = [(300, 20), (10, 200), (150, 5), (20, 90), (5, 250)]
"""Characters of successive prompts and completions, which give windows of 0 to 31 labels."""


@pytest.fixture(scope="session")
def answers(tmp_path_factory, teacher_folder, tokenizer) -> dict[float, Path]:
    """Build a cache of completions per temperature, in one pass of the teacher."""
    folder = tmp_path_factory.mktemp("answers")
    text, at, records = "".join(documents())[:24_000], 0, []
    for prompt, completion in cycle(LENGTHS):
        if at + prompt + completion > len(text):
            break
        middle, at, start = at + prompt, at + prompt + completion, at
        records.append({"prompt": text[start:middle], "completion": text[middle:at]})
    path = write_lines(folder / "answers.jsonl", records)
    teacher = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    packing = packing_for(tokenizer, window_length=32, separator_id=0)
    source = open_source(path, completion_only=True)
    corpus = pack(source, tokenizer, packing, folder / "corpus", vocab_size=teacher.vocab_size)
    caches = {t: folder / f"cache-{t:g}" for t in (1.0, HOT)}
    build_caches(
        teacher,
        corpus,
        [CacheRequest(root, Systematic(12), temperature=t) for t, root in caches.items()],
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
    )
    return caches
