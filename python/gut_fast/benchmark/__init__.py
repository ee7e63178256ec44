"""How fast a step is, beside what others need for the same mathematics and beside the speed of memory itself.

`cases` says what is timed and `device` where, `peers` who takes part: `contenders` and `gpu_contenders` on our buffers,
`formulations` and `others` on their own. `comparison` says who is equal to the reference and may be timed, `timing`
how; `results`, `report` and `pictures` keep and show what came out. `gpu` is all of it in one call.
"""
