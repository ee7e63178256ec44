"""How fast a step is, beside what others need for the same mathematics and beside the speed of memory itself.

`cases` says what is timed, `contenders`, `formulations` and `peers` who takes part, `comparison` who is equal to the
reference and may be timed, `timing` how; `results`, `report` and `pictures` keep and show what came out.
"""
