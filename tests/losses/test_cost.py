"""Test the promised cost of the loss: one chunk of logits, no device synchronisation."""

import importlib.util
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import RULES, problem
from tests.conftest import tiny_llama
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparselogits.language_model import Head
from sparselogits.losses import (
    SparseKDLoss,
    TeacherHead,
    linear_dense_kd,
    linear_sparse_cross_entropy,
)
from sparselogits.train.objective import Objective, bind

MEMORY = Path(__file__).parents[2] / "benchmarks" / "memory.py"
DEVICE = "meta"
"""Device in place of an accelerator: it computes no numbers, but shows copies to and from it."""
WAITS = (
    *("_local_scalar_dense", "is_nonzero", "equal"),  # item, bool, tolist, if
    *("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
    *("bincount", "histc"),  # sizes known to the device alone
)
MASKED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
COPIES = ("_to_copy", "copy_", "copy", "_copy_from")
FROM_HOST = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


@pytest.fixture
def peak_bytes(monkeypatch):
    """The benchmark's own function; `peak_bytes(run)`."""
    monkeypatch.syspath_prepend(MEMORY.parent)  # where the script finds its own kin
    spec = importlib.util.spec_from_file_location("memory", MEMORY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda run: module.peak_bytes(run, "cpu")


@pytest.mark.parametrize("rule", ["drop", "ghost"])
def test_peak_memory_is_one_chunk_of_logits(rule, peak_bytes):
    rows, width, vocabulary, chunk_rows = 512, 8, 50_000, 64
    x = torch.randn(rows, width, requires_grad=True)
    W = torch.randn(vocabulary, width, requires_grad=True)
    ids, weights = torch.arange(4).expand(rows, 4), torch.full((rows, 4), 0.2)

    def step():
        linear_sparse_cross_entropy(
            x, W, ids, weights, missing_mass=rule, chunk_rows=chunk_rows
        ).backward()

    gradients = 4 * (x.numel() + W.numel())
    beyond = peak_bytes(step) - gradients
    assert beyond < 1.1 * 4 * chunk_rows * vocabulary


def test_logits_are_not_kept_for_backward():
    p = problem()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_sparse_cross_entropy(**p)
    assert sorted(kept) == sorted(
        [torch.Size([])] + [p[k].shape for k in ("input", "linear_weight", "linear_bias")]
    )


class NoWaitingOperators(TorchDispatchMode):
    """Refuses every operator whose result the host waits for, and copies between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name == "repeat_interleave":
            assert kwargs.get("output_size") is not None, "repeat_interleave waits for its size"
        if name in MASKED:  # a mask is turned into indices, whose number the host asks for
            chosen = [i for i in args[1] if i is not None]
            assert all(i.dtype not in (torch.bool, torch.uint8) for i in chosen), "a mask waits"
        if name in COPIES:
            places = {t.device.type for t in args if isinstance(t, Tensor)}
            places |= {torch.device(d).type for d in (kwargs.get("device"),) if d is not None}
            assert len(places) == 1, f"{name} from {args[0].device} waits for the copy"
        return function(*args, **kwargs)


class NoNumbersFromHost(TorchFunctionMode):
    """Refuses tensors made of Python numbers on the device: copied there below any dispatch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function in FROM_HOST and not any(found is given for given in args):
            assert found.device.type != DEVICE, f"{function.__name__} waits for a copy"
        return found


@contextmanager
def no_waiting():
    with NoNumbersFromHost(), NoWaitingOperators():
        yield


@pytest.fixture
def autocast_knows_device(monkeypatch):
    """As it knows every real accelerator, on which it is off here."""
    asked, entered = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda d: d != DEVICE and asked(d))
    monkeypatch.setattr(
        torch, "autocast", lambda d, **o: nullcontext() if d == DEVICE else entered(d, **o)
    )


def on_device(p):
    return {k: v.detach().to(DEVICE).requires_grad_(v.requires_grad) for k, v in p.items()}


@pytest.mark.parametrize(
    "waits",
    [
        lambda t: t[0, 0].item(),
        lambda t: bool(t.any()),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.to("cpu", torch.float64),
        lambda t: torch.zeros(3).to(t),
        lambda t: t.copy_(torch.zeros(2, 3)),
        lambda t: torch.zeros(2, 3).copy_(t),
        lambda t: torch.tensor([1.0, 2.0], device=t.device),
        lambda t: torch.as_tensor(1.0, device=t.device),
        lambda t: t.new_tensor([1.0]),
        lambda t: t[t > 0],
        lambda t: t.__setitem__(t > 0, t[0, 0]),
        lambda t: t.nonzero(),
        lambda t: torch.where(t > 0),
        lambda t: t.masked_select(t > 0),
        lambda t: t.unique(),
        lambda t: torch.equal(t, t),
        lambda t: t[0].repeat_interleave(torch.ones_like(t[0], dtype=torch.int64)),
    ],
)
def test_the_guard_guards(waits):
    with pytest.raises(AssertionError, match="wait"), no_waiting():
        waits(torch.zeros(2, 3, device=DEVICE))


def test_the_guard_lets_pass_what_does_not_wait():
    with no_waiting():
        t = torch.full((2, 3), 0.5, device=DEVICE)
        torch.where(t > 0, 1.0, t).masked_fill_(t > 1, 0.0).to(torch.bfloat16)
        t[t[:, 0].long()] / 2
        torch.as_tensor(t)
        torch.tensor(1.0)


@pytest.mark.usefixtures("autocast_knows_device")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_waits_for_the_device(rule, reduction):
    p = on_device(problem(torch.float32))
    options = {"alpha": 0.2, "temperature": 2.0, "logit_softcap": 5.0, "missing_mass": rule}
    module = SparseKDLoss(**options, reduction=reduction)
    with no_waiting():
        module(**p).loss.backward()
    assert p["linear_weight"].grad is not None


@pytest.mark.usefixtures("autocast_knows_device")
@pytest.mark.parametrize("method", ["sparse", "ce", "full"])
def test_a_students_forward_and_its_meter_do_not_wait_either(method):
    """What `SparseKDTrainer` runs, but for the trunk: transformers' own asks if ids are packed."""
    model = tiny_llama().train()
    objective = Objective(method, alpha=0.3, temperature=2.0)
    if method == "full":
        objective.teacher_head = Head(torch.randn(500, 8, device=DEVICE), None, 1.0, None)
        objective.teacher_tokens = torch.ones(500, dtype=torch.bool, device=DEVICE)
    bind(model, objective)
    model.to(DEVICE)
    embedding = model.model.embed_tokens
    model.model.forward = lambda input_ids, **_: SimpleNamespace(
        last_hidden_state=embedding(input_ids)
    )
    tokens = torch.zeros(2, 12, dtype=torch.int64, device=DEVICE)
    inputs = {"input_ids": tokens, "shift_labels": tokens, "labels": tokens}
    inputs["num_items_in_batch"] = torch.zeros((), dtype=torch.int64, device=DEVICE)
    if method == "full":
        inputs["teacher_hidden"] = torch.zeros(2, 12, 8, device=DEVICE)
    elif method == "sparse":
        inputs["target_ids"] = torch.zeros(2, 12, 3, dtype=torch.int64, device=DEVICE)
        inputs["target_weights"] = torch.zeros(2, 12, 3, device=DEVICE)
        inputs["teacher_entropy"] = torch.zeros(2, device=DEVICE)
    model(**inputs)  # the meters move to the device once
    with torch.no_grad():
        model(**inputs)
    with no_waiting():
        model(**inputs).loss.backward()
        with torch.no_grad():
            model(**inputs)
    assert model.lm_head.weight.grad is not None


@pytest.mark.usefixtures("autocast_knows_device")
def test_dense_baselines_do_not_wait_either():
    p = on_device(problem(torch.float32))
    teacher = TeacherHead(p["input"].detach(), p["linear_weight"].detach())
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        with no_waiting():
            linear_dense_kd(
                p["input"],
                p["linear_weight"],
                teacher,
                divergence=divergence,
                labels=p["labels"],
                alpha=0.1,
            ).loss.backward()
