import json

import pytest

from sparselogits.caching import CacheRequest, build_caches
from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
from sparselogits.data import CacheDataset
from sparselogits.lab.report import WindowViewer
from sparselogits.samplers import Systematic
from sparselogits.teacher import load_teacher
from tests.conftest import tiny_llama

TEXT = '</script><img src=x onerror="document.title=1"> <!-- & \u2028 naïve 東京 😀\n\tend. '
LENGTH = 48


@pytest.fixture(scope="session")
def viewer(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: object, tokenizer: object
) -> WindowViewer:
    folder = tmp_path_factory.mktemp("viewed")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": TEXT * 3}) + "\n" for _ in range(3))
    )
    teacher = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    packing = packing_for(tokenizer, window_length=LENGTH, separator_id=0)
    source = open_source(str(folder / "text.jsonl"))
    corpus = pack(source, tokenizer, packing, folder / "corpus", vocab_size=teacher.vocab_size)
    build_caches(
        teacher,
        corpus,
        [CacheRequest(folder / "cache", Systematic(12))],
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
    )
    return WindowViewer(
        CacheDataset(folder / "cache"),
        tokenizer=tokenizer,
        teacher=teacher,
        student=tiny_llama(seed=3),
    )
