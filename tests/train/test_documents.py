"""Test that a student with restarted attention is trained on each document alone."""

import pytest
import torch

from sparselogits.documents import restarting_positions
from sparselogits.errors import SparseLogitsWarning
from sparselogits.train.objective import Objective, bind
from tests.architectures import tiny_model
from tests.teacher.test_documents import STARTS, alone, random_tokens, spans


@pytest.mark.parametrize(
    "architecture", ["llama", "opt", "falcon_alibi", "mamba2", "xlstm", "lfm2"]
)
def test_loss_and_gradients_are_those_of_each_document_alone(architecture):
    tokens = random_tokens()
    labels = torch.full_like(tokens, -100)
    for row, own in enumerate(STARTS):
        for span in spans(own):
            labels[row, span.start : span.stop - 1] = tokens[row, span.start + 1 : span.stop]
    plain, model = tiny_model(architecture), tiny_model(architecture)
    expected = torch.nn.functional.cross_entropy(
        alone.__wrapped__(plain, tokens, STARTS).flatten(0, 1), labels.flatten()
    )
    expected.backward()
    bind(model, Objective("ce"))
    positions = restarting_positions(tokens.shape[1], STARTS)
    found = model(input_ids=tokens, shift_labels=labels, position_ids=positions).loss
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert theirs.keys() == mine.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-4)


def test_experts_are_balanced_over_the_tokens_without_padding():
    model = tiny_model("jamba")
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = 10.0
    tokens = random_tokens(1)
    positions = restarting_positions(tokens.shape[1], STARTS[:1])
    masked = torch.full_like(tokens, -100)
    edges = list(spans(STARTS[0]))
    width = max(s.stop - s.start for s in edges)
    ids, mask = torch.zeros(2, len(edges), width, dtype=torch.int64)
    for row, span in enumerate(edges):
        ids[row, : span.stop - span.start] = tokens[0, span]
        mask[row, : span.stop - span.start] = 1
    with torch.no_grad():
        aux = 10.0 * model(input_ids=ids, attention_mask=mask, use_cache=False).aux_loss
        try:
            bind(model, Objective("ce"))
        except SparseLogitsWarning:
            pytest.fail("the router's loss is known for this architecture")
        labels = masked.clone()
        labels[0, :12] = tokens[0, 1:13]
        both = model(input_ids=tokens, shift_labels=labels, position_ids=positions).loss
        model.config.output_router_logits = False
        bind(model, Objective("ce"))
        without = model(input_ids=tokens, shift_labels=labels, position_ids=positions).loss
    torch.testing.assert_close(both - without, aux, rtol=1e-3, atol=1e-3)
