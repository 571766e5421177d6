"""The keys of a recipe: one frozen section per heading, each key with its type, range, default and meaning.

In: plain values (dict, str, int, float, bool, None, list). Out: a `Recipe`.
This file is the only list of the keys. The "expected ..., got ..." of an error, the JSON schema for editors and the
nearest valid key are all derived from it.

Types are strict: `true` is not a number and "16" is not 16; a whole number is a valid fraction.
`checks.py` refuses, by name, values that a section accepts but this version does not support.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, WithJsonSchema

from qlora_lite.recipe.reason import Reason
from qlora_lite.units import parse_budget

LARGEST_COUNT = 2**31 - 1  # no count in a recipe is larger; keeps every number exact in JSON and in int32 tensors


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _size_to_bytes(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return value
    try:
        return parse_budget(str(value))
    except OverflowError as error:
        raise ValueError("too large") from error


Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Text = Annotated[str, Field(pattern=r"\S")]
Names = Annotated[tuple[Text, ...], BeforeValidator(_list_to_tuple)]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(_list_to_tuple)]
Size = Annotated[
    int,
    BeforeValidator(_size_to_bytes),
    Field(ge=1),
    WithJsonSchema({"title": 'a size such as "24GiB"', "type": ["string", "integer"]}),
]


class Section(BaseModel):
    """One heading of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class ModelSection(Section):
    """The frozen base model, and how its weights are stored."""

    base: Text = Field(
        "smollm2-135m",
        description="The model to tune: a folder with config.json and safetensors, a .gguf file, a shipped name "
        "(smollm2-135m), or a hub name such as org/name that `qlora-lite fetch org/name` has downloaded. "
        "A relative path is looked up beside the recipe, then in the current folder.",
    )
    revision: Text | None = Field(
        None, description="Branch, tag or commit of a hub name; null: the one fetched last. The run records the commit."
    )
    quantization: Literal["nf4", "fp4", "int8", "none"] = Field(
        "nf4",
        description="How the frozen weights of method qlora are stored. nf4: 4 bits a weight (QLoRA section 3, arXiv "
        "2305.14314); fp4: 4 bits, less accurate; int8: 8 bits (arXiv 2208.07339); none: 16 bits, which is method lora.",
    )
    double_quant: bool = Field(
        True,
        description="Quantize the quantization constants too: 4.127 instead of 4.5 bits a weight "
        "(QLoRA section 3, arXiv 2305.14314).",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Type of the arithmetic. auto: bf16 if the device supports it; otherwise fp16 with fp32 factors on a card, "
        "fp32 on a CPU.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="Attention implementation, by its name in transformers. auto: sdpa."
    )


class LoraSection(Section):
    """The low-rank factors that are trained: W + scaling * B @ A (LoRA, arXiv 2106.09685)."""

    r: int = Field(16, ge=1, le=4096, description="Rank of the update: columns of B and rows of A.")
    lora_alpha: int = Field(
        32, ge=1, le=LARGEST_COUNT, description="The update is scaled by lora_alpha / r (with use_rslora / sqrt(r))."
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the factors' inputs set to zero during training; 0.0: none."
    )
    target_modules: Literal["all-linear"] | Names = Field(
        "all-linear",
        description="Which linear layers get factors: all-linear (every one but the output head, as in QLoRA section 4) "
        "or a list of names such as [q_proj, v_proj].",
    )
    use_rslora: bool = Field(
        False, description="Scale by lora_alpha / sqrt(r), which keeps large ranks learning (rsLoRA, arXiv 2312.03732)."
    )
    use_dora: bool = Field(False, description="Train magnitude and direction separately (DoRA, arXiv 2402.09353).")
    init_from: Text | None = Field(
        None,
        description="Adapter folder in PEFT's format, such as RUN_DIR/adapter, whose factors training starts from; r, "
        "lora_alpha, use_rslora and target_modules must equal the adapter's. null: B = 0, A random.",
    )
    modules_to_save: Names = Field(
        (),
        description="Layers trained as whole 16-bit weights and stored with the adapter, such as [lm_head]; []: none.",
    )


class DataFile(Section):
    """One of several files with training rows."""

    path: Text
    weight: float = Field(1.0, gt=0, le=1000)


def _to_data_files(value: object) -> object:
    """Expand a path in a list to the file with weight 1."""
    if not isinstance(value, list | tuple):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in value)


DataFiles = Annotated[
    tuple[DataFile, ...],
    BeforeValidator(_to_data_files),
    Field(min_length=1),
    WithJsonSchema(
        {
            "title": "a list of files, each a path or {path: ..., weight: ...}",
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {"type": "string", "pattern": r"\S"},
                    {
                        "type": "object",
                        "properties": {
                            "path": {"type": "string", "pattern": r"\S"},
                            "weight": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000},
                        },
                        "required": ["path"],
                        "additionalProperties": False,
                    },
                ]
            },
        }
    ),
]


class DataSection(Section):
    """The rows to train on and the rows to score."""

    train: Text | DataFiles = Field(
        "country_qa/train.json",
        description="Training rows: SQuAD JSON (arXiv 1606.05250, 1806.03822), or rows as json, jsonl, csv, Parquet or a "
        "folder saved by datasets; or a list of files, each a path or {path: ..., weight: ...}: weight 2 uses every row "
        "twice, 0.5 uses the same half of the rows in every epoch. "
        "A relative path is looked up beside the recipe, then in the current folder.",
    )
    eval: Text | None = Field(
        "country_qa/test.json",
        description="Held-out rows for the scores and for the proof of the merge; null: no evaluation.",
    )
    format: Literal["auto", "squad", "chat", "sharegpt", "prompt_completion", "alpaca", "text"] = Field(
        "auto", description="Format of the data files. auto: recognized from the columns of each file."
    )
    max_seq_length: Auto | Annotated[int, Field(ge=2, le=LARGEST_COUNT)] = Field(
        "auto",
        description="Longest example in tokens, question and answer included. In longer rows, contexts are shortened and texts split; "
        "other longer rows are left out; all of them are counted. auto: chosen from the rows. Fewer tokens need less memory.",
    )
    num_train: Count | None = Field(
        600,
        description="Number of training rows to use, starting at the first; with several files, in proportion to the rows of each. "
        "null: all.",
    )
    special_tokens: Names = Field(
        (),
        description="Strings that become one token each, such as [<|tool|>]. Embedding and head rows that the model lacks for them "
        "are added and trained with the adapter. []: none.",
    )
    share_prefixes: Auto | bool = Field(
        "auto",
        description="Compute a prefix that several examples share (a passage, a system prompt) once, and the rest of each example as a "
        "branch, with the same loss and gradient. auto: on if it saves at least 5% of the tokens and the model supports it.",
    )
    no_answer_text: Text = Field(
        "unanswerable", description="Answer to train when the context contains no answer (SQuAD v2.0)."
    )

    @property
    def train_files(self) -> tuple[tuple[str, float], ...]:
        """(path, weight) of every file with training rows."""
        if isinstance(self.train, str):
            return ((self.train, 1.0),)
        return tuple((file.path, file.weight) for file in self.train)


class TrainSection(Section):
    """Length of the training, learning rate, checkpoints."""

    epochs: Annotated[float, Field(gt=0, le=100_000)] | None = Field(
        1.0, description="Passes over the training rows; 0.5 is half a pass. null: max_steps decides."
    )
    max_steps: Count | None = Field(
        None,
        description="Optimizer steps; a number overrides epochs in both directions. null: epochs decides.",
    )
    examples_per_step: int = Field(
        16, ge=1, le=1_000_000, description="Examples per optimizer step (the batch size of the paper's tables)."
    )
    micro_batch_tokens: Auto | Count = Field(
        "auto",
        description="Tokens packed into one forward pass; each step is split into as many passes as needed. Changes memory and "
        "speed, not the result. Fewer tokens need less memory. auto: chosen for speed within the budget.",
    )
    learning_rate: float = Field(
        2e-4, gt=0, le=1, description="Peak learning rate (QLoRA table 9: 2e-4 up to 13B, 1e-4 above)."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up: falls to 0 along a cosine or a line, or stays constant."
    )
    warmup_ratio: float = Field(
        0.03, ge=0, le=1, description="Share of the steps during which the learning rate rises."
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay (AdamW, arXiv 1711.05101).")
    max_grad_norm: float = Field(
        1.0,
        gt=0,
        le=1e9,
        description="Largest L2 norm of the gradient; a larger one is scaled down to it (QLoRA used 0.3).",
    )
    optimizer: Literal["auto", "paged_adamw_8bit", "paged_adamw_32bit", "adamw"] = Field(
        "paged_adamw_8bit",
        description="AdamW. 8bit: 2 bytes of state a trained weight (arXiv 2110.02861), 32bit: 8; "
        "paged: the state may move to host memory when the card is full (QLoRA section 3). auto: the most exact that fits.",
    )
    loraplus_ratio: float = Field(
        1.0, ge=1, le=1e6, description="Learning rate of B divided by that of A (LoRA+, arXiv 2402.12354); 1.0: equal."
    )
    eval_every_steps: Count | None = Field(
        None,
        description="Measure the validation loss on data.eval every N steps and after the last step; the adapter with the lowest "
        "loss is kept. null: never.",
    )
    save_every_steps: int = Field(
        50, ge=1, le=LARGEST_COUNT, description="Write a checkpoint every N steps; one is always written at the end."
    )
    keep_checkpoints: int = Field(
        2, ge=1, le=100_000, description="Number of newest checkpoints to keep on disk, besides the best one."
    )
    early_stop: Count | None = Field(
        None, description="Stop after N evaluations in a row without a lower validation loss; null: never."
    )
    trackers: Trackers = Field(
        (),
        description="Trackers to write files for, in RUN_DIR/trackers: tensorboard, wandb (offline), trackio (local). []: none.",
    )
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Seed of the order of rows, the initial factors and the dropout."
    )


class MemorySection(Section):
    """How the run fits into memory."""

    budget: Auto | Size = Field(
        "auto",
        description='Memory to stay within, such as "24GiB" or 24. The plan chooses the fastest settings that fit for every auto in '
        "this section and in train. auto: the free memory of the device, less a margin.",
    )
    gradient_checkpointing: Auto | bool | Annotated[int, Field(ge=2, le=1000)] = Field(
        "auto",
        description="Keep one hidden state a layer and recompute the rest in the backward pass (arXiv 1604.06174). "
        "true: every layer, which saves memory and costs about a third of the speed; 2: every second layer. auto: as few as fit.",
    )
    head_chunk: Auto | Count = Field(
        "auto",
        description="Label tokens whose logits are in memory at once; does not change the result. auto: 256, or fewer if "
        "256 do not fit.",
    )
    eval_batch_tokens: Auto | Count = Field(
        "auto",
        description="Prompt tokens in one batch of generated answers, padding included. auto: 4096, or fewer if 4096 do not fit.",
    )
    host_budget: Auto | Size = Field(
        "auto",
        description="Host memory for parts of the model that wait there, such as 64GiB. auto: the machine's free memory, less a margin.",
    )
    chunk_tokens: Auto | Annotated[int, Field(ge=0, le=LARGEST_COUNT)] = Field(
        "auto",
        description="Tokens of a sequence that pass through a layer at once, forward and backward; gradients stay exact. 0: all. "
        "auto: all if they fit, else 8192 or fewer.",
    )
    layer_inputs: Auto | Literal["device", "fewest", "host", "host_fewest"] = Field(
        "auto",
        description="Where the inputs of layers wait for the backward pass. device; host: in host memory; fewest: as few as one more "
        "forward pass allows (8 of 32), on the device; host_fewest: those on the host. auto: the fastest that fits.",
    )
    resident_layers: Auto | Literal["all"] | Annotated[int, Field(ge=0, le=LARGEST_COUNT)] = Field(
        "auto",
        description="Number of layers whose frozen weights stay on the device; the others are streamed to it. auto: all, or as many "
        "as fit.",
    )
    stream_from: Auto | Literal["host", "disk"] = Field(
        "auto",
        description="Home of streamed weights. host: host memory; disk: the base's files, which lets a model larger than memory "
        "train. auto: host, or disk if the host's budget is too small.",
    )
    embeddings: Auto | Literal["device", "host"] = Field(
        "auto", description="Home of the embeddings. host: rows are gathered in host memory. auto: device if they fit."
    )
    head: Auto | Literal["resident", "streamed"] = Field(
        "auto",
        description="Home of the output head. streamed: in host memory, and on the device while a loss is computed. auto: resident if "
        "it fits.",
    )
    keys_values: Auto | Literal["device", "host"] = Field(
        "auto",
        description="Where the keys and values of the layer in work wait, if it runs in chunks. auto: device if they fit.",
    )


# Keys of `memory` that move or divide the model, with the values of an ordinary step.
ON_DEVICE: dict[str, int | str] = {
    "chunk_tokens": 0,
    "layer_inputs": "device",
    "resident_layers": "all",
    "stream_from": "host",
    "embeddings": "device",
    "head": "resident",
    "keys_values": "device",
}


class EvalSection(Section):
    """How the model is scored before and after training."""

    num_examples: Count | None = Field(
        100, description="Number of rows of data.eval to score, starting at the first; null: all."
    )
    max_seq_length: Auto | Annotated[int, Field(ge=2, le=LARGEST_COUNT)] = Field(
        "auto",
        description="Longest held-out row to score, in tokens. Longer rows are left out and counted; texts are scored in pieces, as "
        "in training. auto: the model's context window, or data.max_seq_length if the config has none.",
    )
    max_new_tokens: int = Field(32, ge=1, le=65_536, description="Longest answer to generate, in tokens.")


class MergeSection(Section):
    """How the adapter is added into a 16-bit checkpoint."""

    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="Type of the stored merged weights.")
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic",
        description="How sums are rounded to dtype (fp32 needs no rounding). nearest loses small changes systematically; "
        "stochastic is unbiased, seeded and repeatable.",
    )
    base: Literal["dequantized", "original"] = Field(
        "dequantized",
        description="Weights to add the adapter to. dequantized: exactly the weights used in training; original: the 16-bit "
        "weights before quantization.",
    )
    scale: float = Field(1.0, gt=0, le=100, description="Factor on the adapter's update; 1.0: as trained.")
    proof: Auto | Count = Field(
        "auto",
        description="Number of rows of data.eval on which the merged model and the adapter model are compared. auto: chosen; the "
        "reason is printed.",
    )


class Recipe(Section):
    """A QLoRA fine-tuning recipe: what to train, and the one memory budget that decides how it fits."""

    method: Literal["qlora", "lora", "full"] = Field(
        "qlora",
        description="qlora: 4-bit frozen base and trained factors (arXiv 2305.14314); lora: 16-bit frozen base; "
        "full: every weight.",
    )
    model: ModelSection = Field(ModelSection(), description=ModelSection.__doc__)
    lora: LoraSection = Field(LoraSection(), description=LoraSection.__doc__)
    data: DataSection = Field(DataSection(), description=DataSection.__doc__)
    train: TrainSection = Field(TrainSection(), description=TrainSection.__doc__)
    memory: MemorySection = Field(MemorySection(), description=MemorySection.__doc__)
    eval: EvalSection = Field(EvalSection(), description=EvalSection.__doc__)
    merge: MergeSection = Field(MergeSection(), description=MergeSection.__doc__)
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device to train on. auto: cuda if available, else cpu."
    )

    # The origin of the recipe; not compared by ==.
    _name: str = PrivateAttr("recipe")
    _path: Path | None = PrivateAttr(None)
    _notes: tuple[Reason, ...] = PrivateAttr(())

    @property
    def name(self) -> str:
        """File name without `.yaml`; names the run directory."""
        return self._name

    @property
    def path(self) -> Path | None:
        """The recipe's file, absolute; None for a recipe made in Python."""
        return self._path

    @property
    def notes(self) -> tuple[Reason, ...]:
        """The automatic choices of loading, for the screen and the run directory."""
        return self._notes

    def with_origin(self, *, name: str, path: Path | None, notes: tuple[Reason, ...] = ()) -> "Recipe":
        """Return the same recipe with its origin."""
        copy = self.model_copy()
        copy._name, copy._path, copy._notes = name, path, notes
        return copy

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, field) for field in type(self).model_fields))


def section_types() -> dict[str, type[Section]]:
    """Return `{"model": ModelSection, ...}` in the order of the recipe."""
    return {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def known_keys() -> dict[str, Any]:
    """Return every full key (`method`, `lora.r`, ...) with its default, in the order of the recipe."""
    keys: dict[str, Any] = {}
    sections = section_types()
    for name, field in Recipe.model_fields.items():
        if name in sections:
            keys |= {f"{name}.{key}": inner.default for key, inner in sections[name].model_fields.items()}
        else:
            keys[name] = field.default
    return keys
