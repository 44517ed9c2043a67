"""Define `sparselogits draft-vocabulary`, which chooses the vocabulary of a draft model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sparselogits.cli.options import DATA, OUTPUT, CacheArgument, Json, print_json, print_next
from sparselogits.console import messages, results, stage
from sparselogits.errors import CacheError, InvalidArgumentError
from sparselogits.wording import counted


def draft_vocabulary(
    cache: CacheArgument,
    size: int = DATA("Number of ids in the draft vocabulary.", ..., min=1),
    by: Literal["text", "teacher"] = DATA(
        "text: the ids that occur most often in the training text. teacher: the ids with the "
        "largest mean probability under the teacher, estimated from cached targets, which the "
        "prompts of conversations do not have.",
        "text",
    ),
    keep: list[int] | None = DATA(
        "Id that is always in the vocabulary, as the separator of documents is. May be repeated.",
        shown="the separator alone",
    ),
    windows: int = DATA(
        "Number of cached windows from which the teacher's probabilities are estimated.", 256, min=1
    ),
    out: Path = OUTPUT(
        "A file NAME.safetensors for the tensors d2t and t2d, or a folder for d2t.npy and t2d.npy.",
        ...,
    ),
    as_json: Json = False,
) -> None:
    """Choose the draft ids for speculative decoding, and write their mapping to teacher ids."""
    import torch

    from sparselogits.caching import fetch_texts
    from sparselogits.caching.text import packed_texts
    from sparselogits.corpus import PackedCorpus
    from sparselogits.data import DraftVocabulary, teacher_mass
    from sparselogits.store import Cache

    opened = Cache.open(cache)
    if not len(opened):
        raise CacheError(
            f"the cache at {cache} has no finished shard yet; run `sparselogits cache` to build it"
        )
    corpora = [PackedCorpus.open(folder) for folder in packed_texts(fetch_texts(cache))]
    vocab_size = opened.identity.vocab_size
    if any(corpus.vocab_size != vocab_size for corpus in corpora):
        raise CacheError(
            f"the packed text of the cache at {cache} was made for another vocabulary than the "
            f"{vocab_size} ids of the targets: the files are of different caches. Restore them"
        )
    if by == "text" and not corpora:
        raise InvalidArgumentError(
            f"the cache at {cache} has no packed text with token frequencies; use --by teacher"
        )
    with stage("reading targets", "windows") as update:
        mass = teacher_mass(opened, windows=windows, progress=update)
    frequencies = sum((torch.tensor(corpus.token_frequencies) for corpus in corpora), mass * 0)
    separator = opened.identity.packing.get("separator_id")
    fixed = {*(keep or ()), *([separator] if isinstance(separator, int) else ())}
    scores = mass if by == "teacher" else frequencies
    draft = DraftVocabulary.most_frequent(scores, size, keep=sorted(fixed))
    draft.identity_of(opened.identity)  # rejects caches of masked models
    draft.save(out)
    of_teacher, unused = draft.coverage(mass), int((scores[draft.ids] == 0).sum())
    of_text = draft.coverage(frequencies) if corpora else None
    if as_json:
        print_json(
            {
                "ids": len(draft),
                "vocab_size": draft.vocab_size,
                "unused": unused,
                "share_of_text": of_text,
                "share_of_teacher": of_teacher,
                "fingerprint": draft.fingerprint,
                "out": str(out),
            }
        )
        return
    text = "" if of_text is None else f"{of_text:.2%} of the tokens of the training text, "
    results().print(
        f"{out}: {len(draft):,} of {counted(draft.vocab_size, 'id')}, with {text}{of_teacher:.2%} "
        f"of the teacher's probability (at {counted(min(windows, len(opened)), 'window')}), which "
        "the acceptance of a drafter cannot exceed",
        soft_wrap=True,
    )
    spare = unused - int((scores[list(fixed)] == 0).sum())
    if spare:
        messages.print(
            f"{counted(spare, 'id')} of them did not occur; a smaller --size is sufficient",
            soft_wrap=True,
        )
    drafter = ("--student-config", "tiny", "--draft-vocabulary", out)
    print_next("train", "--cache", cache, *drafter, "--out", "my-drafter")
