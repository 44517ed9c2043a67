"""Rewrite a cache for a student with another tokenizer; no model runs.

Each window of the cache becomes one window of the same text in the tokens of the student, padded or
cut at its end; words cut by the window's edges may be left out. So a target remains conditional on
the text that the student reads, shards have the same ranges, and the hold-out consists of the same
text. `pushforward` maps the targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from sparselogits.caching.pushforward import FOLLOWED, Aligned, Retokenizer
from sparselogits.caching.text import packed_texts, require_room
from sparselogits.corpus import (
    PackedCorpus,
    Packing,
    Window,
    fingerprint,
    packing_for,
    require_tokenizer,
    tokenizer_fingerprint,
)
from sparselogits.corpus.packed import Paths, text_fingerprint
from sparselogits.corpus.streams import part_name, writing_parquet, writing_part
from sparselogits.corpus.token_bytes import TokenBytes
from sparselogits.corpus.tokenizer_identity import ROLES
from sparselogits.corpus.windows import text_length
from sparselogits.errors import CacheError, InvalidArgumentError, require_whole
from sparselogits.files import write_whole
from sparselogits.identity import Identity, canonical_json
from sparselogits.objectives import CAUSAL, IGNORE_INDEX
from sparselogits.progress import Progress
from sparselogits.samplers import Threshold
from sparselogits.store import Cache, Location, WindowRecord
from sparselogits.store.codec.levels import STOCHASTIC
from sparselogits.store.codec.target_codec import NAME, ROUNDED
from sparselogits.store.ranges import spread
from sparselogits.store.storage.location import is_url
from sparselogits.store.texts import TextSpan, claim_text, named_texts
from sparselogits.targets import SparseTargets, offsets_from_lengths
from sparselogits.teacher.loading import TOKENIZER_FOLDER, keep_tokenizer, load_tokenizer

RULE = 1
"""Version of the rule by which targets are mapped, recorded in the identity."""

_PILOT_WINDOWS = 256
_MOST_PADDING = 1.25  # longest default window, relative to the mean
_MULTIPLE = 8  # the default window length is rounded up to a multiple of this


@dataclass(frozen=True)
class RetokenizeReport:
    """Result of `retokenize`.

    Args:
        windows: number of windows.
        window_length: number of tokens per window.
        tokens: number of tokens of the student, without padding.
        with_target: number of positions with a target of the teacher.
        without_target: number of other positions whose next token is in the loss mask of the cache.
        padding: number of tokens that pad windows.
        cut_tokens: number of tokens that were left out because their window was full.
        left_out_bytes: number of bytes of text at the edges of windows that were left out, because
            a window ends within a word or a character.
        text_bytes: number of bytes of text.
        unmapped: special tokens of the teacher without a counterpart, none of which is in the text.
    """

    windows: int = 0
    window_length: int = 0
    tokens: int = 0
    with_target: int = 0
    without_target: int = 0
    padding: int = 0
    cut_tokens: int = 0
    left_out_bytes: int = 0
    text_bytes: int = 0
    unmapped: tuple[str, ...] = ()


def retokenize(
    cache: Location,
    tokenizer: Any,
    out: Location,
    *,
    cache_tokenizer: Any = None,
    window: int | None = None,
    special: Mapping[str, str] | None = None,
    followed: int = FOLLOWED,
    elsewhere: Literal["text", "none"] = "text",
    progress: Progress | None = None,
) -> RetokenizeReport:
    """Write a cache for a student whose tokenizer differs from the teacher's.

    The teacher's targets are mapped where both tokenisations of the text have a boundary. If
    interrupted, call the function again to continue.

    Args:
        cache: folder or URL of the teacher's cache.
        tokenizer: transformers tokenizer of the student, or its name or folder.
        out: folder or URL of the new cache.
        cache_tokenizer: tokenizer of the cache, or its name or folder; None for the one in the
            cache's folder.
        window: number of the student's tokens per window; longer windows are cut, shorter ones
            padded. None for the length of the cache in `out`, if there is one. For a new cache,
            None derives the length from up to 256 converted windows: their largest length, but at
            most 1.25 times their mean length if windows join documents, rounded up to a multiple of
            8.
        special: mapping from special tokens of the teacher to special tokens of the student, or to
            "" to spell the token as text. Others are mapped to tokens of equal text or role.
        followed: largest number of tokens of the text through which the rounds that drew them are
            continued (see `pushforward`); 0 maps each drawn token by its own bytes alone, so that
            long tokens of the student get too little probability.
        elsewhere: targets of positions without a shared boundary: "text" for the token of the text,
            which is cross-entropy; "none" for no target and no loss.
        progress: called after each window with the numbers of windows done and in total.

    Raises:
        InvalidArgumentError: the tokens of a tokenizer do not determine the bytes of a text, a
            special token of the text has no counterpart, an option is invalid, or the cache lacks
            its tokenizer and `cache_tokenizer` is None.
        TeacherError: no tokenizer can be read at a given name or folder.
        CorpusError: a packed text in the cache's folder is damaged, or the student's tokenizer has
            no token that can separate documents.
        IdentityMismatchError: `cache_tokenizer` is not the tokenizer of the cache, or `out`
            contains a cache with other settings.
        CacheError: there is no cache, the cache is empty or of a masked language model, or `out`
            contains other files.
        CacheCorruptionError: a shard is damaged.
        StorageError: `cache` cannot be read, or `out` cannot be written.

    Examples:
        >>> from transformers import AutoTokenizer
        >>> teachers = AutoTokenizer.from_pretrained("my-cache/tokenizer")
        >>> texts = ["the text that the student's vocabulary is made for"] * 20
        >>> students = teachers.train_new_from_iterator(texts, 290, show_progress=False)
        >>> report = retokenize("my-cache", students, "student-cache")
        >>> report.with_target > 0
        True
    """
    source = Cache.open(cache)
    old = source.identity
    if old.objective is not None:
        raise CacheError(
            f"the cache at {cache} is of a masked language model, whose targets are of single "
            "tokens and cannot be retokenized; give a cache of a causal model"
        )
    if not len(source):
        raise CacheError(f"the cache at {cache} has no finished shard; build it first")
    if elsewhere not in ("text", "none"):
        raise InvalidArgumentError(f"elsewhere is {elsewhere!r}; expected 'text' or 'none'")
    followed = require_whole("followed", followed, 0)
    if not Cache.exists(out):
        require_room(out)
    elif window is None:  # the default depends on the windows built so far
        window = Cache.open(out).identity.window_length
    theirs, ours = _loaded(cache, cache_tokenizer), _named(tokenizer)
    require_tokenizer(
        theirs, old.tokenizer, source.recorded_tokenizer(), whose="the cache tokenizer"
    )
    convert, packing = conversion(
        old, theirs, ours, special=special, followed=followed, elsewhere=elsewhere
    )
    teacher, student, images = convert.teacher, convert.student, convert.special
    window = _window_length(source, convert) if window is None else window
    packing = replace(packing, window_length=window)
    length = packing.window_length
    hashed = tokenizer_fingerprint(ours)
    described = {
        str(i): own.decode() if isinstance(own, bytes) else own for i, own in images.items()
    }
    made_from = {
        "cache": old.fingerprint,
        "rule": RULE,
        "followed": followed,
        "elsewhere": elsewhere,
        "special": hashlib.sha256(canonical_json(described)).hexdigest(),
        "bos": convert.bos_id,
    }
    target = Cache.create(out, _identity(old, packing, str(hashed), student.size, made_from))
    how = {**made_from, "tokenizer": str(hashed), "window": length}
    texts = [
        replace(text, fingerprint=text_fingerprint(_source(text.fingerprint, how)))
        for text in named_texts(source.storage)
    ]
    for text in texts:
        claim_text(target.storage, text)
    if not is_url(out):
        keep_tokenizer(ours, out)
        if not is_url(cache):
            _write_texts(Path(cache), Path(out), convert, packing, str(hashed), how)
    tally = _Tally(length)
    _write_shards(source, target, convert, tally, texts, hashed.record(), progress)
    names = tuple(own for i, own in teacher.special.items() if i not in images)
    return replace(tally.report, windows=len(source), window_length=length, unmapped=names)


# -- settings --------------------------------------------------------------------------------------


def conversion(
    old: Identity,
    theirs: Any,
    ours: Any,
    *,
    special: Mapping[str, str] | None = None,
    followed: int = FOLLOWED,
    elsewhere: Literal["text", "none"] = "text",
) -> tuple[Retokenizer, Packing]:
    """Return the retokenizer for a cache's windows, and the packing of the new windows.

    `window_length` of the packing is a placeholder, which the caller replaces. Arguments and errors
    that are not listed are those of `retokenize`.

    Args:
        old: identity of the cache.
        theirs: tokenizer of the cache.
        ours: tokenizer of the student.
    """
    teacher = TokenBytes(theirs, "the tokenizer of the cache")
    student = TokenBytes(ours, "the student's tokenizer")
    student.require_lossless()
    packing, images, bos = _packing(old, ours, teacher, student, special or {})
    made = Retokenizer(teacher, student, images, bos, followed, elsewhere, width=old.vocab_size)
    return made, packing


def _named(tokenizer: Any) -> Any:
    """Return a tokenizer; load the tokenizer if a name or folder is given."""
    return load_tokenizer(str(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer


def _loaded(cache: Location, tokenizer: Any) -> Any:
    """Return the tokenizer of a cache. Raises InvalidArgumentError if it is unknown."""
    if tokenizer is not None:
        return _named(tokenizer)
    folder = None if is_url(cache) else Path(cache) / TOKENIZER_FOLDER
    if folder is None or not folder.is_dir():
        raise InvalidArgumentError(
            f"the cache at {cache} does not contain its tokenizer; give the tokenizer of the "
            "teacher (--cache-tokenizer)"
        )
    return load_tokenizer(str(folder))


def _packing(
    old: Identity,
    tokenizer: Any,
    teacher: TokenBytes,
    student: TokenBytes,
    given: Mapping[str, str],
) -> tuple[Packing, dict[int, int | bytes], int | None]:
    """Return the packing of the new windows, the images of special tokens, and the id to insert.

    The image of a special token is, by precedence: the given one; for the separator and the
    beginning-of-text token of the cache, that of the student; the student's special token of equal
    text; that of equal role. The id is inserted before each document; None inserts nothing.
    """
    separator = old.packing.get("separator_id")
    theirs, bos = old.packing.get("bos_id"), student.bos_id
    ids = {name: i for i, name in student.special.items()}
    images: dict[int, int | bytes] = {
        teacher.roles[role]: student.roles[role]
        for role in reversed(ROLES)  # the first role of a token takes precedence
        if role in teacher.roles and role in student.roles
    }
    images |= {i: ids[name] for i, name in teacher.special.items() if name in ids}
    named = {name: i for i, name in teacher.special.items()}
    ends = given.get(teacher.special.get(-1 if separator is None else separator, ""), "")
    packing = packing_for(tokenizer, window_length=2, separator_id=ids.get(ends))
    if separator is not None:
        images[separator] = packing.separator_id
    if theirs is not None and theirs != separator:
        images[theirs] = b"" if bos is None else bos
    for name, image in given.items():
        if name not in named or (image and image not in ids):
            whose = "cache" if name not in named else "student"
            raise InvalidArgumentError(
                f"special: {name!r} is mapped to {image!r}, but "
                f"{(name if whose == 'cache' else image)!r} is not a special token of the {whose}; "
                "give special tokens as they are written in tokenizer.json"
            )
        images[named[name]] = ids[image] if image else name.encode()
    packing = replace(
        packing,
        bos_id=bos,
        reset_attention=bool(old.packing.get("reset_attention")),
        holdout=float(old.packing.get("holdout") or 0.0),
    )
    return packing, images, bos if theirs is None else None


def _identity(
    old: Identity, packing: Packing, tokenizer: str, vocab_size: int, made_from: dict[str, Any]
) -> Identity:
    """Return the identity of the new cache."""
    codec = dict(old.codec)
    if old.sampler.get("name") == Threshold.name:  # mapped weights may be below tau
        codec = {"name": NAME, "version": ROUNDED, "weights": "float32", "rounding": STOCHASTIC}
    packed = packing.to_json()
    del packed["window_length"]
    kept = {name: own for name, own in old.packing.items() if name not in ("kind", "padding_id")}
    return replace(
        old,
        teacher={**old.teacher, "retokenized": made_from},
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        token_mask="all",
        window_length=packing.window_length,
        packing={**kept, **packed},
        codec=codec,
    )


def _source(of: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a retokenized text, given the fingerprint of the original text."""
    return {"fingerprint": of, "retokenized": dict(how)}


def _window_length(cache: Cache, convert: Retokenizer) -> int:
    """Return the default number of the student's tokens per window."""
    lengths = []
    for i in spread(len(cache), _PILOT_WINDOWS):
        record = _without_padding(cache.read(i), cache.identity)
        own = convert.align(record.tokens.tolist(), record.document_starts.tolist(), record.mask)
        lengths.append(len(own.tokens))
    longest = float(max(lengths))
    if cache.identity.packing.get("kind") != "documents":  # documents vary too much for this bound
        longest = min(longest, _MOST_PADDING * float(np.mean(lengths)))
    return max(2, -(-int(np.ceil(longest)) // _MULTIPLE) * _MULTIPLE)


# -- windows ---------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Numbers of converted tokens, counted window by window.

    Args:
        length: number of tokens per window.
        report: counts of the windows so far.
    """

    length: int
    report: RetokenizeReport = RetokenizeReport()

    def add(self, aligned: Aligned) -> None:
        """Count a window."""
        known, count = self.report, min(len(aligned.tokens), self.length)
        learnt, source = aligned.learnt[: count - 1], aligned.source[: count - 1]
        drawn = int((learnt & (source >= 0)).sum())
        self.report = replace(
            known,
            tokens=known.tokens + count,
            with_target=known.with_target + drawn,
            without_target=known.without_target + int(learnt.sum()) - drawn,
            padding=known.padding + self.length - count,
            cut_tokens=known.cut_tokens + len(aligned.tokens) - count,
            left_out_bytes=known.left_out_bytes + aligned.left_out,
            text_bytes=known.text_bytes + aligned.text_bytes,
        )


def _without_padding(record: WindowRecord, identity: Identity) -> WindowRecord:
    """Return a record of the cache without the padding at the end of its window."""
    starts, kind = record.document_starts, identity.packing.get("kind")
    end = text_length(kind, starts, len(record.tokens))
    if end is None:
        return record
    return replace(
        record,
        tokens=record.tokens[:end],
        document_starts=starts[starts < end],
        mask=None if record.mask is None else record.mask[:end],
        targets=record.targets[:end],
    )


def _padded(
    convert: Retokenizer, aligned: Aligned, packing: Packing, index: int, *, carried: bool
) -> Window:
    """Return a window of the student's tokens; padding is a document without targets.

    Args:
        convert: the conversion.
        aligned: the alignment of the teacher's window.
        packing: packing of the new windows.
        index: index of the window.
        carried: whether the mask excludes positions without a target, in addition to those without
            a label.
    """
    length = packing.window_length
    count = min(len(aligned.tokens), length)
    tokens = np.full(length, packing.separator_id, np.int32)
    tokens[:count] = aligned.tokens[:count]
    starts = aligned.starts[aligned.starts < count]
    if count < length:
        starts = np.append(starts, count).astype(np.int32)
    mask = np.zeros(length, np.bool_)
    mask[:count] = (convert.carries(aligned) if carried else aligned.learnt)[:count]
    mask[count - 1 :] = False
    return Window(index, tokens, starts, mask)


def _record(
    convert: Retokenizer, aligned: Aligned, packing: Packing, old: WindowRecord, seed: int
) -> WindowRecord:
    """Return the record of a window in the student's tokens."""
    window = _padded(convert, aligned, packing, old.window_index, carried=True)
    mask = window.mask
    assert mask is not None
    uniforms = convert.uniforms(aligned, seed % 2**64, old.window_index)
    made = convert.targets(aligned, old.tokens.tolist(), old.targets, uniforms)
    made = made[: packing.window_length]
    lengths = np.zeros(packing.window_length, np.int64)
    lengths[: len(made)] = made.entries_per_position.numpy()
    kept = np.repeat(mask[: len(made)], lengths[: len(made)])
    lengths[~mask] = 0
    targets = SparseTargets(
        made.ids[kept],
        made.weights[kept],
        offsets_from_lengths(torch.from_numpy(lengths)),
        made.vocab_size,
        counts=None if made.counts is None else made.counts[kept],
        rounds=made.rounds,
    )
    reset = packing.reset_attention

    def labelled(own: Window | WindowRecord) -> int:
        starts = own.document_starts if reset else None
        return int((CAUSAL.labels(own.tokens, own.mask, starts) != IGNORE_INDEX).sum())

    uncut = replace(packing, window_length=max(packing.window_length, len(aligned.tokens)))
    whole = _padded(convert, aligned, uncut, old.window_index, carried=False)
    return WindowRecord(
        window_index=old.window_index,
        tokens=window.tokens,
        document_starts=window.document_starts,
        mask=mask,
        targets=targets,
        # the loss on the same text, per token of the student
        teacher_loss=old.teacher_loss * labelled(old) / max(1, labelled(whole)),
        teacher_entropy=0.0,  # the entropy of the image is unknown
    )


def _write_shards(
    source: Cache,
    target: Cache,
    convert: Retokenizer,
    tally: _Tally,
    texts: list[TextSpan],
    tokenizer: dict[str, Any],
    progress: Progress | None,
) -> None:
    """Write every shard that the new cache lacks, and count the tokens of all windows."""
    packing = Packing(
        target.identity.window_length,
        **{
            name: target.identity.packing[name]
            for name in ("separator_id", "bos_id", "reset_attention")
        },
    )
    done, total = 0, len(source)
    for start, stop in source.finished():
        existing = target.holds((start, stop))
        records = []
        for place in range(done, done + stop - start):
            old = _without_padding(source.read(place), source.identity)
            aligned = convert.align(old.tokens.tolist(), old.document_starts.tolist(), old.mask)
            tally.add(aligned)
            if not existing:
                records.append(_record(convert, aligned, packing, old, source.identity.seed))
            if progress is not None:
                progress(place + 1, total)
        done += stop - start
        if existing:
            continue
        windows = [Window(r.window_index, r.tokens, r.document_starts, r.mask) for r in records]
        text = next((own for own in texts if own.holds((start, stop))), None)
        provenance = {
            "corpus": fingerprint(windows),
            **({} if text is None else {"text": text.to_json()}),
            "sparselogits": version("sparselogits"),
            "tokenizer": tokenizer,
            "retokenized": source.provenance(start).get("corpus"),
        }
        target.commit(records, provenance)


# -- the packed text -------------------------------------------------------------------------------


def _write_texts(
    cache: Path, out: Path, convert: Retokenizer, packing: Packing, tokenizer: str, how: Any
) -> None:
    """Write the packed texts of a cache in the student's tokens, with the same hold-out."""
    for folder in packed_texts(cache):
        paths = Paths(out / folder.name)
        if paths.index.exists():
            continue
        corpus = PackedCorpus.open(folder)
        paths.clear()
        source = {"name": corpus.source_name, **_source(corpus.text_fingerprint, how)}
        made_from = {
            "format": 1,
            "packing": packing.to_json(),
            "source": source,
            "tokenizer": tokenizer,
            "vocab_size": convert.student.size,
        }
        write_whole(paths.made_from, canonical_json(made_from))
        training, frequencies = _write_stream(
            paths.training, _windows(corpus, convert, packing, held_out=False), convert.student.size
        )
        held_out, _ = _write_stream(
            paths.holdout, _windows(corpus, convert, packing, held_out=True), convert.student.size
        )
        with writing_parquet(paths.frequencies, pa.schema([("count", pa.int64())])) as file:
            file.write_table(pa.table({"count": frequencies}))
        summary = replace(
            corpus.summary,
            tokens=training,
            dropped_tokens=0,
            holdout_tokens=held_out,
            holdout_dropped_tokens=0,
        )
        index = {"training": [training], "holdout": [held_out], "summary": asdict(summary)}
        write_whole(paths.index, canonical_json(index))  # marks the text as complete


def _windows(
    corpus: PackedCorpus, convert: Retokenizer, packing: Packing, *, held_out: bool
) -> Iterator[Window]:
    """Yield the windows of a packed text in the student's tokens."""
    read = corpus.read_holdout if held_out else corpus.read
    for index in range(corpus.holdout_windows if held_out else corpus.windows):
        window = read(index, index + 1)[0]
        end = len(window.tokens) if window.text_length is None else window.text_length
        starts = window.document_starts[window.document_starts < end].tolist()
        mask = None if window.mask is None else window.mask[:end]
        aligned = convert.align(window.tokens[:end].tolist(), starts, mask)
        yield _padded(convert, aligned, packing, index, carried=not held_out)


def _write_stream(folder: Path, windows: Iterable[Window], vocab_size: int) -> tuple[int, Any]:
    """Write windows as one part of a stream; return the number of tokens and the counts per id."""
    folder.mkdir(parents=True, exist_ok=True)
    total, frequencies = 0, np.zeros(vocab_size, np.int64)
    with writing_part(folder / part_name(0), vocab_size, masked=True) as part:
        for window in windows:
            starts = np.zeros(len(window.tokens), np.bool_)
            starts[window.document_starts] = True
            assert window.mask is not None
            learnt = CAUSAL.at_tokens(window.mask, False)
            part.counts.documents += len(window.document_starts)
            part.append(window.tokens.astype(np.int64), learnt=learnt, starts=starts)
            frequencies += np.bincount(window.tokens, minlength=vocab_size)
            total += len(window.tokens)
    return total, frequencies
