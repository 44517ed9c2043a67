"""Load a teacher from a local folder, a hub name or a GGUF file, and compute its fingerprint.

Weights are read from safetensors or GGUF, never from pickle, and code from the model's folder runs
only if the caller sets `trust_remote_code`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.allowances import refuse
from sparselogits.errors import (
    InvalidArgumentError,
    MissingDependencyError,
    SlowFormatWarning,
    StorageError,
    TeacherError,
    reason_of,
)
from sparselogits.extras import require
from sparselogits.files import whole_folder
from sparselogits.identity import canonical_json
from sparselogits.language_model import embedding_rows, names_masked_class, output_columns
from sparselogits.teacher.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    Checkpoint,
    adapter_fingerprint,
    bounded_by,
    file_sha256,
    find_checkpoint,
    no_model_error,
    not_found_error,
    require_on_hub,
    require_plausible,
    tensor_shapes,
)
from sparselogits.teacher.demo_model import model_named
from sparselogits.teacher.number_formats import has_products
from sparselogits.teacher.transformers_engine import SLICE_POSITIONS, TransformersTeacher, entrance
from sparselogits.wording import counted

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Data types in which a model can be loaded, by name."""

# fields of a configuration that do not change what the model computes
_WITHOUT_EFFECT = {
    *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"),
    "distributed_config",
}


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a teacher; for an adapter without a tokenizer, that of the base model.

    Args:
        name: local folder, GGUF file or hub name, or "demo" (see `demo_model`).
        trust_remote_code: whether to run tokenizer code from the model's folder.

    Raises:
        TeacherError: no tokenizer can be read, or the configuration does not match the weights.
        MissingDependencyError: packages that "demo" needs are missing.
    """
    from transformers import AutoTokenizer

    name = model_named(name)
    source, arguments = _source_of(name)
    folder = Path(source)
    if folder.is_dir():
        weights = tuple(sorted(folder.glob("*.safetensors"))) if not arguments else ()
        require_plausible(Checkpoint(name, source, folder, weights=weights))
    elif not arguments:
        require_on_hub(source)
    if (folder / ADAPTER_CONFIG).exists() and not any(folder.glob("tokenizer*")):
        found = find_checkpoint(name)
        if found.base is not None:
            return load_tokenizer(found.base.source, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, **arguments
        )
    except Exception as error:
        _require_folder(name, error)
        raise TeacherError(
            f"no tokenizer could be read from {name!r}: {_first_line(error).rstrip(':. ')}. Give a "
            "folder with tokenizer files, a GGUF file, or a hub name (needs a network once)"
        ) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # for most architectures transformers makes such a tokenizer where there are no files
        raise TeacherError(
            f"no tokenizer could be read from {name!r}: it has no tokenizer files, or they contain "
            "special tokens alone. Save the model's tokenizer there too, or give a folder with both"
        )
    return tokenizer


TOKENIZER_FOLDER = "tokenizer"
"""Name of the subfolder of a cache that contains the tokenizer of the cache's tokens."""


def keep_tokenizer(tokenizer: Any, cache: str | Path) -> None:
    """Save a tokenizer in a cache's folder, unless the cache contains a tokenizer already.

    Raises StorageError if the folder cannot be written.
    """
    folder = Path(cache) / TOKENIZER_FOLDER
    if folder.exists():
        return
    try:
        with whole_folder(folder) as temporary:
            tokenizer.save_pretrained(temporary)
    except (InvalidArgumentError, StorageError):
        if not folder.exists():  # another worker of the same build may have written it first
            raise


def load_teacher(
    name: str,
    *,
    tokenizer: Any,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    tp_plan: str | dict[str, str] | None = None,
    trust_remote_code: bool = False,
    slice_positions: int = SLICE_POSITIONS,
    allow: Collection[str] = (),
) -> TransformersTeacher:
    """Load a language model, causal or masked, as a teacher.

    Args:
        name: local folder, GGUF file or hub name, or "demo" (see `demo_model`).
        tokenizer: tokenizer of the teacher, from `load_tokenizer`.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the checkpoint.
        device: device of the model; ignored with `device_map` or `tp_plan`.
        device_map: passed to transformers ("auto" for a teacher larger than a device).
        max_memory: maximum memory per device for `device_map`, passed to transformers; weights
            beyond it are read from disk.
        tp_plan: "auto", or a plan for transformers, to shard each layer over torchrun's ranks. All
            ranks must run each forward pass together (see `tensor_parallel`). transformers
            initialises the process group if there is none.
        trust_remote_code: whether to run modelling code from the model's folder.
        slice_positions: number of positions for which logits are in memory at a time.
        allow: names of `ALLOWANCES` whose failed checks become warnings.

    Returns:
        The teacher, whose identity contains the fingerprint of its weights.

    Warns:
        SlowFormatWarning: `dtype` is "auto", and the model is on a CPU without instructions for
            products in the dtype of the checkpoint. With torchrun, only rank 0 warns.
        SparseLogitsWarning: a check in `allow` failed, or see `TransformersTeacher`.

    Raises:
        TeacherError: the model cannot be read, has no trained head, does not match the tokenizer,
            or changes on disk while it is read, or `dtype` is unknown.
        MissingDependencyError: the gguf package is missing for a GGUF file, peft for an adapter, or
            a package that "demo" needs.

    Example:
        >>> tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M")
        >>> teacher = load_teacher("HuggingFaceTB/SmolLM2-135M", tokenizer=tokenizer)
        >>> teacher.vocab_size
        49152
    """
    name = model_named(name)
    found = find_checkpoint(name, allow=allow)
    before = found.stamp()
    model = _load(
        found,
        dtype=dtype,
        device_map=device_map,
        max_memory=max_memory,
        tp_plan=tp_plan,
        trust_remote_code=trust_remote_code,
        trainable=False,
        allow=allow,
    )
    if device_map is None and tp_plan is None:
        model.to(device)
    identity = {
        "name": Path(name).name if Path(name).exists() else name,
        "weights": weights_fingerprint(found, model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "engine": "transformers",
        "quantization": quantization(found.root.name, model),
    }
    if found.stamp() != before:
        raise TeacherError(
            f"files of {name!r} changed while they were read, so the weights in memory may differ "
            "from those that were hashed; try again when no process writes to the files"
        )
    model.requires_grad_(False)
    teacher = TransformersTeacher(
        model,
        token_mask=token_mask(tokenizer, model, allow=allow),
        identity=identity,
        slice_positions=slice_positions,
    )
    if dtype == "auto" and teacher.device.type == "cpu" and os.environ.get("RANK", "0") == "0":
        _advise_float32(teacher.identity["name"], next(model.parameters()).dtype)
    return teacher


def _advise_float32(name: str, dtype: torch.dtype) -> None:
    """Issue a warning if the processor has no instructions for products of a data type."""
    if has_products(dtype) is False:
        warnings.warn(
            f"{name!r} is stored in {str(dtype).removeprefix('torch.')}, and this processor has no "
            "instructions for products in that format. float32 is faster here, in twice the memory "
            "and with the same results up to rounding: use --dtype float32 (teacher_dtype: float32 "
            "in a recipe)",
            SlowFormatWarning,
            stacklevel=3,
        )


def load_language_model(
    name: str,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    trainable: bool = False,
    allow: Collection[str] = (),
) -> nn.Module:
    """Load a language model, and validate that its checkpoint contains all of its weights.

    A checkpoint whose configuration names a masked class is loaded as a masked language model, any
    other as a causal language model.

    For a PEFT adapter, the base model is loaded with the adapter. Arguments that are not listed
    here are those of `load_teacher`.

    Args:
        trainable: whether the weights of an adapter, and only those, will be trained.

    Raises:
        TeacherError: the model cannot be read, is not a language model, or lacks weights, or
            `dtype` is unknown.
        MissingDependencyError: see `load_teacher`.
    """
    found = find_checkpoint(model_named(name), allow=allow)
    how = {"trust_remote_code": trust_remote_code, "trainable": trainable}
    return _load(found, dtype=dtype, allow=allow, **how)


def require_dtype(dtype: str) -> None:
    """Validate that a dtype is "auto" or a key of `DTYPES`. Raises TeacherError."""
    if dtype != "auto" and dtype not in DTYPES:
        raise TeacherError(f"unknown dtype {dtype!r}; available: auto, {', '.join(DTYPES)}")


def _load(
    found: Checkpoint, *, dtype: str, trainable: bool, allow: Collection[str], **how: Any
) -> nn.Module:
    """Load the model of a checkpoint; see `load_language_model`."""
    if found.base is not None:
        base = _load(found.base, dtype=dtype, trainable=False, allow=allow, **how)
        return _with_adapter(found, base, trainable)
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GgufConfig
    from transformers.distributed import DistributedConfig

    require_dtype(dtype)
    name, arguments = found.name, dict(how)
    if found.gguf is not None:
        require(f"reading {found.gguf.name}", "gguf")
        arguments["gguf_file"] = found.gguf.name
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    else:
        arguments["use_safetensors"] = True
    if found.commit is not None:
        arguments["revision"] = found.commit
    if (tp_plan := arguments.pop("tp_plan", None)) is not None:
        arguments["distributed_config"] = DistributedConfig(tp_plan=tp_plan)
    try:
        masked = found.gguf is None and _is_masked(
            found.source, found.commit, trust_remote_code=how.get("trust_remote_code", False)
        )
        kind: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        with bounded_by(found):
            model, info = kind.from_pretrained(
                found.source,
                dtype=DTYPES.get(dtype, "auto"),
                output_loading_info=True,
                **arguments,
            )
    except TeacherError:
        raise
    except Exception as error:
        raise TeacherError(
            f"{name!r} could not be loaded as a language model: "
            f"{_first_line(error).rstrip(':. ')}. Give a language model that transformers "
            "supports, or download it again"
        ) from error
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        lacking = TeacherError(
            f"{name!r} lacks {counted(len(missing), 'weight')} of {type(model).__name__} "
            f"({missing[0]}, ...), which would be random; give the checkpoint of the language "
            "model with its head"
        )
        refuse(lacking, "missing-weights", allow)
    return model  # type: ignore[no-any-return]


def names_masked_model(name: str, *, trust_remote_code: bool = False) -> bool:
    """Return whether a checkpoint, or the base of an adapter, is that of a masked language model.

    The result is False for a GGUF file, and if the configuration cannot be read. The arguments are
    those of `load_tokenizer`.
    """
    try:
        source, arguments = locate_model(name)
        if "gguf_file" in arguments:
            return False
        revision = None
        if (Path(source) / ADAPTER_CONFIG).exists():
            root = find_checkpoint(source).root
            if root.gguf is not None:
                return False
            source, revision = root.source, root.commit
        return _is_masked(source, revision, trust_remote_code=trust_remote_code)
    except Exception:  # loading the model reports what is wrong
        return False


def _is_masked(source: str, revision: str | None, *, trust_remote_code: bool) -> bool:
    """Return whether the configuration of a checkpoint without adapters names a masked model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        source, revision=revision, trust_remote_code=trust_remote_code
    )
    return names_masked_class(config)


def _with_adapter(found: Checkpoint, base: nn.Module, trainable: bool) -> nn.Module:
    """Return a base model with an adapter, loaded by PEFT."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError(
            f"reading the adapter {found.name} needs the peft package: pip install peft"
        ) from error
    _resize_for(found, base)
    try:
        with bounded_by(found):
            model: nn.Module = PeftModel.from_pretrained(
                base, str(found.folder), is_trainable=trainable
            )
    except TeacherError:
        raise
    except Exception as error:
        raise TeacherError(
            f"the adapter at {found.name!r} could not be added to its base "
            f"{found.base.name if found.base else ''!r}: {_first_line(error)}. Check that it was "
            "trained for this base, and that the installed peft supports its type"
        ) from error
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=entrance(model)))
    except Exception as error:
        raise TeacherError(
            f"the model with the adapter at {found.name!r} cannot be run on tokens alone: "
            f"{_first_line(error)}. Merge the adapter into its base with PEFT"
        ) from error
    return model


def _resize_for(found: Checkpoint, base: nn.Module) -> None:
    """Resize the base's embedding to the row count of an embedding that the adapter contains."""
    rows = embedding_rows(base)
    names = {id(p): name for name, p in base.named_parameters(remove_duplicate=False)}
    embedding = names.get(id(base.get_input_embeddings().weight))  # type: ignore[operator]
    for key, shape in tensor_shapes(found.folder / ADAPTER_WEIGHTS):
        if key.removeprefix("base_model.model.") == embedding and shape[0] != rows:
            base.resize_token_embeddings(shape[0])  # type: ignore[operator]


def token_mask(tokenizer: Any, model: nn.Module, *, allow: Collection[str] = ()) -> Tensor:
    """Return the mask of a model's ids that are tokens of the tokenizer, bool [V].

    Args:
        tokenizer: a transformers tokenizer.
        model: a transformers language model with V logits per position.
        allow: names of `ALLOWANCES`; "tokens-without-rows" turns the error into a warning.

    Raises:
        TeacherError: the head or the embedding has no rows for some ids of the tokenizer, or the
            tokenizer has no ids.
    """
    head_rows = output_columns(model)
    rows = min(head_rows, embedding_rows(model))
    ids = torch.tensor(sorted(set(tokenizer.get_vocab().values())), dtype=torch.int64)
    if ids.numel() == 0 or int(ids[-1]) >= rows:
        largest = int(ids[-1]) if ids.numel() else None
        error = TeacherError(
            f"the tokenizer does not belong to the teacher: its largest id is {largest}, but the "
            f"teacher's vocabulary has {rows} rows; give the tokenizer of the teacher"
        )
        refuse(error, "tokens-without-rows", allow)
        ids = ids[ids < rows]
    mask = torch.zeros(head_rows, dtype=torch.bool)
    mask[ids] = True
    return mask


def weights_fingerprint(found: Checkpoint, model: nn.Module) -> str:
    """Return the hub commit, or a sha256, of all files that determine a model's logits.

    The files are the weights, the configuration, an adapter with its base, and modelling code from
    the model's folder.
    """
    if found.base is not None:
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        return adapter_fingerprint(found, weights_fingerprint(found.base, inner))
    code = _remote_code(model)
    if found.commit is not None:
        # the commit does not cover code from another repository
        elsewhere = "--" in json.dumps(getattr(model.config, "auto_map", None) or {})
        suffix = f"+code:{hashlib.sha256(code).hexdigest()}" if code and elsewhere else ""
        return f"hub:{found.name}@{found.commit}{suffix}"
    config: Any = model.config
    effective = {k: v for k, v in config.to_dict().items() if k not in _WITHOUT_EFFECT}
    digest = hashlib.sha256(canonical_json(_to_json(effective)))
    root = sorted(found.folder.glob("*.safetensors")) if found.gguf is None else [found.gguf]
    for file in found.hashed():
        if file not in root:  # the index refers to files in subfolders by path
            digest.update(str(file.relative_to(found.folder)).encode())
        digest.update(file.suffix.encode())
        digest.update(file_sha256(file))
    if found.gguf is None and (found.folder / ADAPTER_CONFIG).exists():
        digest.update(bytes.fromhex(adapter_fingerprint(found, "").removeprefix("sha256:")))
    digest.update(code)
    return f"sha256:{digest.hexdigest()}"


def _remote_code(model: nn.Module) -> bytes:
    """Return the modelling code from a model's folder; empty if the model's class is elsewhere."""
    module = sys.modules.get(type(model).__module__)
    if not type(model).__module__.startswith("transformers_modules") or module is None:
        return b""
    folder = Path(str(module.__file__)).parent
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def module_fingerprint(model: nn.Module) -> str:
    """Return a sha256 over name, dtype, shape and bytes of each tensor in a model's state dict."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().flatten()  # a scalar has no dimension to view as bytes
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def locate_model(name: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the keyword arguments of a model for transformers' `from_pretrained`.

    The files of a folder are validated. Only the base of an adapter is downloaded, if necessary.

    Raises:
        TeacherError: the path does not exist, or its files are invalid.
        MissingDependencyError: packages that "demo" needs are missing.
    """
    name = model_named(name)
    if Path(name).is_dir():
        find_checkpoint(name)
    return _source_of(name)


def _source_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return the result of `locate_model` for a path or hub name, without validating a folder."""
    path = Path(name)
    local = path.suffix.lower() == ".gguf" or path.is_absolute() or name.startswith((".", "~"))
    if local and not path.is_dir():
        found = find_checkpoint(name)
        assert found.gguf is not None
        return found.source, {"gguf_file": found.gguf.name}
    return name, {}


def _require_folder(name: str, error: Exception) -> None:
    """Raise a more precise error if there is nothing at a path, or a folder without a model."""
    path = Path(name)
    if not path.exists():
        problem = "no model of that name could be loaded from the Hugging Face hub"
        raise not_found_error(name, f"{problem}: {_first_line(error)}") from error
    if path.is_dir() and not (path / CONFIG).exists():
        raise no_model_error(name) from error


def quantization(name: str, model: nn.Module) -> str | None:
    """Return the quantisation of a teacher's weights, for the identity; None without quantisation.

    The result is the type in a GGUF file, the method (torchao, bitsandbytes, gptq, ...) and the
    number type in a configuration's `quantization_config`, or the type that the demo's teacher had
    before its conversion. The fingerprint of the weights includes the other settings of the
    quantisation.
    """
    if name.lower().endswith(".gguf"):
        from gguf import GGUFReader
        from gguf.constants import LlamaFileType

        field = GGUFReader(name).get_field("general.file_type")
        kind = LlamaFileType(int(field.contents())).name if field else "unknown"
        return f"gguf {kind.removeprefix('MOSTLY_')}, dequantised"
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return getattr(model.config, "dequantized_from", None)
    settings = config if isinstance(config, dict) else config.to_dict()
    method = settings.get("quant_method", "unknown")
    return f"{getattr(method, 'value', method)} {_number_type(settings)}".rstrip()


def _number_type(settings: dict[str, Any]) -> str:
    """Return the number type in a quantization_config, under one of several keys; "" if absent."""
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "4 bits"))
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return "int8"
    kind = settings.get("quant_type")
    if isinstance(kind, dict):  # torchao nests it: {"default": {"_type": name, "_data": ...}}
        kind = next(iter(kind.values()), None)
        kind = kind.get("_type") if isinstance(kind, dict) else kind
    if kind is not None:
        return str(kind)
    return f"{settings['bits']} bits" if "bits" in settings else ""


def _to_json(value: Any) -> Any:
    """Convert a value to plain JSON values; parts that JSON cannot represent become strings."""
    if isinstance(value, dict):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return reason_of(error).splitlines()[0]
