"""data: from data files to micro-batches of token ids.

    files.py, json_stream.py   path -> bytes, JSON events       one clear error for whatever a file holds
    tables.py    file -> dict per row                           jsonl, json, csv, Parquet, saved folders; streamed
    formats.py   dict -> Conversation, QuestionRow, Document    (rows.py); squad.py knows SQuAD, nested and in columns
    read.py      files with weights -> Mix of rows              every bad row counted and named
    prompts.py   question -> the user's message                 the same in training, evaluation and `ask`
    template.py  Conversation -> Encoded                        the tokenizer's chat template; labels by position
    fit.py       row, max_seq_length -> Example...              what may be cut, and what is dropped instead
    examples.py  Mix -> Examples                                tokenized once, kept in Arrow on disk, memory-mapped
    trees.py     Examples -> Forest                             what rows begin with in common, found from their tokens
    batches.py   Examples -> Batch...                           which rows make step n, packed without padding
    inspect.py   Mix -> DataReport                              what `check` shows, no weights needed

The next stages get `Examples`, `StepSampler` and `Batch`.
"""
