"""Everything that is to be known of a GPU, in one call of ``benchmarks/gpu/run.py``.

`plan` says what is measured, `parts` measures it, each part in a process of its own that `run` starts, watches and
ends; `notes` keeps what came out, `report` shows it. Pictures aside, nothing here needs more than torch, numpy and
networkx.
"""
