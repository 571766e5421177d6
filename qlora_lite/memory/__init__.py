"""Memory: count it, measure it, and find the limits of the machine.

ledger.py           count storages while tensor code runs, on meta or real tensors
meta_operators.py   remembered results of operators on meta tensors, for fast rehearsals
measuring.py        measured peaks of a step: allocator events, RSS
anonymous.py        peak anonymous host memory of a stage
host.py             free memory of the machine, and processor time of other programs
kept.py             stored results of `doctor --measure`
"""
