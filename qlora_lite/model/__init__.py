"""The model in memory: load the frozen base, attach an adapter, compute attention and loss.

    load.py             load a base folder and its tokenizer
    weights.py          put the tensors of a folder into an empty model
    meta.py             a whole model on the meta device, for rehearsals
    random_model.py     a model with random values, for measurements
    dtypes.py           the table of number types by device
    adapter.py          attach, load and save an adapter
    adapter_config.py   `adapter_config.json`, checked
    factors.py          the saved factors of an adapter folder
    int8_factors.py     factors in 8 bits
    tuned_linear.py     a frozen linear layer with its factors: one product, rounded once
    frozen_int8.py      a frozen linear layer with an int8 weight
    dora.py             row scales of DoRA
    new_tokens.py       rows of new special tokens
    products.py         16-bit products with an fp32 result
    attention.py        attention over packed sequences, and over padded batches
    tree_attention.py   attention over a packed prefix tree
    chunk_attention.py  attention of a chunk of a sequence, over stored keys and values
    policy.py           where the parts of a model wait, as one value
    residency.py        layers over chunks of tokens, and homes for inputs, weights, keys and values
    streaming.py        frozen weights that come to the device when they are needed
    host_tensors.py     tensors in host memory, and copies in both directions
    forward.py          one packed sequence through the decoder
    head.py             the loss without a full logits tensor
    trained.py          the trained parameters as files
    resident.py         the tensors in memory before the first step

Importing this package imports no torch.
"""
