"""data: data files -> micro-batches of token ids.

Terms: a row is one line of data; an example is a tokenized row, or one of several that a row makes; a packed sequence is
the concatenation of examples in one `Batch`. The next stages get `Examples`, `StepSampler` and `Batch`.

    files.py           path -> open file, hash                        one clear error for any unreadable file
    tables.py          file -> dict per row                           jsonl, json, csv, Parquet, saved folders; streamed
    csv_rows.py        csv file -> header and rows                    delimiter, encoding and quotes
    json_stream.py     JSON file -> events and values                 streamed, within limits
    json_documents.py  one JSON object -> rows                        in the shapes that libraries write
    columns.py         rows -> format                                 by majority; small differences in column names
    formats.py         dict -> Conversation, QuestionRow, Document    six formats
    squad.py           SQuAD, nested or in columns -> QuestionRow
    turn_flags.py      flags of a turn -> trained or not              such as weight: 0
    rows.py            the row types, and their content hash
    read.py            files with weights -> Mix of rows              every bad row counted and named
    prompts.py         question -> user message                       the same in training, evaluation and `ask`
    template.py        Conversation -> Encoded                        the tokenizer's chat template; labels by position
    spelling.py        special tokens spelled in text                 kept as ordinary characters
    limited.py         time and memory limits for chat templates
    fit.py             row, max_seq_length -> Example...              cut, split or dropped
    examples.py        Mix -> Examples                                tokenized once, stored as Arrow, memory-mapped
    repeats.py         Examples -> Repeats                            identical rows, counted
    trees.py           Examples -> Forest                             shared prefixes, found from the tokens
    batches.py         Examples -> Batch...                           the examples of step n, packed without padding
    inspect.py         Mix -> DataReport                              the output of `check`; needs no weights
"""
