"""Restrict targets and labels to the vocabulary of a draft model.

A draft model for speculative decoding often has a small head: its draft vocabulary is a subset of
the teacher's ids. A `DraftVocabulary` maps every id of the teacher to a class, which is the draft
id of the same token, or one more class, the rest, for all other ids. The image of an unbiased
target under this map is an unbiased target for the teacher's distribution over the classes
(docs/theory.md, section 9), so the targets of one cache can be mapped to any draft vocabulary.

The files are those of speculators, SpecForge, EAGLE-3 and vLLM: `d2t`, int64 [D], is the teacher's
id of each draft id minus the draft id, and `t2d`, bool [V], marks the ids in the vocabulary.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sparselogits.allowances import refuse
from sparselogits.errors import InvalidArgumentError, reason_of
from sparselogits.files import write_whole
from sparselogits.identity import LARGEST_VOCABULARY, Identity
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.progress import Progress
from sparselogits.store import Cache
from sparselogits.store.ranges import spread
from sparselogits.targets import SparseTargets
from sparselogits.untrusted import leads_outside, open_regular, read_regular
from sparselogits.wording import counted

_D2T, _T2D = "d2t", "t2d"
_WEIGHTS = "model.safetensors"
_OTHER_FILES = (".pt", ".pth", ".bin", ".npy", ".npz", ".json")

# what numpy.save writes for a vector; numpy's own parser evaluates the header as an expression
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<i8|<i4|\|b1|\|u1)', 'fortran_order': (?:False|True), "
    rb"'shape': \((\d{1,9}),\),? ?\} *\n",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Subset of a teacher's ids that a draft model predicts, and one class for all other ids.

    Class d < D is the token with the teacher's id `ids[d]`. Class D, the rest, is any other token.

    Args:
        ids: int64 [D], the teacher's id of each draft id; distinct.
        vocab_size: number V of the teacher's ids.

    Raises:
        InvalidArgumentError: `ids` is not an int64 vector on the CPU, there are no ids, an id is
            out of range or occurs twice, or `vocab_size` is too large.

    Examples:
        >>> import torch
        >>> draft = DraftVocabulary(torch.tensor([1, 4]), 6)
        >>> draft.classes_of(torch.arange(6)).tolist()
        [2, 0, 2, 2, 1, 2]
        >>> draft.d2t.tolist(), draft.t2d.tolist()
        ([1, 3], [False, True, False, False, True, False])
    """

    ids: Tensor
    vocab_size: int

    def __post_init__(self) -> None:
        ids: Any = self.ids
        plain = isinstance(ids, Tensor) and (ids.device.type, ids.layout) == ("cpu", torch.strided)
        if not plain or ids.dtype != torch.int64 or ids.dim() != 1 or not len(ids):
            found = f"of type {type(ids).__name__}"
            if isinstance(ids, Tensor):
                found = f"of dtype {ids.dtype} and shape {tuple(ids.shape)} on {ids.device}"
            raise InvalidArgumentError(
                f"a draft vocabulary has ids {found}; expected a vector of at least one id, int64, "
                "on the CPU"
            )
        if self.vocab_size > LARGEST_VOCABULARY:
            raise InvalidArgumentError(
                f"a draft vocabulary is for a teacher of {self.vocab_size:,} ids, expected at most "
                f"{LARGEST_VOCABULARY:,}; give the number of the teacher's ids"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise InvalidArgumentError(
                f"a draft vocabulary has the ids {low} to {high}, but the teacher's vocabulary has "
                f"{counted(self.vocab_size, 'id')}; give ids of this teacher"
            )
        if len(ids.unique()) < len(ids):
            raise InvalidArgumentError(
                f"a draft vocabulary has {len(ids)} ids, and some occur twice; give distinct ids"
            )

    def __len__(self) -> int:
        """Return the number D of draft ids; the class of all other ids has the index D."""
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DraftVocabulary):
            return NotImplemented
        return (self.vocab_size, self.fingerprint) == (other.vocab_size, other.fingerprint)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"DraftVocabulary({len(self):,} of {self.vocab_size:,} ids)"

    @classmethod
    def most_frequent(
        cls, frequencies: Tensor | np.ndarray, size: int, *, keep: Sequence[int] = ()
    ) -> DraftVocabulary:
        """Choose the ids with the largest frequencies.

        Among ids of equal frequency, the smallest are chosen. The draft ids are in the order of the
        teacher's ids.

        Args:
            frequencies: number of occurrences or probability mass of each id, [V].
            size: number D of draft ids.
            keep: ids that are chosen whatever their frequency, such as the end of text.

        Raises:
            InvalidArgumentError: `size` is less than 1, greater than V, or less than the number of
                ids in `keep`; an id in `keep` is out of range; or `frequencies` is not a vector of
                finite non-negative numbers.
        """
        given, kept = _float64(frequencies), sorted(set(keep))
        if not max(1, len(kept)) <= size <= len(given):
            raise InvalidArgumentError(
                f"a draft vocabulary of {counted(size, 'id')} was requested, {len(kept)} of them "
                f"fixed, from a vocabulary of {counted(len(given), 'id')}; choose a size from "
                f"{max(1, len(kept))} to {len(given)}"
            )
        if kept and not 0 <= kept[0] <= kept[-1] < len(given):
            raise InvalidArgumentError(
                f"the ids to keep are {kept}, but the vocabulary has the ids 0 to "
                f"{len(given) - 1}; give ids of this vocabulary"
            )
        scores = given.clone()
        scores[kept] = torch.inf
        chosen = scores.argsort(descending=True, stable=True)[:size]
        return cls(chosen.sort().values, len(given))

    @property
    def d2t(self) -> Tensor:
        """Difference between the teacher's id and the draft id of each draft token, int64 [D]."""
        return self.ids - torch.arange(len(self))

    @property
    def t2d(self) -> Tensor:
        """Mask of the teacher's ids that are in the draft vocabulary, bool [V]."""
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[self.ids] = True
        return mask

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of `ids`, whose order determines the token of each row of a head."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    @cached_property
    def _classes(self) -> Tensor:
        classes = torch.full((self.vocab_size,), len(self))
        classes[self.ids] = torch.arange(len(self))
        return classes

    def classes_of(self, ids: Tensor) -> Tensor:
        """Return the class of each id of the teacher, int64 of the same shape.

        Ids of padding rows, which a cache may have in addition to this vocabulary, are in class D.
        """
        classes = self._classes.to(ids.device)
        known = ids < self.vocab_size
        return torch.where(known, classes[ids.clamp(max=self.vocab_size - 1)], len(self))

    def restrict(self, targets: SparseTargets) -> SparseTargets:
        """Return the targets for the D + 1 classes.

        Weights and counts of the entries outside of the draft vocabulary are added to one entry of
        class D, so targets that were drawn in rounds can still be thinned.

        Args:
            targets: targets for the teacher's ids.

        Examples:
            >>> import torch
            >>> ids, weights = torch.tensor([1, 2, 5]), torch.tensor([0.5, 0.25, 0.25])
            >>> targets = SparseTargets(ids, weights, torch.tensor([0, 3]), vocab_size=6)
            >>> ids, weights = DraftVocabulary(torch.tensor([1, 4]), 6).restrict(targets)[0]
            >>> ids.tolist(), weights.tolist()
            ([0, 2], [0.5, 0.5])
        """
        image = self.classes_of(torch.arange(targets.vocab_size))
        return targets.mapped(image, len(self) + 1)

    def labels(self, labels: Tensor) -> Tensor:
        """Return the class of each label; ignored labels (-100) stay ignored.

        Args:
            labels: int64, ids of the teacher or -100.

        Raises:
            InvalidArgumentError: a label is not below V.
        """
        largest = int(labels.max()) if labels.numel() else 0
        if largest >= self.vocab_size:
            raise InvalidArgumentError(
                f"the text has the id {largest}, but the draft vocabulary is for a teacher of "
                f"{counted(self.vocab_size, 'id')}; give a draft vocabulary of the same tokenizer"
            )
        ignored = labels == IGNORE_INDEX
        return self.classes_of(labels.masked_fill(ignored, 0)).masked_fill(ignored, IGNORE_INDEX)

    def restrict_log_probabilities(self, log_p: Tensor) -> Tensor:
        """Return the log-probabilities of the D + 1 classes.

        Args:
            log_p: log-probabilities of the teacher's ids, float [P, V'].

        Returns:
            float [P, D + 1]; the last column is the logarithm of the summed other probabilities.
        """
        ids = self.ids.to(log_p.device)
        outside = log_p.index_fill(1, ids, -torch.inf)
        return torch.cat([log_p[:, ids], outside.logsumexp(1, keepdim=True)], 1)

    def logits_of_ids(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Return a draft model's logits for the teacher's ids.

        Args:
            logits: logits of the D + 1 classes, float [P, D + 1].
            vocab_size: number V' of the teacher's logits per position, greater than every draft id.

        Returns:
            float [P, V'], -inf for ids outside of the draft vocabulary. The logit of the rest is
            not used, because a drafter cannot draft this class.
        """
        whole = logits.new_full((len(logits), vocab_size), -torch.inf)
        whole[:, self.ids.to(logits.device)] = logits[:, :-1]
        return whole

    def coverage(self, frequencies: Tensor | np.ndarray) -> float:
        """Return the share of the draft ids in the total frequency of all ids, in [0, 1].

        The result is NaN if all frequencies are 0.

        Args:
            frequencies: number of occurrences or probability mass of each id, [V].

        Raises:
            InvalidArgumentError: `frequencies` is not a vector of finite non-negative numbers.
        """
        given = _float64(frequencies)
        return float(given[self.ids[self.ids < len(given)]].sum() / given.sum())

    def identity_of(self, identity: Identity) -> Identity:
        """Return the identity of a cache's targets after `restrict`.

        Raises:
            InvalidArgumentError: the draft vocabulary has ids that the cache's teacher does not
                have, or the cache is for a masked language model.
        """
        self.require_within(identity.vocab_size, "the teacher of the cache")
        require_causal(masked=identity.objective is not None)
        codec = {"name": "draft vocabulary", "ids": self.fingerprint}
        return replace(identity, vocab_size=len(self) + 1, codec=codec)

    def require_within(self, vocab_size: int, owner: str) -> None:
        """Validate that all draft ids are ids of a teacher.

        Args:
            vocab_size: number of the teacher's ids.
            owner: name of the teacher for the message, such as "the teacher of the cache".

        Raises:
            InvalidArgumentError: a draft id is not below `vocab_size`.
        """
        if int(self.ids.max()) >= vocab_size:
            raise InvalidArgumentError(
                f"the draft vocabulary has the id {int(self.ids.max())}, but {owner} has "
                f"{counted(vocab_size, 'id')}; give a draft vocabulary of the same tokenizer"
            )

    def require_head(self, outputs: int) -> None:
        """Validate that a model has one output per class.

        Args:
            outputs: number of the model's outputs.

        Raises:
            InvalidArgumentError: the number is not D + 1.
        """
        if outputs != len(self) + 1:
            raise InvalidArgumentError(
                f"the student has {counted(outputs, 'output')}, expected {len(self) + 1} for a "
                f"draft vocabulary of {len(self)} ids and the rest; replace its head with "
                "DraftVocabulary.give_head, as `sparselogits train` and `eval` do"
            )

    @torch.no_grad()
    def give_head(self, model: nn.Module) -> nn.Module:
        """Replace the head of a transformers causal language model by one for the D + 1 classes.

        The rows of draft ids are copied, and the row of the rest is the mean of the rows of the
        teacher's other ids (of all its ids if there are no others). The input embedding is not
        changed and no longer shares its weights with the head.

        Args:
            model: model with at least V output ids; it is changed.

        Returns:
            The new head, which is also `model.get_output_embeddings()`.

        Raises:
            InvalidArgumentError: the model has no head, or one with fewer rows than the vocabulary.
        """
        old: Any = model.get_output_embeddings()  # type: ignore[operator]
        rows = 0 if old is None else len(old.weight)
        if rows < self.vocab_size:
            raise InvalidArgumentError(
                f"the head of the model has {counted(rows, 'row')}, expected at least "
                f"{self.vocab_size}, one per id of the teacher; give a model with the teacher's "
                "vocabulary"
            )
        outside = ~self.t2d.to(old.weight.device)
        chosen = self.ids.to(old.weight.device)
        head = _head_like(old, len(self) + 1)
        for name, values in old.named_parameters():
            known = values[: self.vocab_size]
            others = known[outside] if bool(outside.any()) else known
            getattr(head, name).copy_(torch.cat([values[chosen], others.mean(0)[None]]))
        model.set_output_embeddings(head)  # type: ignore[operator]
        config: Any = model.config
        config.get_text_config(decoder=True).tie_word_embeddings = False
        config.tie_word_embeddings = False
        return head

    @torch.no_grad()
    def widen_head(self, model: nn.Module) -> nn.Module:
        """Replace the head for the D + 1 classes by one with a row per row of the input embedding.

        transformers has one vocabulary size for embedding and head, so a model is saved with such a
        head. The rows of ids outside of the draft vocabulary are copies of the row of the rest, so
        `give_head` restores the D + 1 rows if D < V; generation suppresses these ids.

        Args:
            model: model with a head of `give_head`; it is changed.

        Returns:
            The new head.
        """
        old: Any = model.get_output_embeddings()  # type: ignore[operator]
        rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
        classes = self.classes_of(torch.arange(rows)).to(old.weight.device)
        head = _head_like(old, rows)
        for name, values in old.named_parameters():
            getattr(head, name).copy_(values[classes])
        model.set_output_embeddings(head)  # type: ignore[operator]
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.suppress_tokens = (classes == len(self)).nonzero().flatten().tolist()
        return head

    def checkpoint_tensors(self, head: nn.Module) -> dict[str, Tensor]:
        """Return a trained head in the form of an EAGLE-3 checkpoint, without the row of the rest.

        Args:
            head: head for the D + 1 classes.

        Returns:
            `lm_head.weight` [D, H], `lm_head.bias` [D] if the head has one, `d2t` and `t2d`.
        """
        tensors = {
            f"lm_head.{name}": values.detach()[:-1].contiguous()
            for name, values in head.named_parameters()
        }
        return tensors | {_D2T: self.d2t, _T2D: self.t2d}

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as `d2t` and `t2d`, in the layout of speculators and EAGLE-3.

        Args:
            path: a path that ends in .safetensors for one file with both tensors, as in EAGLE-3
                checkpoints; otherwise a folder for d2t.npy and t2d.npy, as speculators reads them.

        Raises:
            InvalidArgumentError: another or an unreadable draft vocabulary exists at `path`, which
                is not replaced, because a trained head may belong to it; or `path` ends like a file
                of another format, such as .pt.
            StorageError: a file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() in _OTHER_FILES:
            raise InvalidArgumentError(
                f"{path} is named like a file of another format; give a name that ends in "
                ".safetensors for one file, or a folder for d2t.npy and t2d.npy"
            )
        contents = self._files(path)
        try:
            existing = DraftVocabulary.load(path)
        except InvalidArgumentError:
            # an interrupted `save` leaves some of the files, which are completed
            if any(os.path.lexists(file) and not _holds(file, contents[file]) for file in contents):
                raise
        else:
            if existing != self:
                raise InvalidArgumentError(
                    f"{path} has another draft vocabulary; give a new path, or remove it if no "
                    "trained head belongs to it"
                )
        for file, content in contents.items():
            write_whole(file, content)

    def _files(self, path: Path) -> dict[Path, bytes]:
        """Return the files that `save` writes, with their contents."""
        if path.suffix.lower() == ".safetensors":
            return {path: save({_D2T: self.d2t, _T2D: self.t2d})}
        contents = {}
        for name, values in ((_D2T, self.d2t), (_T2D, self.t2d)):
            stream = io.BytesIO()
            np.save(stream, values.numpy(), allow_pickle=False)
            contents[path / f"{name}.npy"] = stream.getvalue()
        return contents

    @classmethod
    def load(cls, path: str | Path) -> DraftVocabulary:
        """Read a vocabulary that `save`, speculators or a trainer of EAGLE-3 drafters wrote.

        Args:
            path: a safetensors file with `d2t` and `t2d` (a vocabulary or the weights of a
                drafter), or a folder with d2t.npy and t2d.npy, with model.safetensors, or with
                both, if they contain the same vocabulary.

        Raises:
            InvalidArgumentError: a file is missing, damaged, no regular file, or a link out of the
                folder; or `d2t` and `t2d`, or two files, contradict each other.
        """
        path = Path(path)
        if not path.is_dir():
            return _checked(_read_safetensors(path), path)
        arrays, weights = [path / f"{name}.npy" for name in (_D2T, _T2D)], path / _WEIGHTS
        if not any(map(os.path.lexists, arrays)):
            _require_inside(weights, path)
            return _checked(_read_safetensors(weights), weights)
        for file in arrays:
            _require_inside(file, path)
        of_arrays = _checked(tuple(map(_read_npy, arrays)), path)
        if os.path.lexists(weights):
            _require_inside(weights, path)
            tensors = _read_safetensors(weights, optional=True)
            if tensors is not None and _checked(tensors, weights) != of_arrays:
                raise InvalidArgumentError(
                    f"{path} has two draft vocabularies that differ, in {_D2T}.npy and {_T2D}.npy "
                    f"({of_arrays!r}) and in {_WEIGHTS} ({_checked(tensors, weights)!r}); expected "
                    "one, that of the trained head. Remove the wrong files, or name the "
                    "safetensors file"
                )
        return of_arrays


def vocabulary_of(folder: Path) -> DraftVocabulary | None:
    """Return the draft vocabulary of a saved drafter; None if the folder has no d2t.npy.

    Raises InvalidArgumentError if `DraftVocabulary.load` rejects the folder.
    """
    return DraftVocabulary.load(folder) if (folder / f"{_D2T}.npy").exists() else None


def require_vocabulary_of(folder: Path, draft: DraftVocabulary | None) -> None:
    """Validate that a saved drafter is used with the draft vocabulary that it was trained with.

    Args:
        folder: folder of a model; one with d2t.npy is a drafter.
        draft: draft vocabulary with which the model will be used; None for all ids.

    Raises:
        InvalidArgumentError: the drafter has another draft vocabulary, or one that cannot be read.
    """
    own = vocabulary_of(folder)
    if own is not None and draft != own:
        found = "no draft vocabulary was given" if draft is None else f"{draft!r} was given"
        raise InvalidArgumentError(
            f"the model in {folder} was trained with a draft vocabulary ({own!r}), and {found}; "
            f"give that one: --draft-vocabulary {folder} (draft_vocabulary: in the recipe)"
        )


def require_causal(*, masked: bool) -> None:
    """Raise InvalidArgumentError if a draft vocabulary is used with windows of a masked model."""
    if masked:
        raise InvalidArgumentError(
            "a draft vocabulary was given with windows for a masked language model; only causal "
            "language models draft tokens. Use windows for a causal language model, or leave the "
            "draft vocabulary out"
        )


def teacher_mass(cache: Cache, *, windows: int = 256, progress: Progress | None = None) -> Tensor:
    """Return the sum of the target weights of each id in some windows of a cache, float64 [V].

    If the cache is unbiased, the expectation of the sum is proportional to the mean probability
    that the teacher assigns to the id at these windows' positions with a target.

    Args:
        cache: the cache.
        windows: maximum number of windows to read, spread evenly over the cache.
        progress: called with the numbers of windows done and in total.

    Raises:
        CacheCorruptionError: a shard is damaged.
        StorageError: a shard cannot be reached.

    Examples:
        >>> from sparselogits.store import Cache
        >>> cache = Cache.open("my-cache")
        >>> teacher_mass(cache, windows=2).shape == (cache.identity.vocab_size,)
        True
    """
    total = torch.zeros(cache.identity.vocab_size, dtype=torch.float64)
    chosen = spread(len(cache), windows)
    for done, i in enumerate(chosen, 1):
        targets = cache.read(i).targets
        total.index_add_(0, targets.ids, targets.weights.double())
        if progress is not None:
            progress(done, len(chosen))
    return total


def _head_like(old: nn.Module, rows: int) -> nn.Linear:
    """Create a head with `rows` outputs, and the inputs, device and dtype of the head `old`."""
    weight: Any = old.weight
    head = nn.Linear(weight.shape[1], rows, bias=getattr(old, "bias", None) is not None)
    return head.to(weight.device, weight.dtype)


def _float64(frequencies: Tensor | np.ndarray) -> Tensor:
    """Return frequencies as a float64 tensor on the CPU.

    Arrays are copied, because PyTorch warns about shared arrays that are not writable.

    Raises:
        InvalidArgumentError: the frequencies are not a vector of finite non-negative numbers.
    """
    if isinstance(frequencies, np.ndarray):
        frequencies = torch.from_numpy(frequencies.astype(np.float64))
    given = frequencies.double().cpu()
    if given.dim() != 1 or not bool(((given >= 0) & given.isfinite()).all()):
        raise InvalidArgumentError(
            f"the frequencies have shape {tuple(given.shape)} and values from "
            f"{given.min() if given.numel() else 0:g}; expected a vector of finite numbers of at "
            "least 0, one per id of the teacher"
        )
    return given


def _require_inside(path: Path, folder: Path) -> None:
    """Validate that a file of a folder is no link out of the folder, unless that is allowed.

    Raises InvalidArgumentError; the allowance is "linked-weights".
    """
    if leads_outside(path, folder):
        error = InvalidArgumentError(
            f"{path} is a link to {os.path.realpath(path)}, outside of its folder; copy the file "
            "into the folder instead"
        )
        refuse(error, "linked-weights")


def _checked(tensors: tuple[Tensor, ...], path: Path) -> DraftVocabulary:
    """Return the draft vocabulary that the tensors d2t and t2d of a file or folder describe.

    Raises:
        InvalidArgumentError: the tensors have unexpected types or shapes, or contradict each other.
    """
    d2t, t2d = tensors
    integers = (torch.int64, torch.int32)
    shaped = d2t.dim() == t2d.dim() == 1 and len(d2t) > 0
    truths = t2d.dtype == torch.bool or (t2d.dtype == torch.uint8 and bool((t2d <= 1).all()))
    if not shaped or not truths or d2t.dtype not in integers:
        raise InvalidArgumentError(
            f"{path} has d2t of dtype {d2t.dtype} and shape {tuple(d2t.shape)}, and t2d of dtype "
            f"{t2d.dtype} and shape {tuple(t2d.shape)}; expected d2t int64 [draft ids] and t2d "
            "bool, or uint8 of 0 and 1, [ids of the teacher]"
        )
    # a file may have other bytes than 0 and 1, which PyTorch does not expect
    marked = t2d.contiguous().view(torch.uint8).nonzero().flatten()
    ids = d2t.long() + torch.arange(len(d2t))
    if len(ids) == len(marked) and torch.equal(ids.sort().values, marked):
        return DraftVocabulary(ids, len(t2d))
    advice = "write both files again from one list of ids"
    if len(d2t) == len(marked) and torch.equal(d2t.long().sort().values, marked):
        advice = "d2t has the ids themselves: subtract the draft ids (torch.arange) from them"
    elif not bool(d2t.any()):
        advice = "d2t is all zeros: write it again after the ids have been chosen"
    raise InvalidArgumentError(
        f"{path}: d2t maps {counted(len(d2t), 'draft id')} to other teacher ids than the "
        f"{len(marked)} that t2d marks (expected the marked ids, each once, as i + d2t[i] for "
        f"draft ids i); {advice}"
    )


def _read_npy(path: Path) -> Tensor:
    """Read a vector of int64, int32, uint8 or bool from a .npy file, in bounded memory.

    Raises:
        InvalidArgumentError: the file cannot be read, or has other contents.
    """
    try:
        data = read_regular(path, 8 * LARGEST_VOCABULARY + 4096)
        header = _NPY_HEADER.match(data)
        if header is None or header.end() != 10 + int.from_bytes(data[8:10], "little"):
            found = data[10:110].partition(b"\n")[0].decode("latin-1").strip()
            raise ValueError(
                f"it has the header {found!r}, which is not that of a vector of int64, int32, "
                "uint8 or bool in format 1.0, as numpy.save writes it"
            )
        kind, count = header[1].decode(), int(header[2])
        rest = data[header.end() :]
        if len(rest) != count * np.dtype(kind).itemsize:
            raise ValueError(f"it has {len(rest)} bytes of data for {count} values")
        return torch.from_numpy(np.frombuffer(rest, kind).copy())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


@overload
def _read_safetensors(path: Path) -> tuple[Tensor, Tensor]: ...
@overload
def _read_safetensors(path: Path, *, optional: bool) -> tuple[Tensor, Tensor] | None: ...
def _read_safetensors(path: Path, *, optional: bool = False) -> tuple[Tensor, Tensor] | None:
    """Read `d2t` and `t2d` from a safetensors file.

    Args:
        path: the file.
        optional: whether to return None for a file without these tensors.

    Raises:
        InvalidArgumentError: the file cannot be read, or lacks a tensor.
    """
    try:
        os.close(open_regular(path))
        with safe_open(path, framework="pt") as file:
            lacking = {_D2T, _T2D} - set(file.keys())
            if optional and len(lacking) == 2:
                return None
            if lacking:
                raise ValueError(
                    f"it lacks the tensors {' and '.join(sorted(lacking))}, which drafters with a "
                    "full vocabulary do not have"
                )
            largest = max(max(file.get_slice(n).get_shape(), default=0) for n in (_D2T, _T2D))
            if largest > LARGEST_VOCABULARY:
                raise ValueError(f"it has {largest:,} ids, more than {LARGEST_VOCABULARY:,}")
            return file.get_tensor(_D2T), file.get_tensor(_T2D)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _holds(path: Path, content: bytes) -> bool:
    """Return whether a file has a content; False for a file that cannot be read."""
    try:
        return read_regular(path, len(content)) == content
    except (OSError, ValueError):
        return False


def _unreadable(path: Path, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{path} cannot be read as a draft vocabulary: {reason_of(error)}; expected a safetensors "
        "file with d2t and t2d, or a folder with d2t.npy and t2d.npy"
    )
