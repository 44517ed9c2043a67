"""Test that a teacher with weights on disk gives the logits of the whole model."""

import pytest
import torch

from sparselogits.teacher import TransformersTeacher, check_engine, load_teacher

TOKENS = torch.arange(60).reshape(3, 20) * 17 % 500
PARTLY = {
    **dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb"), "cpu"),
    **dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk"),
}


def logits(teacher: TransformersTeacher) -> torch.Tensor:
    return torch.cat([piece.logits for piece in teacher.logits(TOKENS)])


@pytest.mark.filterwarnings("default::sparselogits.errors.SparseLogitsWarning")
@pytest.mark.parametrize(
    ("how", "places"),
    [
        ({"device_map": "auto"}, {"cpu"}),
        ({"device_map": PARTLY}, {"cpu", "meta"}),
        ({"device_map": "auto", "max_memory": {"cpu": 10_000}}, {"meta"}),
    ],
    ids=["whole", "partly on disk", "all on disk"],
)
def test_logits_do_not_depend_on_where_weights_are(how, places, teacher_folder, tokenizer):
    whole = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    spread = load_teacher(str(teacher_folder), tokenizer=tokenizer, **how)
    assert {p.device.type for p in spread.model.parameters()} == places
    assert spread.identity == whole.identity
    check_engine(spread, TOKENS)
    torch.testing.assert_close(logits(spread), logits(whole))
