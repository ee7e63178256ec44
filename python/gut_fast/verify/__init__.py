"""The comparison that decides whether this installation computes what it should.

Every rule, backend, precision and instruction tier runs beside the reference, and the reference beside the published
forms. `lockstep` runs one problem and measures the error, `cases` lists the problems, `comparison` goes through all of
them, and ``gut-fast verify`` prints what it finds.
"""

from __future__ import annotations

from gut_fast.verify.comparison import Candidate, Request, Result, verify

__all__ = ["Candidate", "Request", "Result", "verify"]
