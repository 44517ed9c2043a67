"""Define `sparselogits view`, which shows a window of a cache as a web page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparselogits.cli.models import load_cache_teacher, load_student
from sparselogits.cli.options import (
    DATA,
    MODEL,
    MODEL_NAMES,
    OUTPUT,
    Allow,
    CacheArgument,
    Device,
    Dtype,
    print_next,
)
from sparselogits.console import messages, results
from sparselogits.devices import resolve_device

if TYPE_CHECKING:
    from sparselogits.lab.report import WindowViewer


def view(
    cache: CacheArgument,
    window: int = DATA("Index of the window to show.", 0, min=0),
    teacher: str | None = MODEL(
        f"Teacher of the cache, to show the full distribution: {MODEL_NAMES}.",
        shown="cached entries only",
    ),
    student: str | None = MODEL(
        "Student to show next to the teacher: the folder of a run, a model folder or a hub name.",
        shown="no student",
    ),
    tokenizer: str | None = MODEL(
        "Tokenizer that decodes ids: a model folder, GGUF file or hub name.", shown="the teacher's"
    ),
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Path | None = OUTPUT("HTML file to write.", shown="window-N.html"),
    serve: bool = OUTPUT(
        "Serve pages of all windows on 127.0.0.1 instead of writing a file.", False, "--serve"
    ),
    port: int = OUTPUT("Port for --serve; 0 selects a free port.", 0, min=0, max=65535),
    allow: Allow = None,
) -> None:
    """Show the text of a window, with the predicted distribution of each token, as a web page."""
    from sparselogits.files import require_file_or_nothing, write_whole
    from sparselogits.lab.report import PREFIX, PageServer, view_page

    path = out or Path(f"window-{window}.html")
    if not serve:
        require_file_or_nothing(path)
    viewer = _viewer(cache, window, teacher, student, tokenizer, dtype, resolve_device(device))
    rounds = viewer.dataset.identity.sampler.get("rounds")
    if serve:

        def page(number: int) -> str:
            return view_page(viewer.view(number), rounds=rounds, link=f"{PREFIX}{{}}")

        with PageServer(page, first=window, port=port) as server:
            try:
                results().print(f"{server.address}  (Ctrl-C ends it)", soft_wrap=True)
                server.serve_forever()
            except KeyboardInterrupt:
                messages.print()
        return
    text = view_page(viewer.view(window), rounds=rounds)
    write_whole(path, text)
    results().print(str(path), soft_wrap=True)
    print_next(otherwise=f"open {path} in a browser")


def _viewer(
    cache: str,
    window: int,
    teacher: str | None,
    student: str | None,
    tokenizer: str | None,
    dtype: str,
    device: str,
) -> WindowViewer:
    """Return a viewer with the models to show, after validating window and names of models."""
    from sparselogits.data import CacheDataset
    from sparselogits.lab.report import WindowViewer
    from sparselogits.teacher.loading import load_tokenizer, locate_model

    dataset = CacheDataset(cache)
    WindowViewer(dataset, tokenizer=None).require(window)
    for name in (teacher, student):
        if name is not None:
            locate_model(name)  # reports a missing path before a model is loaded
    named = tokenizer or teacher
    decoder = None if named is None else load_tokenizer(named)
    if decoder is None:
        messages.print("tokens are shown as ids; name the teacher's tokenizer with --tokenizer")
    engine, learner = None, None
    if teacher is not None:
        engine = load_cache_teacher(teacher, dataset.identity, device, dtype=dtype)
    if student is not None:
        learner = load_student(student, device)
    return WindowViewer(dataset, tokenizer=decoder, teacher=engine, student=learner)
