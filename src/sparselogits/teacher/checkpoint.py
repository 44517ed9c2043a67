"""Find the files of a model, and validate them before transformers reads them.

A model is given as a local folder, a GGUF file or a hub name; a folder may hold an adapter, which
names its base. Weights are read from safetensors or GGUF, never from pickle, and only from the
model's own folder. Sizes in a configuration are compared with the sizes of the weights: a million
layers claimed next to 60 KB of weights are refused before a layer is created.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, nn

from sparselogits.allowances import refuse
from sparselogits.errors import TeacherError, reason_of
from sparselogits.identity import canonical_json
from sparselogits.untrusted import read_regular

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_LARGEST_JSON = 64 * 2**20
_DEEPEST_CHAIN = 4
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# fields of an adapter's configuration that do not change what the adapter computes
_OF_THE_ADAPTERS_MAKING = {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
}
_LAYERS = re.compile(r"(^|_)(layers?|depth|num_blocks)$")
_EXPERTS = re.compile(r"^(n|num)_.*experts$")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model.

    Args:
        name: name that the user gave.
        source: folder or hub name for transformers' `from_pretrained`.
        folder: local folder of the files; for a hub name its snapshot.
        commit: commit that a hub name resolved to; else None.
        gguf: the GGUF file; None for other formats.
        weights: files that transformers reads.
        adapter: whether the folder holds only an adapter, for the model `base`.
        base: see `adapter`.
    """

    name: str
    source: str
    folder: Path
    commit: str | None = None
    gguf: Path | None = None
    weights: tuple[Path, ...] = ()
    adapter: bool = False
    base: Checkpoint | None = None

    @property
    def root(self) -> Checkpoint:
        """The checkpoint of the model without adapters."""
        return self if self.base is None else self.base.root

    def hashed(self) -> list[Path]:
        """Return the weight files whose bytes determine the model, in the order they are hashed.

        These are all safetensors files of the folder, then those that an index names elsewhere.
        """
        if self.gguf is not None:
            return [self.gguf]
        beside = sorted(self.folder.glob("*.safetensors"))
        return [*beside, *(file for file in self.weights if file not in beside)]

    def stamp(self) -> list[tuple[str, int, int, int]]:
        """Return path, inode, size and time of each file, which change when it is written again."""
        own = [*self.hashed(), self.folder / CONFIG, self.folder / ADAPTER_CONFIG]
        found = [(str(p), p.stat()) for p in own if p.exists()]
        below = [] if self.base is None else self.base.stamp()
        return [(p, s.st_ino, s.st_size, s.st_mtime_ns) for p, s in found] + below


def find_checkpoint(
    name: str, *, revision: str | None = None, allow: Collection[str] = (), depth: int = 0
) -> Checkpoint:
    """Find the files of a model and validate them.

    Args:
        name: local folder, GGUF file or hub name.
        revision: revision of a hub name; None for the default branch.
        allow: names of `ALLOWANCES`.
        depth: number of adapters on top of this model.

    Raises:
        TeacherError: the model does not exist, its weights are pickled, a file lies outside the
            folder, or the configuration's sizes do not fit the weights.
    """
    if depth > _DEEPEST_CHAIN:
        raise TeacherError(
            f"{name!r} is the base of {depth} adapters on top of each other; expected at most "
            f"{_DEEPEST_CHAIN}. Merge adapters, or mend base_model_name_or_path if they form a loop"
        )
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise TeacherError(f"there is no GGUF file at {name!r}; check the path")
        return Checkpoint(name, str(path.parent), path.parent, gguf=path, weights=(path,))
    if path.is_dir():
        return _of_folder(Checkpoint(name, name, path), allow, depth)
    if path.is_absolute() or name.startswith((".", "~")):
        raise TeacherError(
            f"there is no model folder at {name!r}"
            + (", but a file that is no GGUF file" if path.is_file() else "")
            + "; check the path, or give a folder, a GGUF file, or a hub name"
        )
    return _of_hub(name, revision, allow, depth)


def _of_folder(found: Checkpoint, allow: Collection[str], depth: int) -> Checkpoint:
    folder = found.folder
    if _is_adapter(folder) and not (folder / CONFIG).exists():
        return _of_adapter(found, allow, depth)
    if not (folder / CONFIG).exists():
        raise TeacherError(
            f"the folder {found.name} holds no model: it has no {CONFIG}. Give the folder that a "
            "model was saved to, or the folder of a run of `sparselogits train`"
        )
    names = _weight_names(folder, found.name)
    files = tuple(_inside(folder, name, found.name, allow) for name in names)
    if _is_adapter(folder):
        _require_safe_adapter(folder, found.name)
    made = Checkpoint(found.name, found.source, folder, found.commit, weights=files)
    require_plausible(made)
    return made


def _of_adapter(found: Checkpoint, allow: Collection[str], depth: int) -> Checkpoint:
    folder = found.folder
    _require_safe_adapter(folder, found.name)
    described = _read_json(folder / ADAPTER_CONFIG)
    base = described.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise TeacherError(
            f"the adapter at {found.name!r} names no base model; put base_model_name_or_path into "
            f"its {ADAPTER_CONFIG}"
        )
    if base == found.name:
        raise TeacherError(
            f"the adapter at {found.name!r} names itself as its base; put the base model's name "
            f"into its {ADAPTER_CONFIG}"
        )
    if str(described.get("peft_type")).upper() == "XLORA":
        raise TeacherError(
            f"the adapter at {found.name!r} is a mixture of adapters in other folders (X-LoRA), "
            "whose weights no hash covers; merge it into its base with PEFT"
        )
    revision = described.get("revision")
    below = find_checkpoint(
        base, revision=revision if isinstance(revision, str) else None, allow=allow, depth=depth + 1
    )
    weights = (_inside(folder, ADAPTER_WEIGHTS, found.name, allow),)
    return Checkpoint(
        found.name, found.source, folder, found.commit, weights=weights, adapter=True, base=below
    )


def _of_hub(name: str, revision: str | None, allow: Collection[str], depth: int) -> Checkpoint:
    """Fetch configuration and weights of a hub name, all of one commit."""
    described = _fetched(name, CONFIG, revision) or _fetched(name, ADAPTER_CONFIG, revision)
    if described is None:
        raise TeacherError(
            f"there is no folder {name!r} here ({Path.cwd()}), and no model of that name in the "
            f"cache of the Hugging Face hub or within reach: expected a {CONFIG} there (a private "
            "repository needs `hf auth login`). Check the path, or give a hub name as in "
            "HuggingFaceTB/SmolLM2-135M"
        )
    commit = described.parent.name
    wanted = [ADAPTER_CONFIG, ADAPTER_WEIGHTS] if described.name == ADAPTER_CONFIG else []
    if not wanted and _fetched(name, WEIGHTS, commit) is None:
        wanted = [INDEX]
    for file in wanted:
        _fetched(name, file, commit)
    if (described.parent / INDEX).exists():
        for file in _indexed(described.parent, name):
            _fetched(name, file, commit)
    return _of_folder(Checkpoint(name, name, described.parent, commit), allow, depth)


def _fetched(name: str, file: str, revision: str | None) -> Path | None:
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except Exception as error:
        raise TeacherError(
            f"there is no folder {name!r} here ({Path.cwd()}), and {file} of a model of that name "
            f"could not be fetched from the Hugging Face hub: {reason_of(error).splitlines()[0]} "
            "Check the path, or give a hub name as in HuggingFaceTB/SmolLM2-135M"
        ) from error
    return None if path is None else Path(path)


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).exists()


def _require_safe_adapter(folder: Path, name: str) -> None:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
        raise TeacherError(_without_weights(name, ADAPTER_WEIGHTS, pickled))


def _without_weights(name: str, expected: str, pickled: list[str]) -> str:
    if not pickled:
        return (
            f"{name!r} holds no weights: expected {expected}. Give the folder that the model was "
            "saved to, or download its weights"
        )
    return (
        f"{name!r} holds weights in pickle ({pickled[0]}) only, which can run code when it is "
        f"read; expected {expected}. Convert them where you trust them: load the model with "
        "transformers or PEFT and call save_pretrained, which writes safetensors"
    )


def _weight_names(folder: Path, name: str) -> list[str]:
    """Return the names of the weight files that transformers reads, relative to the folder."""
    explicit = None
    if (folder / CONFIG).exists():
        explicit = _read_json(folder / CONFIG).get("transformers_weights")
    if explicit is not None:
        if not isinstance(explicit, str) or not explicit.endswith(".safetensors"):
            raise TeacherError(
                f"the configuration of {name!r} names weights {str(explicit)[:80]!r}; expected a "
                "safetensors file. Remove transformers_weights from config.json"
            )
        return [explicit]
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if (folder / INDEX).exists():
        return _indexed(folder, name)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    raise TeacherError(_without_weights(name, WEIGHTS, pickled))


def _indexed(folder: Path, name: str) -> list[str]:
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise TeacherError(
            f"{INDEX} of {name!r} has no weight_map from tensors to files; download it again"
        )
    names = sorted(set(shards.values()))
    for file in names:
        if not file.endswith(".safetensors"):
            raise TeacherError(
                f"{INDEX} of {name!r} points to {file[:80]!r}; expected safetensors files, since "
                "pickle can run code when it is read. Save the model anew with save_pretrained"
            )
        pure = PurePosixPath(file.replace("\\", "/"))
        if pure.is_absolute() or ".." in pure.parts or ":" in file:
            raise TeacherError(
                f"{INDEX} of {name!r} points to {file[:80]!r}, outside of the model's folder; move "
                "the file into the folder and mend the index"
            )
    return names


def _inside(folder: Path, file: str, name: str, allow: Collection[str]) -> Path:
    """Return a regular file of a folder; a link may lead into the folder's hub cache."""
    path = folder / file
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts:
        raise TeacherError(
            f"{name!r} names weights outside of its folder: {file[:80]!r}; move them into it"
        )
    if not path.is_file():
        found = "something that is no regular file" if path.exists() else "nothing"
        raise TeacherError(
            f"{name!r} should hold {file[:80]!r}, found {found}; download the model again"
        )
    real, home = path.resolve(), folder.resolve()
    hub = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not real.is_relative_to(home) and (hub is None or not real.is_relative_to(hub)):
        error = TeacherError(
            f"{file[:80]!r} of {name!r} is a link to {real}, outside of the model's folder; put "
            "the file into the folder instead, or name the folder of the file"
        )
        refuse(error, "linked-weights", allow)
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(path, _LARGEST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise TeacherError(
            f"{path} cannot be read as JSON: {reason_of(error)[:200]}; download the model again"
        ) from error
    if not isinstance(value, dict):
        raise TeacherError(f"{path} holds no JSON object; download the model again")
    return value


# --- sizes ---


@dataclass(frozen=True)
class _Held:
    """Sizes of weight files: numbers of tensors and elements, bytes, and largest dimension."""

    tensors: int
    elements: int
    bytes: int
    largest: int


def _held(files: tuple[Path, ...]) -> _Held:
    tensors = elements = size = largest = 0
    for file in files:
        size += file.stat().st_size
        if file.suffix.lower() == ".gguf":
            tensors += _gguf_tensors(file)
            elements += 8 * file.stat().st_size  # one bit is the smallest number
            continue
        for _, shape in tensor_shapes(file):
            count = 1
            for dimension in shape:
                count *= dimension
                largest = max(largest, dimension)
            tensors, elements = tensors + 1, elements + count
    return _Held(tensors, elements, size, largest)


def tensor_shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield name and shape of every tensor of a safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                yield key, opened.get_slice(key).get_shape()
    except (SafetensorError, OSError) as error:
        raise TeacherError(
            f"{file} cannot be read as safetensors: {reason_of(error)[:200]}; download the model "
            "again"
        ) from error


def _gguf_tensors(file: Path) -> int:
    with file.open("rb") as stream:
        head = stream.read(16)
    if len(head) < 16 or head[:4] != b"GGUF":
        raise TeacherError(
            f"{file} is no GGUF file: its first bytes are not GGUF; download it again"
        )
    count: int = struct.unpack("<Q", head[8:])[0]
    if count * 16 > file.stat().st_size:  # name, shape and offset of a tensor take more
        raise TeacherError(
            f"{file} claims {count:,} tensors, more than its size can hold; download it again"
        )
    return count


def require_plausible(found: Checkpoint) -> None:
    """Compare a configuration's counts with the weights, before transformers reads it.

    Some configurations create a list with an element per layer when they are read. Without weights,
    as in the folder of a tokenizer, the counts have fixed bounds.
    """
    held = _held(found.weights) if found.weights else _Held(10_000, 2**31, 0, 0)
    many = max(held.tensors, held.largest, 1024)
    for key, value in _integers(_configuration(found)):
        limit = None
        if _LAYERS.search(key) or _EXPERTS.search(key):
            limit, what = many, f"{held.tensors:,} tensors"
        elif key.endswith("vocab_size"):
            limit, what = max(held.elements, 1024), f"{held.elements:,} numbers"
        if limit is not None and value > limit:
            raise TeacherError(
                f"the configuration of {found.name!r} claims {key}={value:,}, its weights hold "
                f"{what} in all; one of them is damaged or not this model's. Download both again"
            )


def _configuration(found: Checkpoint) -> dict[str, Any]:
    path = found.folder / CONFIG
    return _read_json(path) if found.gguf is None and path.exists() else {}


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for name, own in value.items():
            yield from _integers(own, name)
    elif isinstance(value, list):
        for own in value:
            if isinstance(own, dict):
                yield from _integers(own, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


@contextmanager
def bounded_by(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise an error if a model far larger than its weight files is created within the block.

    Parameters are counted when modules register them, before memory is filled, so a wrong
    configuration takes no more memory than the size of the weight files.

    Args:
        checkpoint: checkpoint whose weights bound the model.
    """
    from torch.nn.modules import module as modules

    held = _held(checkpoint.weights)
    quantised = not checkpoint.adapter and "quantization_config" in _configuration(checkpoint)
    tensors = 4 * held.tensors + 4096
    # weights that are packed hold up to eight numbers in a byte
    elements = (16 * held.bytes if quantised else 4 * held.elements) + 2**24
    seen: set[tuple[int, str]] = set()  # a weight is registered again when it is loaded
    made = {"elements": 0, "buffers": 0}

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is None or (id(module), name) in seen:
            return
        seen.add((id(module), name))
        made["elements"] += value.numel()
        if len(seen) > tensors or made["elements"] > elements:
            raise _TooLargeError(checkpoint, held)

    def count_buffer(_: nn.Module, name: str, value: Tensor | None) -> None:
        if value is not None:
            made["buffers"] += value.numel()
            if made["buffers"] > 4 * elements + 2**26:
                raise _TooLargeError(checkpoint, held)

    handles = [
        modules.register_module_parameter_registration_hook(count),
        modules.register_module_buffer_registration_hook(count_buffer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _TooLargeError(TeacherError):
    """A configuration describes far more parameters than the weights hold."""

    def __init__(self, checkpoint: Checkpoint, held: _Held) -> None:
        super().__init__(
            f"the configuration of {checkpoint.name!r} describes a model far larger than its "
            f"weights, which hold {held.tensors:,} tensors with {held.elements:,} numbers; one of "
            "them is damaged or not this model's. Download both again"
        )


# --- identity ---


def file_sha256(path: Path) -> bytes:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def files_fingerprint(found: Checkpoint) -> str:
    """Return a commit, or the sha256 over the files, of a model on disk, without loading it.

    This is for models that are only compared, such as the student of a resumed run.
    """
    if found.base is not None:
        return adapter_fingerprint(found, files_fingerprint(found.base))
    if found.commit is not None:
        return f"hub:{found.name}@{found.commit}"
    files = {
        str(file.relative_to(found.folder)): file_sha256(file).hex() for file in found.hashed()
    }
    made = {"configuration": _configuration(found), "files": files}
    return f"sha256:{hashlib.sha256(canonical_json(made)).hexdigest()}"


def adapter_fingerprint(checkpoint: Checkpoint, base: str) -> str:
    """Return the sha256 over an adapter's configuration and weights and the base's fingerprint."""
    described = _read_json(checkpoint.folder / ADAPTER_CONFIG)
    stable = {k: v for k, v in described.items() if k not in _OF_THE_ADAPTERS_MAKING}
    weights = file_sha256(checkpoint.folder / ADAPTER_WEIGHTS).hex()
    made = {"adapter": stable, "weights": weights, "base": base}
    return f"sha256:{hashlib.sha256(canonical_json(made)).hexdigest()}"
