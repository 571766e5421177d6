"""Limits on files from other programs. Above a limit a reader stops with an error; docs/safety.md lists the limits.

Each limit is far above real files (the comments give their sizes), so a file beyond it is the wrong file or a hostile one.
"""

# Recipes and --set
RECIPE_BYTES = 2**20  # a recipe is a few thousand
RECIPE_DEPTH = 16  # a recipe needs 3: the file, a section, a list
RECIPE_VALUES = 20_000  # values and brackets; a recipe that names every layer of a 128-layer model has fewer than 2,000

# Rows
DATA_FILE_BYTES = 16 * 2**30  # all of SQuAD v2.0 is 42 MB; a larger file is more likely a mistake than a data set
ROW_BYTES = 64 * 2**20  # of the JSON or csv line of one row, and of one value in a JSON file
ROW_VALUES = 1_000_000  # values in one row, or in one passage of SQuAD with its questions
TEXT_CHARS = 1_000_000  # of one text in a row; the longest model contexts take about four million characters
COLUMNS = 10_000

# All JSON
JSON_BYTES = 64 * 2**20  # config.json has a few thousand, the index of a 405B model 100,000
JSON_DEPTH = 64  # SQuAD nests 8 deep, a tool's JSON schema rarely more than 10

# Model folders
LAYERS = 2_000  # the deepest published model has fewer than 200
WIDTH = 2**20  # hidden size, inner size, number of heads; the widest published one is 53,248
POSITIONS = 2**31 - 1  # and any other integer of a config
VOCABULARY = 2**24  # the largest published one is 262,208
TENSORS = 100_000  # in a folder or a GGUF; Llama 3.1 405B in NF4 has 6,000
SHARDS = 2_000  # Llama 3.1 405B has 191
TOKENIZER_BYTES = 256 * 2**20  # of one tokenizer file; Gemma 3's tokenizer.json has 33 MB
GGUF_KEYS = 10_000  # a GGUF has about 30
GGUF_DIMENSIONS = 4
ADAPTER_RANK = 65_536
PATTERN_CHARS = 500  # of a layer pattern in adapter_config.json

# Chat templates
TEMPLATE_CHARS = 2**20  # the longest published one has about 20,000
TEMPLATE_SECONDS = 5.0  # of processor time per conversation; ordinary templates take 0.0002
TEMPLATE_BYTES = 512 * 2**20  # of memory growth of the process while rendering one conversation
RENDERED_CHARS = 16 * TEXT_CHARS
