"""Write self-contained HTML pages: a window of a cache, a comparison, the demo's walkthrough."""

from sparselogits.lab.report.comparison import write_report
from sparselogits.lab.report.serve import PREFIX, PageServer
from sparselogits.lab.report.view import WindowView, WindowViewer, view_page
from sparselogits.lab.report.walkthrough import Continuation, Walkthrough, walkthrough_page

__all__ = [
    "PREFIX",
    "Continuation",
    "PageServer",
    "Walkthrough",
    "WindowView",
    "WindowViewer",
    "view_page",
    "walkthrough_page",
    "write_report",
]
