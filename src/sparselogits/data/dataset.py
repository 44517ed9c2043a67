"""Define datasets of windows for torch's DataLoader, and for trainers that use one.

Tokens are stored with their targets, so no alignment is required. For a causal teacher, position j
of `targets` estimates the distribution of the token after position j, and `shift_labels[j]` is that
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import NotRequired, SupportsIndex, TypedDict, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparselogits.corpus import PackedCorpus, Window
from sparselogits.corpus.windows import text_length
from sparselogits.corruption import Corrupted, Corruption
from sparselogits.data.draft import DraftVocabulary, require_causal
from sparselogits.data.mixture import Mixture, Weights, divided
from sparselogits.data.order import WindowRequest
from sparselogits.data.thinning import Schedule
from sparselogits.documents import restarting_positions
from sparselogits.errors import CacheError, InvalidArgumentError
from sparselogits.objectives import CAUSAL, IGNORE_INDEX, Masked, TokenObjective
from sparselogits.samplers import thinning_starts
from sparselogits.store import Cache, CopyFolder, Location, WindowRecord
from sparselogits.store.ranges import spread
from sparselogits.store.storage.local_copy import LocalCopy
from sparselogits.store.storage.location import is_url, storage_at
from sparselogits.targets import SparseTargets, thinning_choices
from sparselogits.wording import counted

_PILOT_WINDOWS = 8


class TextWindow(TypedDict):
    """Item of a dataset: a window of text without targets.

    Attributes:
        input_ids: int64 [L]; for a masked language model, the corrupted tokens.
        shift_labels: int64 [L], the token that each position predicts, or with a draft vocabulary
            the class of that token; -100 if there is none. A causal model predicts the next token.
            It predicts none at the last position of the window, at positions that the loss mask
            excludes, and, if attention is reset at document starts, at the last position of each
            document. A masked language model predicts the original token at each chosen position.
        attention_mask: int64 [L], 0 at padding; present if each window has one document.
        position_ids: int64 [L]; present if attention is reset at document starts.
        labels: int64 [L], the same labels at the positions of the predicted tokens, as in
            transformers; present for a masked language model.
        loss_weight: weight of the window's loss, float32 []; present if each window has a separate
            rate of corruption.
    """

    input_ids: Tensor
    shift_labels: Tensor
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    labels: NotRequired[Tensor]
    loss_weight: NotRequired[Tensor]


class CachedWindow(TextWindow):
    """Item of a dataset: a window of text with targets.

    Attributes:
        targets: targets of the L positions.
        teacher_entropy: mean entropy of the teacher in nats, float32 []; for several teachers the
            weighted mean of their entropies. Absent where the entropy of the targets'
            distribution is not stored: with a draft vocabulary, and in retokenized caches.
    """

    targets: SparseTargets
    teacher_entropy: NotRequired[Tensor]


class CacheDataset(Dataset[CachedWindow]):
    """Dataset of the windows of a cache, for torch's DataLoader and trainers that use one.

    `dataset[i]` is a dict with `input_ids`, `shift_labels`, `targets` and further entries that
    `CachedWindow` describes; `dataset[a:b]` is a batch of windows that `collate` has combined.

    Several caches of the same text, built with teachers that share a tokenizer, are read as one
    cache with targets for the mixture sum_m w_m p_m of the teachers' distributions p_m.

    Args:
        path: directory or URL of the cache, or a list of directories or URLs.
        weights: weights w_m of the teachers if there are several caches. Either one number per
            cache, with sum 1; or one row of such numbers per text (in the order in which texts were
            added) or per window; or "best" to use the teacher with the lowest loss in each window.
            None for equal weights.
        draft: vocabulary of a draft model, to which targets and labels are restricted (input tokens
            are not); None for all ids of the teacher.
        seed: random seed for thinning, used if a `WindowRequest` has fewer rounds than the cache.
        copy: folder for local copies of what is read from a URL; None for `CopyFolder.default()`.
            A cache in a directory is not copied.

    Raises:
        CacheError: there is no cache, or it has no finished shard.
        IdentityMismatchError: several caches cannot be mixed, see `Mixture.of`.
        InvalidArgumentError: no cache is given; two caches have the same identity; the weights are
            negative, do not sum to 1 or do not match the caches; or the draft vocabulary does not
            match the caches.

    Examples:
        >>> cache = CacheDataset("my-cache")
        >>> window = cache[0]
        >>> len(window["input_ids"]) == len(window["targets"])
        True
        >>> batch = cache[0:3]
        >>> batch["input_ids"].shape == (3, cache.identity.window_length)
        True
    """

    def __init__(
        self,
        path: Location | Sequence[Location],
        *,
        weights: Weights | None = None,
        draft: DraftVocabulary | None = None,
        seed: int = 0,
        copy: CopyFolder | None = None,
    ) -> None:
        paths: Sequence[Location] = path if isinstance(path, list | tuple) else [path]  # type: ignore[list-item]
        if not paths:
            raise InvalidArgumentError("the list of caches is empty; give at least one cache")
        self._mixture = Mixture.of([_open(each, copy) for each in paths], weights)
        self.caches = self._mixture.caches
        self.cache = self.caches[0]
        """The cache, or the first of several caches, which all have the same windows."""
        self.draft = draft
        mapped = any(cache.identity.retokenized for cache in self.caches)
        self._entropy_known = draft is None and not mapped
        identity = self._mixture.identity
        self.identity = identity if draft is None else draft.identity_of(identity)
        self.seed = seed

    @property
    def unbiased(self) -> bool:
        """Whether the expectation of drawn targets is the distribution of the teacher or mixture.

        In a retokenized cache, this is a statement about the draws; the mapping to other tokens has
        a bias of its own (docs/theory.md, section 10).
        """
        return self._mixture.unbiased

    @property
    def rounds(self) -> int | None:
        """Largest number of rounds per position, summed over the teachers of a window.

        None if the targets of a cache were not drawn in rounds.
        """
        return self._mixture.rounds

    @property
    def teachers_per_window(self) -> int:
        """Largest number of teachers with a positive weight in a window."""
        return self._mixture.teachers_per_window

    def __len__(self) -> int:
        return len(self.cache)

    def __repr__(self) -> str:
        identity = self.identity
        tokens = len(self) * identity.window_length
        return (
            f"CacheDataset({' and '.join(str(cache.root) for cache in self.caches)}: "
            f"{counted(len(self), 'window')} of "
            f"{identity.window_length:,} tokens, {tokens:,} in all; "
            f"{' and '.join(f'{cache.entries_per_position():.1f}' for cache in self.caches)} "
            f"entries per token, "
            f"{' and '.join(cache.identity.sampler_in_words() for cache in self.caches)}; "
            f"teacher {identity.teacher_in_words()})"
        )

    def only_cache(self, done: str) -> Cache:
        """Return the only cache of the dataset.

        Args:
            done: past participle of the operation that requires one cache, such as "shown"; for the
                message.

        Raises:
            InvalidArgumentError: the dataset mixes several caches.
        """
        if len(self.caches) > 1:
            raise InvalidArgumentError(
                f"only one cache can be {done} at a time, but this dataset mixes "
                f"{' and '.join(str(cache.root) for cache in self.caches)}; open one of them"
            )
        return self.cache

    @overload
    def __getitem__(self, request: SupportsIndex | WindowRequest) -> CachedWindow: ...
    @overload
    def __getitem__(self, request: slice) -> dict[str, Tensor]: ...
    def __getitem__(
        self, request: SupportsIndex | WindowRequest | slice
    ) -> CachedWindow | dict[str, Tensor]:
        if isinstance(request, slice):
            from sparselogits.data.collator import collate

            chosen = range(len(self))[request]
            if not chosen:
                raise IndexError(f"no window in {request} of {counted(len(self), 'window')}")
            return collate([self[i] for i in chosen])
        if not isinstance(request, WindowRequest):
            request = WindowRequest(index(request))
        weighted = self._mixture.read(request.index)
        weights = tuple(weight for weight, _ in weighted)
        records = [record for _, record in weighted]
        parts = [record.targets for record in records]
        if request.rounds is not None:
            kept = divided(request.rounds, weights, tuple(part.rounds or 0 for part in parts))
            parts = [
                self._thinned(part, rounds, request, records[0].window_index, place / len(parts))
                for place, (part, rounds) in enumerate(zip(parts, kept, strict=True))
            ]
        entropy = sum(weight * record.teacher_entropy for weight, record in weighted)
        packing, first, corrupted = self.identity.packing, records[0], None
        reset = bool(packing.get("reset_attention"))
        before_padding = text_length(packing.get("kind"), first.document_starts, len(first.tokens))
        if first.inputs is not None and first.rate is not None:
            corrupted = Corrupted(first.inputs, first.present(), first.rate)
        inputs = _inputs(first, self.identity.predicts, corrupted, before_padding, reset)
        item: CachedWindow = {
            **inputs,
            "targets": SparseTargets.mixed(parts, weights),
            "teacher_entropy": torch.tensor(entropy, dtype=torch.float32),
        }
        if self.draft is not None:
            item["targets"] = self.draft.restrict(item["targets"])
            item["shift_labels"] = self.draft.labels(item["shift_labels"])
        if not self._entropy_known:
            del item["teacher_entropy"]
        return item

    def _thinned(
        self,
        targets: SparseTargets,
        rounds: int,
        request: WindowRequest,
        window_index: int,
        shift: float,
    ) -> SparseTargets:
        """Thin the targets of one teacher.

        `shift`, a share in [0, 1) of the number of subsets, is added to the index of the subset of
        rounds. The teachers of a window have different shifts, because with equal subsets the noise
        of similar teachers would be correlated if their caches were drawn with the same seed.
        """
        if rounds == targets.rounds:
            return targets
        stride = thinning_choices(targets.rounds or 0, rounds)
        starts: Tensor | int = 0
        if stride > 1:
            starts = thinning_starts(self.seed, request.epoch, window_index, len(targets), stride)
            starts = (starts + int(shift * stride)) % stride
        return targets.thin(rounds, starts)


def _open(path: Location, copy: CopyFolder | None) -> Cache:
    """Open a cache that has a finished shard, with local copies if the cache is at a URL."""
    storage = storage_at(path)
    if is_url(path):
        storage = LocalCopy(storage, copy or CopyFolder.default())
    cache = Cache.open(storage)
    if len(cache) == 0:
        raise CacheError(
            f"the cache at {path} has no finished shard yet; run `sparselogits cache` to build it"
        )
    return cache


class TextDataset(Dataset[TextWindow]):
    """Dataset of the windows of a packed corpus without targets, for evaluation.

    Items are dicts like those of `CacheDataset`, without `targets` and `teacher_entropy`.

    Args:
        corpus: packed corpus.
        holdout: whether to read the held-out windows; otherwise the training windows.
        limit: maximum number of windows; None for all.
        corruption: corruption of the windows, the same each time a window is read, for evaluating
            masked language models; None for causal models.
        draft: vocabulary of a draft model, to which labels are restricted; None for all ids.

    Raises:
        InvalidArgumentError: a corruption and a draft vocabulary are given, or the draft vocabulary
            has ids that the teacher for which the text was packed does not have.
    """

    def __init__(
        self,
        corpus: PackedCorpus,
        *,
        holdout: bool = True,
        limit: int | None = None,
        corruption: Corruption | None = None,
        draft: DraftVocabulary | None = None,
    ) -> None:
        if draft is not None:
            require_causal(masked=corruption is not None)
            draft.require_within(corpus.vocab_size, "the teacher of the text")
        self.corpus, self.holdout, self.corruption = corpus, holdout, corruption
        self.draft = draft
        available = corpus.holdout_windows if holdout else corpus.windows
        self._length = available if limit is None else min(limit, available)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> TextWindow:
        if not 0 <= index < self._length:
            raise IndexError(f"window {index} is out of range for {self._length} windows")
        read = self.corpus.read_holdout if self.holdout else self.corpus.read
        window = read(index, index + 1)[0]
        objective: TokenObjective = CAUSAL
        corrupted = None
        if self.corruption is not None:
            objective = self.corruption.objective
            corrupted = self.corruption(
                window.tokens, window.index, learnt=window.learnt, held_out=self.holdout
            )
        reset = self.corpus.packing.reset_attention
        inputs = _inputs(window, objective, corrupted, window.text_length, reset)
        if self.draft is not None:
            inputs["shift_labels"] = self.draft.labels(inputs["shift_labels"])
        return inputs


def rounds_for_entries(dataset: CacheDataset, budget: float) -> int:
    """Return the number of rounds to which targets must be thinned to meet a budget of entries.

    The mean number of entries per position with a target, measured on at most eight windows that
    are spread over the cache, is then as close to the budget as possible.

    Args:
        dataset: dataset whose targets were drawn in rounds.
        budget: mean entries per position, at least 1.

    Raises:
        InvalidArgumentError: the targets were not drawn in rounds, or the budget is below 1 or
            above the mean number of entries per position in the cache.
    """
    chosen = spread(len(dataset), _PILOT_WINDOWS)
    cached = dataset.rounds
    if cached is None or not budget >= 1:  # a comparison with NaN is False
        Schedule.constant(1).require_within(cached)
        raise InvalidArgumentError(
            f"a budget of {budget:g} entries per position is too small; give at least 1"
        )

    def mean(rounds: int) -> float:
        targets = [dataset[WindowRequest(i, 0, rounds)]["targets"] for i in chosen]
        carrying = sum(int((t.entries_per_position > 0).sum()) for t in targets)
        entries: int = sum(t.entries for t in targets)
        return entries / max(1, carrying)

    if budget > (most := mean(cached)):
        raise InvalidArgumentError(
            f"a budget of {budget:g} entries per position exceeds the {most:.1f} entries in the "
            "cache; give a smaller budget, or omit thinning"
        )
    least = dataset.teachers_per_window
    low, high = least, cached  # mean(high) >= budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if mean(middle) >= budget else (middle + 1, high)
    return low if low == least or mean(low) - budget <= budget - mean(low - 1) else low - 1


def _inputs(
    window: WindowRecord | Window,
    objective: TokenObjective,
    corrupted: Corrupted | None,
    before_padding: int | None,
    reset_attention: bool,
) -> TextWindow:
    """Return the inputs and labels of a window, whose input may be corrupted."""
    starts = window.document_starts
    tokens, mask = window.tokens, window.mask
    if corrupted is not None:
        tokens, mask = corrupted.inputs, corrupted.chosen
    labels = objective.labels(window.tokens, mask, starts if reset_attention else None)
    inputs: TextWindow = {
        "input_ids": torch.from_numpy(tokens.astype(np.int64)),
        "shift_labels": torch.from_numpy(labels),
    }
    if before_padding is not None:
        inputs["attention_mask"] = (torch.arange(len(tokens)) < before_padding).long()
    if reset_attention:
        inputs["position_ids"] = restarting_positions(len(tokens), [starts])[0]
    if corrupted is not None and isinstance(objective, Masked):
        inputs["labels"] = torch.from_numpy(objective.at_tokens(labels, IGNORE_INDEX))
        if objective.rate is None:
            inputs["loss_weight"] = torch.tensor(objective.weight(corrupted.rate))
    return inputs
