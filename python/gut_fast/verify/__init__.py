"""Whether this installation computes what it should: every rule, backend, precision and instruction tier beside the
reference, and the reference beside the published forms.

`cases` says on which problems, `players` who solves them, `comparison` compares, `report` shows, `commands` is
``gut-fast verify``.
"""

from __future__ import annotations

from gut_fast.verify.comparison import Line, verify

__all__ = ["Line", "verify"]
