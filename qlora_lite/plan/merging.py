"""Host memory of a merge and its proof, rehearsed by running their own code on meta tensors.

In: a config, the settings of training and of the merge. Out: bytes of tensors at the peak, without other memory of the process.

    merge    row blocks of 16 MiB in fp32, each with a few copies while it is rounded, and the fp32 scales of one weight: independent of
             the depth, and little more for a large model than for a small one
    proof    one weight in fp32, activations of examples of 4,096 tokens in one layer, last hidden states of all examples; then the
             log-probabilities of five models, twice, in pieces of 256 MiB

Input files are memory-mapped: page cache, not process memory. So the depth does not matter, and few layers are rehearsed.
16-bit files are assumed to be bf16. The proof of a run on a card computes there: host and card each hold at most this sum of both.

A process has more memory than its tensors: Python objects for a folder's names, and freed blocks that the C library keeps. A Llama of
two layers, 1,024 wide, 16,384 tokens, proved on 24 examples of 200: planned 84 and 395 MiB, RssAnon rose by 97 and 410.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig

from qlora_lite.base.artefact import linear_weights
from qlora_lite.base.quantization import Quantization
from qlora_lite.base.skeleton import empty_model
from qlora_lite.data.template import Encoded
from qlora_lite.device.card import CPU
from qlora_lite.files.library_names import A_FACTOR, B_FACTOR, MAGNITUDE, PREFIX, WHOLE_MODULE
from qlora_lite.files.safetensors_writer import DTYPE_NAMES
from qlora_lite.memory.ledger import PAGED, Ledger
from qlora_lite.merging.checkpoint import Checkpoint
from qlora_lite.merging.lora import Adapter, LoraFactors
from qlora_lite.merging.proof import Models
from qlora_lite.merging.write import merged_blocks
from qlora_lite.model.dtypes import DTYPES
from qlora_lite.model.meta import four_bit_state
from qlora_lite.plan.rehearsal import Body, Settings, attention_on, layer_period, names_layers, running, with_depth
from qlora_lite.plan.workspace import workspace_of


@dataclass(frozen=True)
class Merging:
    """Settings of a merge; `settings.method` is qlora (4-bit or 8-bit files) or lora (16-bit files)."""

    settings: Settings
    dtype: str = "bf16"
    rounding: str = "stochastic"


def merge_peak_host_bytes(config: PreTrainedConfig, merging: Merging) -> int:
    """Return peak host bytes of writing the merged files: those of the most expensive tensor, block by block."""
    base, adapter, ledger = _files(config, merging)
    dtype = DTYPES[merging.dtype]
    with ledger:
        for name in base.names:
            write_nowhere(merged_blocks(base, adapter, name, dtype, rounding=merging.rounding, scale=1.0, seed=0))
    return ledger.peak_bytes


def proof_peak_host_bytes(config: PreTrainedConfig, merging: Merging, rows: Sequence[tuple[int, int]]) -> int:
    """Return peak host bytes of comparing merged and adapter model on held-out `rows`: (tokens, number of trailing label tokens) each."""
    base, adapter, ledger = _files(config, merging)
    shallow = _shallow(config, merging)
    stored = {name: _empty(base.shape(name), DTYPES[merging.dtype]) for name in base.names}
    ledger.hold(PAGED, *stored.values())
    encoded = [Encoded([0] * length, ((length - labels, length),)) for length, labels in rows]
    merged = _ShapeCheckpoint(stored, quantization=None, compute=None)
    models = Models(base, adapter, merged, config=shallow, scale=1.0, device="meta")
    with running(config), ledger, attention_on(CPU), torch.no_grad():
        models.distances(encoded)
    return ledger.peak_bytes


def write_nowhere(blocks: Iterator[torch.Tensor]) -> None:
    """Consume blocks like the writer of a file, which still holds one block while it requests the next."""
    for _ in blocks:
        pass


class _ShapeCheckpoint(Checkpoint):
    """A model folder of meta tensors."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, quantization: Quantization | None, compute: torch.dtype | None,
        shapes: Mapping[str, torch.Size] | None = None,
    ) -> None:  # fmt: skip
        config = {} if quantization is None else {"quantization_config": quantization.config()}
        file = _ShapeFile(tensors)
        super().__init__(
            Path("planned"),
            compute_dtype=compute,
            config={"model_type": "planned", **config},
            files=dict.fromkeys(tensors, file),
        )
        self._tensors, self._shapes = tensors, shapes or {}

    def _quant_state(self, name: str) -> Any:
        assert self.quantization is not None
        return four_bit_state(name, self._tensors, self._shapes[name], self.quantization, self._dequantized_dtype)


@dataclass(frozen=True)
class _ShapeFile:
    """The methods of an open safetensors file that a checkpoint calls."""

    tensors: Mapping[str, torch.Tensor]

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> "_ShapeSlice":
        return _ShapeSlice(self.tensors[name])


@dataclass(frozen=True)
class _ShapeSlice:
    tensor: torch.Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self.tensor.dtype]


def _files(config: PreTrainedConfig, merging: Merging) -> tuple[Checkpoint, Adapter, Ledger]:
    """-> (base, adapter, a ledger that counts both as mapped files)."""
    settings, shallow = merging.settings, _shallow(config, merging)
    quantization = settings.quantization if settings.method == "qlora" else None
    model = empty_model(shallow)
    linear = linear_weights(model) if quantization is not None else frozenset()
    shapes = {
        name: tensor.shape for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if quantization is not None and name in linear:
            tensors |= {part: _empty(spec.shape, spec.dtype) for part, spec in quantization.specs(name, shape).items()}
        else:
            tensors[name] = _empty(shape, torch.bfloat16)
    base = _ShapeCheckpoint(tensors, quantization=quantization, compute=settings.compute, shapes=shapes)
    adapter = _adapter(Body(shallow, settings).model)
    ledger = Ledger(workspace=workspace_of(CPU, num_threads=settings.num_threads))
    # Every value is finite, and no check fails.
    ledger.answer = lambda operator: float(operator is torch.ops.aten.all.default)
    parts = [part for factors in adapter.factors.values() for part in (factors.a_RI, factors.b_OR, factors.magnitude_O)]
    ledger.hold(PAGED, *tensors.values(), *adapter.whole.values(), *(part for part in parts if part is not None))
    return base, adapter, ledger


def _adapter(model: Any) -> Adapter:
    """Return a model's adapter in the form of `read_adapter`."""
    assert isinstance(model, PeftModel)
    trained = {
        name.removeprefix(PREFIX): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    a, b, m = (f"{part}default.weight" for part in (A_FACTOR, B_FACTOR, f"{MAGNITUDE}."))
    modules = [name.removesuffix(a) for name in trained if name.endswith(a)]
    factors = {
        module: LoraFactors(trained[module + a], trained[module + b], 2.0, trained.get(module + m))
        for module in modules
    }
    whole = {name.replace(WHOLE_MODULE, ""): parameter for name, parameter in trained.items() if WHOLE_MODULE in name}
    return Adapter(factors, whole, {})


def _shallow(config: PreTrainedConfig, merging: Merging) -> PreTrainedConfig:
    """Return a config with every kind of layer, one after another layer, whose output counts too; all layers if some are named."""
    if names_layers(merging.settings):
        return config
    return with_depth(config, min(config.num_hidden_layers, layer_period(config) + 1))


def _empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
