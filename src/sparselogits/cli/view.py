"""Define `sparselogits view`, which shows a window of a cache as a web page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparselogits.cli.models import load_own_teacher, load_student
from sparselogits.cli.options import (
    DATA,
    MODEL,
    MODEL_NAMES,
    OUTPUT,
    Allow,
    CacheArgument,
    Device,
    Dtype,
    device_named,
    say_next,
    stdout,
)
from sparselogits.console import messages

if TYPE_CHECKING:
    from sparselogits.lab.report import WindowViewer


def view(
    cache: CacheArgument,
    window: Annotated[
        int, typer.Option(min=0, help="Number of the window to show.", rich_help_panel=DATA)
    ] = 0,
    teacher: Annotated[
        str | None,
        typer.Option(
            help=f"Teacher of the cache, to show its whole distribution: {MODEL_NAMES}.",
            show_default="cached entries only",
            rich_help_panel=MODEL,
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="Student to show next to the teacher: a run's folder, a model folder or a hub "
            "name.",
            show_default="no student",
            rich_help_panel=MODEL,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer that turns ids into text: a model folder, GGUF file or hub name.",
            show_default="the teacher's",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write.", show_default="window-N.html", rich_help_panel=OUTPUT
        ),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Serve pages of all windows on 127.0.0.1 instead of writing a file.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Port for --serve; 0 takes a free one.", rich_help_panel=OUTPUT
        ),
    ] = 0,
    allow: Allow = None,
) -> None:
    """Show a window's text with the distribution that predicts each token, as a web page."""
    from sparselogits.files import require_file_or_nothing, write_whole
    from sparselogits.lab.report import PREFIX, PageServer, view_page

    path = out or Path(f"window-{window}.html")
    if not serve:
        require_file_or_nothing(path)
    viewer = _viewer(cache, window, teacher, student, tokenizer, dtype, device_named(device))
    rounds = viewer.dataset.identity.sampler.get("rounds")
    if serve:

        def page(number: int) -> str:
            return view_page(viewer.view(number), rounds=rounds, link=f"{PREFIX}{{}}")

        with PageServer(page, first=window, port=port) as server:
            try:
                stdout().print(f"{server.address}  (Ctrl-C ends it)", soft_wrap=True)
                server.serve_forever()
            except KeyboardInterrupt:
                messages.print()
        return
    text = view_page(viewer.view(window), rounds=rounds)
    write_whole(path, text)
    stdout().print(str(path), soft_wrap=True)
    say_next(otherwise=f"open {path} in a browser")


def _viewer(
    cache: str,
    window: int,
    teacher: str | None,
    student: str | None,
    tokenizer: str | None,
    dtype: str,
    device: str,
) -> WindowViewer:
    from sparselogits.data import CacheDataset
    from sparselogits.lab.report import WindowViewer
    from sparselogits.teacher.loading import load_tokenizer, locate_model

    dataset = CacheDataset(cache)
    WindowViewer(dataset, tokenizer=None).require(window)
    for name in (teacher, student):
        if name is not None:
            locate_model(name)  # before either is loaded
    named = tokenizer or teacher
    words = None if named is None else load_tokenizer(named)
    if words is None:
        messages.print("tokens are shown by number; --tokenizer names the teacher's tokenizer")
    engine, learner = None, None
    if teacher is not None:
        engine = load_own_teacher(teacher, dataset.identity, device, dtype=dtype)
    if student is not None:
        learner = load_student(student, device)
    return WindowViewer(dataset, tokenizer=words, teacher=engine, student=learner)
