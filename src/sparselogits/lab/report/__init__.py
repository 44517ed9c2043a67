"""Pages for people: a window of a cache, tables and curves; each one self-contained HTML file."""

from sparselogits.lab.report.comparison import write_report
from sparselogits.lab.report.serve import PREFIX, PageServer
from sparselogits.lab.report.view import view_page
from sparselogits.lab.report.walkthrough import Continuation, Walkthrough, write_walkthrough
from sparselogits.lab.report.window import WindowView, WindowViewer

__all__ = [
    "PREFIX",
    "Continuation",
    "PageServer",
    "Walkthrough",
    "WindowView",
    "WindowViewer",
    "view_page",
    "write_report",
    "write_walkthrough",
]
