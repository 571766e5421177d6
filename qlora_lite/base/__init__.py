"""base: `model.base` of a recipe -> a folder of safetensors, and the quantized base made from it.

Only hub.py and shipped.py open a connection, and only bnb.py imports bitsandbytes.

    source.py               folder, .gguf file, shipped or hub name -> a folder of 16-bit safetensors
    hub.py                  download of a hub model; the only file that connects to the hub
    shipped.py              download of the small model that comes through pip
    gguf_folder.py          .gguf file -> a safetensors folder in the cache
    gguf_head.py            checks on the head of a .gguf file before a library reads it
    tensor_files.py         the safetensors files of a folder, opened and checked
    published.py            tensors of a published checkpoint by the names of the model's modules
    finite.py               refusal of NaN and infinite weights
    quantization.py         nf4, fp4 and int8 storage of one weight
    artefact.py             the quantized base as a folder in the cache
    companions.py           tokenizer, templates and licence, copied beside the weights
    generation_settings.py  stop tokens in generation_config.json
    identity.py             hashes of config, tokenizer and chat template
    skeleton.py             the model without weights in memory
    bnb.py                  bitsandbytes, and the workaround for its in-place repacking
    known.py                well-known models by short names, for plans without files
    known_shapes.py         the table of their shapes
"""
