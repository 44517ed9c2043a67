"""Test a bound student under FSDP2's `fully_shard`: gradients of one process."""

import pytest

from tests.train.test_ddp import torchrun

SCRIPT = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from sparselogits.train import leave_process_group
from sparselogits.train.objective import Objective, bind
from tests.conftest import tiny_llama

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(0, 96, (2 * ranks, 12), generator=generator)
labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
ids = torch.tensor([5, 9, 20]).expand(2 * ranks, 12, 3).contiguous()
weights = torch.tensor([0.5, 0.3, 0.1]).expand(2 * ranks, 12, 3).contiguous()
mine = slice(2 * rank, 2 * rank + 2)

def gradients(model, rows):
    bind(model, Objective("sparse", alpha=0.3))
    if rows == mine:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    inputs = {"input_ids": tokens, "shift_labels": labels, "target_ids": ids,
              "target_weights": weights}
    model(**{k: v[rows] for k, v in inputs.items()}).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}

for tied in (True, False):
    whole = gradients(tiny_llama(tie_word_embeddings=tied).train(), slice(None))
    parts = gradients(tiny_llama(tie_word_embeddings=tied).train(), mine)
    assert whole.keys() == parts.keys() and len(whole) > 10
    for name, gradient in whole.items():
        assert isinstance(parts[name], DTensor), name
        torch.testing.assert_close(parts[name].full_tensor(), gradient, rtol=1e-4, atol=1e-6,
                                   msg=lambda m: f"{name}, tied {tied}: {m}")
leave_process_group()
"""


@pytest.mark.slow
def test_sharded_gradients_are_those_of_one_process(tmp_path):
    script = tmp_path / "shard.py"
    script.write_text(SCRIPT)
    torchrun(2, script)
