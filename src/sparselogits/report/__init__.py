"""Pages for people: a window of a cache, tables and curves; each one self-contained HTML file."""

from sparselogits.report.comparison import write_report
from sparselogits.report.serve import PREFIX, PageServer
from sparselogits.report.view import view_page
from sparselogits.report.walkthrough import Continuation, Trained, Walkthrough, write_walkthrough
from sparselogits.report.window import WindowView, WindowViewer

__all__ = [
    "PREFIX",
    "Continuation",
    "PageServer",
    "Trained",
    "Walkthrough",
    "WindowView",
    "WindowViewer",
    "view_page",
    "write_report",
    "write_walkthrough",
]
