"""Masked language models are pruned like causal ones; half of the blocks is every second one."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

from sparselogits.cli import app
from sparselogits.errors import ShrinkError
from sparselogits.shrink import save, shrink
from sparselogits.shrink.layout import layout_of
from sparselogits.shrink.scores import spaced_layers
from tests.masked_models import MODELS, bert_tokenizer, tiny_bert

TOKENS = torch.randint(2, 96, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", MODELS)
def test_a_student_of_half_the_layers_has_the_weights_of_every_second_one(name, tied, tmp_path):
    torch.manual_seed(0)
    teacher = MODELS[name](num_hidden_layers=4, tie_word_embeddings=tied).eval()
    shrunk = shrink(teacher, layers=2, layer_score="spaced")
    student, layers = shrunk.model, layout_of(teacher).layers
    assert shrunk.dropped_layers == (1, 2)
    whole, own = teacher.state_dict(), student.state_dict()
    for key, tensor in own.items():
        of_teacher = key.replace(f"{layers}.1.", f"{layers}.3.")
        assert torch.equal(tensor, whole[of_teacher]), key
    assert {k for k in whole if f"{layers}.1." not in k and f"{layers}.2." not in k} == {
        key.replace(f"{layers}.1.", f"{layers}.3.") for key in own
    }
    head = student.get_output_embeddings()
    assert (head.weight is student.get_input_embeddings().weight) == tied

    save(shrunk, tmp_path / "student", None, teacher="teacher")
    again, report = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "student", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert type(again) is type(teacher)
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=TOKENS).logits for m in (again, student))
    assert torch.equal(found, expected)
    blocks = layout_of(teacher).blocks_of(teacher)
    for number in (1, 2):  # the teacher without its two inner blocks
        blocks[number] = _Skip(blocks[number])
    with torch.no_grad():
        torch.testing.assert_close(teacher(input_ids=TOKENS).logits, expected)
    assert "pipeline_tag: fill-mask" in (tmp_path / "student/README.md").read_text()


class _Skip(nn.Module):
    """Return the input of a block in the form of the block's output."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden_states, *others, **named):
        output = self.block(hidden_states, *others, **named)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def test_blocks_are_spaced_from_the_first_to_the_last():
    assert spaced_layers(6, 12) == (0, 2, 4, 7, 9, 11)  # scripts of DistilBERT and DistilBART
    assert spaced_layers(3, 12) == (0, 6, 11)
    for total in range(1, 40):
        for count in range(1, total + 1):
            chosen = spaced_layers(count, total)
            assert len(set(chosen)) == count
            assert chosen[0] == 0
            assert chosen[-1] == total - 1 or count == 1


def test_influence_and_channels_work_for_masked_models_and_the_next_tokens_loss_does_not():
    teacher = tiny_bert(num_hidden_layers=3).eval()
    with torch.no_grad():  # the last block changes its input hardly at all
        for layer in (teacher.bert.encoder.layer[2],):
            for part in (layer.attention.output.dense, layer.output.dense):
                part.weight.mul_(1e-4)
                part.bias.zero_()
    found = shrink(teacher, layers=2, windows=TOKENS, channels=24)
    assert found.dropped_layers == (2,)
    assert found.after["channels"] == 24
    with pytest.raises(ShrinkError, match="masked language model"):
        shrink(teacher, layers=2, windows=TOKENS, layer_score="loss")


def test_the_command_needs_no_text_for_spaced_blocks(tmp_path):
    tokenizer = bert_tokenizer()
    tiny_bert(num_hidden_layers=4, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    words = ["shrink", str(tmp_path / "bert"), "--out", str(tmp_path / "half"), "--layers", "2"]
    done = CliRunner().invoke(app, [*words, "--layer-score", "spaced", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "half")
    assert student.config.num_hidden_layers == 2
