"""Find a teacher: a local folder, a hub name, or a GGUF file; and say exactly what it is.

Weights are read from safetensors or GGUF, never from pickle, and no code from the model's folder
runs unless the caller asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.errors import TeacherError, reason_of
from sparselogits.extras import require
from sparselogits.identity import canonical_json
from sparselogits.teacher.demo_model import model_named
from sparselogits.teacher.transformers_engine import SLICE_POSITIONS, TransformersTeacher

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_VOLATILE = {
    *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"),
    "distributed_config",  # where the weights are, not what they are
}


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to a teacher.

    Args:
        name: local folder, GGUF file or hub name; or `demo`, see `demo_model`.
        trust_remote_code: run tokenizer code that comes with the model.

    Raises:
        TeacherError: when there is none to be read.
    """
    from transformers import AutoTokenizer

    source, arguments = _where(model_named(name))
    try:
        return AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, **arguments
        )
    except Exception as error:
        _require_folder(name, error)
        raise TeacherError(
            f"no tokenizer could be read from {name!r}: {_first_line(error).rstrip(':. ')}. Give a "
            "folder with tokenizer files, a GGUF file, or a hub name (which needs the network once)"
        ) from error


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
) -> TransformersTeacher:
    """Load a causal language model as a teacher.

    Args:
        name: local folder, GGUF file or hub name; or `demo`, see `demo_model`.
        tokenizer: the teacher's own, see `load_tokenizer`.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: where it runs, unless `device_map` spreads it over several.
        device_map: passed to transformers ("auto" for a teacher larger than a device).
        max_memory: passed on with it, bytes a device; what fits nowhere is read from disk.
        tp_plan: "auto" or a plan of transformers' own: the ranks of torchrun hold a slice of each
            layer and must run every pass together (see `tensor_parallel`). It is transformers
            that begins the process group, if nobody has.
        trust_remote_code: run modelling code that comes with the model.
        slice_positions: rows of logits that exist at a time.

    Raises:
        TeacherError: a model that cannot be read, has no trained head, or does not fit the
            tokenizer.
        MissingDependencyError: a GGUF file without the gguf package.
    """
    name = model_named(name)
    model = load_causal_lm(
        name,
        dtype=dtype,
        device_map=device_map,
        max_memory=max_memory,
        tp_plan=tp_plan,
        trust_remote_code=trust_remote_code,
    )
    if device_map is None and tp_plan is None:
        model.to(device)
    identity = {
        "name": Path(name).name if Path(name).exists() else name,
        "weights": weights_fingerprint(name, model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "engine": "transformers",
        "quantization": quantization(name, model),
    }
    model.requires_grad_(False)
    return TransformersTeacher(
        model,
        token_mask=token_mask(tokenizer, model),
        identity=identity,
        slice_positions=slice_positions,
    )


def load_causal_lm(
    name: str,
    *,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    tp_plan: str | dict[str, str] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model whose every weight came from the checkpoint.

    Raises:
        TeacherError: unreadable, not a causal language model, or weights missing (a head that
            would be left at random).
        MissingDependencyError: a GGUF file without the gguf package.
    """
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.distributed import DistributedConfig

    if dtype != "auto" and dtype not in DTYPES:
        raise TeacherError(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    source, arguments = _where(model_named(name))
    if "gguf_file" in arguments:
        _require_gguf(name)
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    else:
        arguments["use_safetensors"] = True
    if tp_plan is not None:
        arguments["distributed_config"] = DistributedConfig(tp_plan=tp_plan)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES.get(dtype, "auto"),
            device_map=device_map,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **arguments,
        )
    except Exception as error:
        _require_folder(name, error)
        raise TeacherError(
            f"{name!r} could not be loaded as a causal language model: {_first_line(error)}"
        ) from error
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise TeacherError(
            f"{name!r} lacks {len(missing)} weights of {type(model).__name__} ({missing[0]}, ...); "
            "a checkpoint without a language-model head cannot teach: use the causal language "
            "model's checkpoint, not the bare encoder's or decoder's"
        )
    return model  # type: ignore[no-any-return]


def token_mask(tokenizer: Any, model: nn.Module) -> Tensor:
    """bool [V]: rows of the head that are tokens of the tokenizer.

    Raises:
        TeacherError: when the tokenizer has ids that the head or the embedding lacks.
    """
    rows = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    rows = min(rows, model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.tensor(sorted(set(tokenizer.get_vocab().values())), dtype=torch.int64)
    if ids.numel() == 0 or int(ids[-1]) >= rows:
        largest = int(ids[-1]) if ids.numel() else None
        raise TeacherError(
            f"the tokenizer does not belong to the teacher: its largest id is {largest}, the "
            f"teacher's vocabulary has {rows} rows; pass the teacher's own tokenizer"
        )
    mask = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)  # type: ignore[operator]
    mask[ids] = True
    return mask


def weights_fingerprint(name: str, model: nn.Module) -> str:
    """What the weights are: a hub revision, or sha256 over the weight files and configuration."""
    config: Any = model.config
    commit = getattr(config, "_commit_hash", None)
    if commit and not Path(name).exists():
        return f"hub:{name}@{commit}"
    stable = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    digest = hashlib.sha256(canonical_json(_plain(stable)))
    for file in _weight_files(Path(name)):
        digest.update(file.suffix.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def module_fingerprint(model: nn.Module) -> str:
    """sha256 over parameter names and bytes, for a model that exists only in memory."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _weight_files(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def locate_model(name: str) -> tuple[str, dict[str, Any]]:
    """Return what transformers' `from_pretrained` takes for a model's name, and its arguments.

    Raises:
        TeacherError: a path at which there is nothing.
    """
    return _where(model_named(name))


def _where(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise TeacherError(f"there is no GGUF file at {name!r}")
        return str(path.parent), {"gguf_file": path.name}
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise TeacherError(f"there is no model folder at {name!r}; check the path")
    return name, {}


def _require_folder(name: str, error: Exception) -> None:
    """Say that there is no such folder, where the name can hardly be meant for the hub."""
    path = Path(name)
    if not path.exists() and "/" not in name:
        raise TeacherError(
            f"there is no folder {name!r} here ({Path.cwd()}), and no model of that name could be "
            f"loaded from the Hugging Face hub: {_first_line(error)} Check the path, or give a hub "
            "name as in HuggingFaceTB/SmolLM2-135M"
        ) from error
    if path.is_dir() and not (path / "config.json").exists():
        raise TeacherError(
            f"the folder {name} holds no model: it has no config.json. Give the folder that a "
            "model was saved to, or the folder of a run of `sparselogits train`"
        ) from error


def quantization(name: str, model: nn.Module) -> str | None:
    """How a teacher's weights are quantised, in words for the identity; None where they are not.

    A GGUF file says itself; a folder's `quantization_config` is named by its method (torchao,
    bitsandbytes, gptq, ...) and by what kind of numbers the weights are. All its other settings
    are in the fingerprint of the weights.
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
    described = config if isinstance(config, dict) else config.to_dict()
    method = described.get("quant_method", "unknown")
    return f"{getattr(method, 'value', method)} {_numbers(described)}".rstrip()


def _numbers(described: dict[str, Any]) -> str:
    """The kind of numbers a quantization_config makes of weights, as its method calls it."""
    if described.get("load_in_4bit") or described.get("_load_in_4bit"):
        return str(described.get("bnb_4bit_quant_type", "4 bits"))
    if described.get("load_in_8bit") or described.get("_load_in_8bit"):
        return "int8"
    kind = described.get("quant_type")
    if isinstance(kind, dict):  # torchao's, nested: {"default": {"_type": name, "_data": ...}}
        kind = next(iter(kind.values()), None)
        kind = kind.get("_type") if isinstance(kind, dict) else kind
    if kind is not None:
        return str(kind)
    return f"{described['bits']} bits" if "bits" in described else ""


def _require_gguf(name: str) -> None:
    require(f"reading {Path(name).name}", "gguf")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _first_line(error: Exception) -> str:
    return reason_of(error).splitlines()[0]
