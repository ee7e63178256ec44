"""The benchmarks that a user runs: ``gut-fast bench step`` and ``gut-fast bench train``.

`timing` holds the one timer, `results` the one record and its tables. `step` compares and times one step of all agents
in a case of `cases` beside `peers`; `train` does the same for whole training steps. The scripts in the repository's
folder ``benchmarks/`` are built from these modules.
"""
