"""Tables and curves as one self-contained HTML page."""

from sparselogits.report.page import Curve, Page, Row, write_page

__all__ = ["Curve", "Page", "Row", "write_page"]
