"""The verbs of the command line, one module per verb or option: a function of the verb's name returns a frozen dataclass, whose
`to_json_dict()` is the document of `--json`.

    fetch.py       download a model into the cache
    check.py       recipe, data, rendered rows, lengths; everything except training
    plan.py        memory by method, and sizes that fit
    train.py       plan, load, score, train, score, report
    evaluate.py    `eval`: exact match, F1 and loss of one model of a run
    scales.py      `eval --scales`: the same with the change at several scales
    merge.py       a 16-bit checkpoint with proof
    ask.py         a streamed answer
    ask_lines.py   `ask -`: one question per line from stdin
    mix.py         the weighted sum of adapters, written as one
    mixed.py       `ask --mix` and `merge --mix`: the sum, used and not kept
    rank.py        the spectrum of an adapter's change, and a recommended rank
    shorten.py     `rank --to`, `rank --parameters`: a shorter adapter and its cost
    try_ranks.py   `rank --try`: train a recipe with several ranks
    report.py      a run's tables and its page
    verify.py      every file of a run against its recorded hash
    doctor.py      the state of this machine for training
    overheads.py   `doctor --measure`: sizes and times that a plan cannot know
    scoring.py     score a model with a progress display, for several verbs
    compared.py    the share of an adapter's effect that another one loses
    stopping.py    signals, and the command that continues

Importing this package imports no torch: the command line imports the module of a verb when the verb runs.
"""
