"""Define `sparselogits retokenize`, which rewrites a cache for another tokenizer."""

from __future__ import annotations

from dataclasses import asdict

from sparselogits.cli.options import (
    DATA,
    MODEL,
    MODEL_NAMES,
    OUTPUT,
    TARGETS,
    Allow,
    CacheArgument,
    Json,
    TrustRemoteCode,
    optional_tokenizer,
    print_json,
    print_train_command,
)
from sparselogits.console import messages, results, stage
from sparselogits.errors import InvalidArgumentError
from sparselogits.wording import counted


def retokenize_command(
    cache: CacheArgument,
    tokenizer: str = MODEL(f"Tokenizer of the student: {MODEL_NAMES}.", ...),
    cache_tokenizer: str | None = MODEL(
        "Tokenizer of the teacher, for a cache that does not contain it.",
        shown="the tokenizer in the cache's folder",
    ),
    special: list[str] | None = MODEL(
        "Counterpart of a special token, as TEACHER=STUDENT, or TEACHER= to spell it as text. May "
        "be repeated.",
        shown="the token of equal text or role",
        metavar="A=B",
    ),
    trust_remote_code: TrustRemoteCode = False,
    window: int | None = DATA(
        "Tokens of the student per window; longer windows are cut, shorter ones are padded.",
        shown="from the lengths of 256 windows",
        min=2,
    ),
    followed: int = TARGETS(
        "Number of following tokens of the text whose cached draws are used where a token that the "
        "teacher drew may be the beginning of a longer token of the student, as ' wash' of "
        "' washed'. 0: each drawn token counts for the first student token of its own bytes, so "
        "that long tokens of the student get too little probability. Increase it for a teacher of "
        "bytes or characters.",
        4,
        min=0,
    ),
    elsewhere: str = TARGETS(
        "Target of positions where the tokenizers share no boundary. text: the token of the text, "
        "as in cross-entropy. none: no target and no loss.",
        "text",
    ),
    out: str = OUTPUT("Folder or URL of the new cache.", ...),
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Rewrite a cache for a student with another tokenizer, without running the teacher."""
    from sparselogits.caching import retokenize

    pairs = {}
    for given in special or ():
        name, _, pairs[name] = given.rpartition("=")
        if not name:
            raise InvalidArgumentError(
                f"--special is {given!r}; give TEACHER=STUDENT, two special tokens, or TEACHER= to "
                "spell the token as text"
            )
    with stage("retokenizing", "windows") as update:
        report = retokenize(
            cache,
            optional_tokenizer(tokenizer, trust_remote_code=trust_remote_code),
            out,
            cache_tokenizer=optional_tokenizer(
                cache_tokenizer, trust_remote_code=trust_remote_code
            ),
            window=window,
            special=pairs,
            followed=followed,
            elsewhere=elsewhere,  # type: ignore[arg-type]
            progress=update,
        )
    if as_json:
        print_json(asdict(report))
        return
    positions = report.with_target + report.without_target
    share = report.with_target / positions if positions else 0.0
    results().print(
        f"{counted(report.windows, 'window')} of {report.window_length} tokens; {share:.1%} of "
        f"{counted(positions, 'position')} with a target of the teacher"
    )
    if report.cut_tokens:
        messages.print(
            f"{counted(report.cut_tokens, 'token')} left out because windows were full; a larger "
            "--window keeps them"
        )
    if report.unmapped:
        messages.print(f"special tokens without counterpart: {', '.join(report.unmapped)}")
    print_train_command(out, windows=report.windows, masked=False, tokenizer=tokenizer)
