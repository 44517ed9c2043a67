import pytest

from sparselogits.corpus import open_source, pack, packing_for
from sparselogits.data import CacheDataset
from sparselogits.lab.report import WindowViewer
from sparselogits.samplers import Systematic
from sparselogits.teacher import load_teacher
from tests.conftest import build_cache, tiny_llama, write_lines

TEXT = '</script><img src=x onerror="document.title=1"> <!-- & \u2028 naïve 東京 😀\n\tend. '
LENGTH = 48


@pytest.fixture(scope="session")
def viewer(tmp_path_factory, teacher_folder, tokenizer) -> WindowViewer:
    folder = tmp_path_factory.mktemp("viewed")
    write_lines(folder / "text.jsonl", ({"text": TEXT * 3} for _ in range(3)))
    teacher = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    packing = packing_for(tokenizer, window_length=LENGTH, separator_id=0)
    source = open_source(folder / "text.jsonl")
    corpus = pack(source, tokenizer, packing, folder / "corpus", vocab_size=teacher.vocab_size)
    build_cache(teacher, corpus, folder / "cache", Systematic(12), tokenizer)
    dataset, student = CacheDataset(folder / "cache"), tiny_llama(seed=3)
    return WindowViewer(dataset, tokenizer=tokenizer, teacher=teacher, student=student)
