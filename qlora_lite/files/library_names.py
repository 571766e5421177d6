"""Names that other libraries gave: of files in a folder of transformers or peft, and of the tensors of an adapter."""

# A model folder of transformers.
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # the file of each tensor, where there are several
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # endings of weights that run code when they are read

# An adapter folder of peft.
ADAPTER_CONFIG_FILE = "adapter_config.json"
FACTORS_FILE = "adapter_model.safetensors"
# Values of init_lora_weights that keep the base: PiSSA, OLoRA, LoftQ, CorDA change it.
STARTS_ON_BASE = (True, False, "gaussian", "eva", "orthogonal")

# A tensor of an adapter: PREFIX, the module's name in the base, one of these, and `weight` (in a live model `default.weight`).
PREFIX = "base_model.model."
A_FACTOR, B_FACTOR = ".lora_A.", ".lora_B."
MAGNITUDE = ".lora_magnitude_vector"  # in a file the name ends here
WHOLE_MODULE = ".modules_to_save.default"  # in a live model; a file omits it
ADDED_ROWS = ".token_adapter.trainable_tokens_delta"  # in a file the name ends here


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of a live model belongs to its adapter, not to the base."""
    return any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_delta."))


def is_named(module: str, name: str) -> bool:
    """Whether `name`, as in peft's target_modules, means this module: its whole name, or the end of it after a dot."""
    return module == name or module.endswith(f".{name}")
