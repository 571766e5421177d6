"""files: reading files from other programs safely, and writing files that are complete or absent.

Knows nothing of models, data or runs, except names.

    text_file.py           bytes in any usual encoding, or gzip -> UTF-8 text
    json_text.py           JSON text -> plain values, with limits on depth
    names.py               file names given by other files, confined to their folder
    library_names.py       names of files and tensors that transformers and peft gave
    cache.py               where the cache is, and what is in it
    staging.py             files and folders written aside, synced and renamed; locks on folders
    made_once.py           one process makes a cache folder, the others wait for it
    manifest.py            sizes and SHA-256 hashes of a folder's files, written and verified
    safetensors_writer.py  safetensors written block by block, in shards
"""
