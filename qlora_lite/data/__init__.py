"""data: from a SQuAD file to micro-batches of token ids.

    squad.py     file -> QuestionRow...      every bad row counted and named
    template.py  QuestionRow -> Encoded      the tokenizer's chat template; labels by position
    examples.py  file -> Examples            tokenized once, kept in Arrow on disk, memory-mapped
    batches.py   Examples -> Batch...        which rows make step n, packed without padding
    inspect.py   Examples -> DataReport      what `check` shows, no weights needed

The next stages get `Examples`, `StepSampler` and `Batch`.
"""
