"""Locate the files of a model, and validate them before transformers reads them.

Weights are read from safetensors or GGUF, never from pickle, and only from the folder of the model
unless "linked-weights" is allowed. Sizes in a configuration are compared with the sizes of the
weights: a configuration of a million layers for 60 KB of weights is rejected before any layer is
created.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparselogits.allowances import refuse
from sparselogits.errors import TeacherError, reason_of
from sparselogits.identity import canonical_json
from sparselogits.untrusted import leads_outside, read_regular

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_LARGEST_JSON = 64 * 2**20  # bytes
_MOST_ADAPTERS = 4
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# fields of an adapter's configuration that do not change what the adapter computes
_WITHOUT_EFFECT = {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
}
_LAYERS = re.compile(r"(^|_)(layers?|depth|num_blocks)$")
_EXPERTS = re.compile(r"^(n|num)_.*experts$")


@dataclass(frozen=True)
class Checkpoint:
    """Files of one model or adapter.

    Args:
        name: name that the user gave.
        source: folder or hub name for transformers' `from_pretrained`.
        folder: local folder of the files; for a hub name, the folder of its snapshot.
        commit: commit hash of the snapshot; None for local files.
        gguf: path of the GGUF file; None for other formats.
        weights: paths of the weight files that transformers or PEFT reads.
        adapter: whether the folder contains only an adapter for the model `base`.
        base: checkpoint of the adapter's base model; None for other models.
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
        """Checkpoint of the base model without adapters; this checkpoint if `base` is None."""
        return self if self.base is None else self.base.root

    def hashed(self) -> list[Path]:
        """Return the weight files in the order in which a local model's fingerprint hashes them.

        These are the GGUF file, or all safetensors files in the folder, then the files of `weights`
        in subfolders.
        """
        if self.gguf is not None:
            return [self.gguf]
        beside = sorted(self.folder.glob("*.safetensors"))
        return [*beside, *(file for file in self.weights if file not in beside)]

    def stamp(self) -> list[tuple[str, int, int, int]]:
        """Return (path, inode, size, modification time in ns) of weights and configurations.

        The base of an adapter is included. Comparing two stamps detects changes of these files.
        """
        files = [*self.hashed(), self.folder / CONFIG, self.folder / ADAPTER_CONFIG]
        found = [(str(p), p.stat()) for p in files if p.exists()]
        of_base = [] if self.base is None else self.base.stamp()
        return [(p, s.st_ino, s.st_size, s.st_mtime_ns) for p, s in found] + of_base


def find_checkpoint(
    name: str, *, revision: str | None = None, allow: Collection[str] = (), depth: int = 0
) -> Checkpoint:
    """Locate the files of a model and validate them.

    The files of a hub name are downloaded if the hub's local cache lacks them. For a GGUF file,
    only the existence is validated.

    Args:
        name: local folder, GGUF file or hub name.
        revision: revision of a hub name; None for the default branch.
        allow: names of `ALLOWANCES`; "linked-weights" accepts links to files outside of the folder.
        depth: number of adapters that are applied to this model; 0 for the model itself.

    Raises:
        TeacherError: the model does not exist, its weights are pickled, a file is missing, damaged
            or outside the folder, the sizes in the configuration do not match the weights, or
            adapters are nested too deep.
    """
    if depth > _MOST_ADAPTERS:
        raise TeacherError(
            f"{name!r} is the base of {depth} adapters on top of each other; expected at most "
            f"{_MOST_ADAPTERS}. Merge adapters, or repair base_model_name_or_path if they form a "
            "loop"
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
            + (", but a file that is not a GGUF file" if path.is_file() else "")
            + "; check the path, or give a folder, a GGUF file, or a hub name"
        )
    return _of_hub(name, revision, allow, depth)


def _of_folder(found: Checkpoint, allow: Collection[str], depth: int) -> Checkpoint:
    """Return a checkpoint with its weight files; that of an adapter also with the base model."""
    folder = found.folder
    if (folder / ADAPTER_CONFIG).exists() and not (folder / CONFIG).exists():
        return _of_adapter(found, allow, depth)
    if not (folder / CONFIG).exists():
        raise no_model_error(found.name)
    names = _weight_names(folder, found.name)
    files = tuple(_weight_file(folder, name, found.name, allow) for name in names)
    if (folder / ADAPTER_CONFIG).exists():
        _require_safe_adapter(folder, found.name)
    checkpoint = replace(found, weights=files)
    require_plausible(checkpoint)
    return checkpoint


def no_model_error(name: str) -> TeacherError:
    """Return the error for a folder without the configuration of a model."""
    return TeacherError(
        f"the folder {name} contains no model: it has no {CONFIG}. Give the folder to which a "
        "model was saved, or the folder of a run of `sparselogits train`"
    )


def _of_adapter(found: Checkpoint, allow: Collection[str], depth: int) -> Checkpoint:
    """Return an adapter's checkpoint with weight file and base model. Raises TeacherError."""
    folder = found.folder
    _require_safe_adapter(folder, found.name)
    config = _read_json(folder / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise TeacherError(
            f"the adapter at {found.name!r} names no base model; write its name as "
            f"base_model_name_or_path into {ADAPTER_CONFIG}"
        )
    if base == found.name:
        raise TeacherError(
            f"the adapter at {found.name!r} names itself as its base; write the base model's name "
            f"into {ADAPTER_CONFIG}"
        )
    if str(config.get("peft_type")).upper() == "XLORA":
        raise TeacherError(
            f"the adapter at {found.name!r} is a mixture of adapters in other folders (X-LoRA), "
            "whose weights cannot be fingerprinted; give one of these adapters, or another model"
        )
    revision = config.get("revision")
    below = find_checkpoint(
        base, revision=revision if isinstance(revision, str) else None, allow=allow, depth=depth + 1
    )
    weights = (_weight_file(folder, ADAPTER_WEIGHTS, found.name, allow),)
    return replace(found, weights=weights, adapter=True, base=below)


def _of_hub(name: str, revision: str | None, allow: Collection[str], depth: int) -> Checkpoint:
    """Download configuration and weights of a hub name, from one commit; return the checkpoint."""
    require_on_hub(name)
    config = _download(name, CONFIG, revision) or _download(name, ADAPTER_CONFIG, revision)
    if config is None:
        raise not_found_error(
            name,
            f"no model of that name with a {CONFIG} is in the local cache of the Hugging Face hub "
            "or can be downloaded (a private repository needs `hf auth login`).",
        )
    commit = config.parent.name
    wanted = [ADAPTER_CONFIG, ADAPTER_WEIGHTS] if config.name == ADAPTER_CONFIG else []
    if not wanted and _download(name, WEIGHTS, commit) is None:
        wanted = [INDEX]
    for file in wanted:
        _download(name, file, commit)
    if (config.parent / INDEX).exists():
        for file in _indexed_names(config.parent, name):
            _download(name, file, commit)
    return _of_folder(Checkpoint(name, name, config.parent, commit), allow, depth)


def require_on_hub(name: str) -> None:
    """Validate that the local cache contains a hub name, or that the hub can be reached.

    For a name that is not in the cache, transformers and `_of_hub` make several downloads, and
    huggingface_hub repeats each of them for 23 s without a connection; one request is not repeated.
    Other errors are ignored here, because those downloads raise them again.

    Raises:
        TeacherError: the name is not in the cache, and the hub cannot be reached.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = repo_folder_name(repo_id=name, repo_type="model")  # rejects other names
        if not (Path(constants.HF_HUB_CACHE) / folder).exists():
            get_hf_file_metadata(hf_hub_url(name, CONFIG))
    except (HfHubHTTPError, HFValidationError):
        return
    except Exception as error:  # no connection, whatever the HTTP client calls it
        where = "the local cache of the Hugging Face hub, which cannot be reached."
        raise not_found_error(name, f"no model of that name is in {where}") from error


def _download(name: str, file: str, revision: str | None) -> Path | None:
    """Return the path of a hub repository's file, downloaded or cached; None if unavailable.

    Raises TeacherError for an error other than a missing file or connection.
    """
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
        problem = (
            f"{file} of a model of that name could not be downloaded from the Hugging Face hub"
        )
        raise not_found_error(name, f"{problem}: {reason_of(error).splitlines()[0]}") from error
    return None if path is None else Path(path)


def not_found_error(name: str, problem: str) -> TeacherError:
    """Return the error for a name that is no folder; `problem` describes the problem at the hub.

    `problem` continues a sentence, and ends with a full stop or another sentence.
    """
    return TeacherError(
        f"there is no folder {name!r} here ({Path.cwd()}), and {problem} Check the path, or give a "
        "hub name as in HuggingFaceTB/SmolLM2-135M"
    )


def _require_safe_adapter(folder: Path, name: str) -> None:
    """Validate that the weights of an adapter are in safetensors. Raises TeacherError."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _missing_weights(folder, name, ADAPTER_WEIGHTS)


def _missing_weights(folder: Path, name: str, expected: str) -> TeacherError:
    """Return the error for a folder without weights in safetensors."""
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if not pickled:
        return TeacherError(
            f"{name!r} contains no weights: expected {expected}. Give the folder to which the "
            "model was saved, or download its weights"
        )
    return TeacherError(
        f"{name!r} contains only weights in pickle ({pickled[0]}), which can run code when it is "
        f"read; expected {expected}. If you trust the weights, convert them: load the model with "
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
        return _indexed_names(folder, name)
    raise _missing_weights(folder, name, WEIGHTS)


def _indexed_names(folder: Path, name: str) -> list[str]:
    """Return the names of the weight files that a folder's index lists."""
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
                "pickle can run code when it is read. Save the model again with save_pretrained"
            )
        pure = PurePosixPath(file.replace("\\", "/"))
        if pure.is_absolute() or ".." in pure.parts or ":" in file:
            raise TeacherError(
                f"{INDEX} of {name!r} points to {file[:80]!r}, outside of the model's folder; move "
                "the file into the folder and repair the index"
            )
    return names


def _weight_file(folder: Path, file: str, name: str, allow: Collection[str]) -> Path:
    """Return the path of a weight file after validating that it is a regular file in the folder.

    Links into the hub cache that contains the folder are accepted; other links out of the folder
    only with the allowance "linked-weights".
    """
    path = folder / file
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts:
        raise TeacherError(
            f"{name!r} names weights outside of its folder: {file[:80]!r}; move them into it, and "
            f"correct transformers_weights in {CONFIG}"
        )
    if not path.is_file():
        found = "not a regular file" if path.exists() else "missing"
        raise TeacherError(
            f"the weight file {file[:80]!r} of {name!r} is {found}; download the model again"
        )
    if leads_outside(path, folder):
        error = TeacherError(
            f"{file[:80]!r} of {name!r} is a link to {path.resolve()}, outside of the model's "
            "folder; copy the file into the folder instead, or give the folder of the file"
        )
        refuse(error, "linked-weights", allow)
    return path


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a regular file of limited size. Raises TeacherError."""
    try:
        value = json.loads(read_regular(path, _LARGEST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise TeacherError(
            f"{path} cannot be read as JSON: {reason_of(error)[:200]}; download the model again"
        ) from error
    if not isinstance(value, dict):
        raise TeacherError(f"{path} does not contain a JSON object; download the model again")
    return value


# --- sizes ---


class _WeightSizes(NamedTuple):
    """Numbers of tensors, elements and bytes in weight files, and the largest tensor dimension."""

    tensors: int
    elements: int
    bytes: int
    largest: int


def _weight_sizes(files: tuple[Path, ...]) -> _WeightSizes:
    """Return the sizes of weight files, from headers.

    For GGUF files, `elements` is an upper limit, and `largest` is 0.
    """
    tensors = elements = size = largest = 0
    for file in files:
        size += file.stat().st_size
        if file.suffix.lower() == ".gguf":
            tensors += _gguf_tensors(file)
            elements += 8 * file.stat().st_size  # an element has at least one bit
            continue
        for _, shape in tensor_shapes(file):
            count = 1
            for dimension in shape:
                count *= dimension
                largest = max(largest, dimension)
            tensors, elements = tensors + 1, elements + count
    return _WeightSizes(tensors, elements, size, largest)


def tensor_shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and shape of every tensor in a safetensors file, from its header.

    Raises TeacherError for a file that cannot be read as safetensors.
    """
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
    """Return the number of tensors that the header of a GGUF file states. Raises TeacherError."""
    with file.open("rb") as stream:
        head = stream.read(16)
    if len(head) < 16 or head[:4] != b"GGUF":
        raise TeacherError(
            f"{file} is not a GGUF file: its first bytes are not GGUF; download it again"
        )
    count: int = struct.unpack("<Q", head[8:])[0]
    if count * 16 > file.stat().st_size:  # the header has more than 16 bytes per tensor
        raise TeacherError(
            f"{file} claims {count:,} tensors, more than its size allows; download it again"
        )
    return count


def require_plausible(found: Checkpoint) -> None:
    """Validate a configuration's numbers of layers, experts and token ids against the weights.

    Call this before transformers reads the configuration, because some configurations allocate a
    list with one element per layer when they are read. Without weights, as in the folder of a
    tokenizer, the numbers have fixed limits.

    Raises:
        TeacherError: a number is too large for the weights, or a file cannot be read.
    """
    sizes = _weight_sizes(found.weights) if found.weights else _WeightSizes(10_000, 2**31, 0, 0)
    for key, value in _integers(_configuration(found)):
        limit = None
        if _LAYERS.search(key) or _EXPERTS.search(key):
            limit = max(sizes.tensors, sizes.largest, 1024)
            what = f"{sizes.tensors:,} tensors"
        elif key.endswith("vocab_size"):
            limit, what = max(sizes.elements, 1024), f"{sizes.elements:,} numbers"
        if limit is not None and value > limit:
            raise TeacherError(
                f"the configuration of {found.name!r} claims {key}={value:,}, but its weights "
                f"contain {what} in total, so one of them is damaged or of another model. Download "
                "both again"
            )


def _configuration(found: Checkpoint) -> dict[str, Any]:
    """Return the content of config.json; an empty dict for a GGUF file or without config.json."""
    path = found.folder / CONFIG
    return _read_json(path) if found.gguf is None and path.exists() else {}


def _integers(value: Any) -> Iterator[tuple[str, int]]:
    """Yield (key, value) for each integer that is the value of a key in an object of JSON."""
    waiting = [("", value)]  # not recursive, because JSON may be nested deeply
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((key, inner) for inner in value if isinstance(inner, dict | list))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value


@contextmanager
def bounded_by(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise an error if a `with` block creates a model that is much larger than its weight files.

    Parameters are counted when modules register them, before their memory is written, so a
    configuration with too many is rejected before it occupies the memory.

    Raises:
        TeacherError: the model has too many parameters or buffers.
    """
    from torch.nn.modules import module as modules

    sizes = _weight_sizes(checkpoint.weights)
    quantised = not checkpoint.adapter and "quantization_config" in _configuration(checkpoint)
    tensors = 4 * sizes.tensors + 4096
    # quantised weights may pack eight numbers into a byte
    elements = (16 * sizes.bytes if quantised else 4 * sizes.elements) + 2**24
    seen: set[tuple[int, str]] = set()  # a weight is registered again when it is loaded
    created = {"elements": 0, "buffers": 0}

    def require(fits: bool) -> None:
        if not fits:
            raise TeacherError(
                f"the configuration of {checkpoint.name!r} describes a model far larger than its "
                f"weights, which contain {sizes.tensors:,} tensors with {sizes.elements:,} "
                "numbers, so one of them is damaged or of another model. Download both again"
            )

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is not None and (id(module), name) not in seen:
            seen.add((id(module), name))
            created["elements"] += value.numel()
            require(len(seen) <= tensors and created["elements"] <= elements)

    def count_buffer(_: nn.Module, name: str, value: Tensor | None) -> None:
        if value is not None:
            created["buffers"] += value.numel()
            require(created["buffers"] <= 4 * elements + 2**26)

    handles = [
        modules.register_module_parameter_registration_hook(count),
        modules.register_module_buffer_registration_hook(count_buffer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- identity ---


def file_sha256(path: Path) -> bytes:
    """Return the sha256 digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def files_fingerprint(found: Checkpoint) -> str:
    """Return a model's hub commit, or the sha256 of its files, without loading the model.

    Use this for models that are only compared, such as the student of a resumed run.
    """
    if found.base is not None:
        return adapter_fingerprint(found, files_fingerprint(found.base))
    if found.commit is not None:
        return f"hub:{found.name}@{found.commit}"
    files = {
        str(file.relative_to(found.folder)): file_sha256(file).hex() for file in found.hashed()
    }
    hashed = {"configuration": _configuration(found), "files": files}
    return f"sha256:{hashlib.sha256(canonical_json(hashed)).hexdigest()}"


def adapter_fingerprint(checkpoint: Checkpoint, base: str) -> str:
    """Return the sha256 over an adapter and the fingerprint of its base model."""
    config = _read_json(checkpoint.folder / ADAPTER_CONFIG)
    effective = {k: v for k, v in config.items() if k not in _WITHOUT_EFFECT}
    weights = file_sha256(checkpoint.folder / ADAPTER_WEIGHTS).hex()
    hashed = {"adapter": effective, "weights": weights, "base": base}
    return f"sha256:{hashlib.sha256(canonical_json(hashed)).hexdigest()}"
