"""The report of a sweep: tables, pictures and a page, the same for the same runs whenever and wherever it is made."""

from __future__ import annotations

from gut_fast.study.report.study import Study, gather
from gut_fast.study.report.write import Source, write_report

__all__ = ["Source", "Study", "gather", "write_report"]
