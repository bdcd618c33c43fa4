"""Reports: self-contained HTML pages, and the pictures in them."""

from merging.report.page import Page

__all__ = ["Page"]
