"""Frozen weights that wait in host memory, or in the base's files, and come to the device when they are needed.

A streamed layer computes from one of two buffers on the device. While it does, the next layer in the direction of travel is copied into
the other one, on a stream of its own; events keep a copy from overtaking the computation and the computation from overtaking a copy.
Scales travel with their weight. Between its turns a layer's tensors are empty, so nothing can compute with another layer's weights.

Embedding and head wait on the host as whole modules: rows are gathered there, and the head is on the device while a loss is computed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.device.accelerator import copy_stream, is_accelerator
from qlora_lite.memory.ledger import HOST_WEIGHTS, counted_as
from qlora_lite.model.host_tensors import empty_on_host

# Attribute of a layer that was loaded to be streamed: its tensors or Sources, by path in the layer.
HOMES = "_qlora_lite_homes"


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers of the decoder, first to last."""
    lists = [child for child in model.get_decoder().children() if isinstance(child, torch.nn.ModuleList)]
    layers = next(some for some in lists if len(some) and isinstance(some[0], GradientCheckpointingLayer))
    return list(layers)


class Source(Protocol):
    """The source of a tensor: a file (published.LazyTensor), or a generator of random numbers (random_model.py)."""

    def value(self) -> torch.Tensor: ...


@dataclass
class _Place:
    """One frozen tensor of a layer: the object and attribute that hold it, and its home."""

    owner: Any
    attribute: str
    home: torch.Tensor | Source
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """The type on the device; that of a file may be another one."""
        dtype: torch.dtype = getattr(self.owner, self.attribute).dtype
        return dtype

    @property
    def is_scale(self) -> bool:
        return self.attribute != "data"

    @property
    def tensor(self) -> torch.Tensor:
        return self.home if isinstance(self.home, torch.Tensor) else self.home.value()

    def put(self, tensor: torch.Tensor) -> None:
        setattr(self.owner, self.attribute, tensor)


@dataclass
class _Slot:
    """A buffer for one layer's tensors, and the layer in it."""

    tensors: list[torch.Tensor]
    layer: int | None = None
    copied: Any = None  # event: the copy into it is complete
    used: Any = None  # event: the last computation from it is complete


_Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class Homes:
    """Takes weights off the device while a model is loaded, so that layers which will be streamed never fill it."""

    def __init__(self, model: PreTrainedModel, *, resident: int, from_disk: bool, device: str) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        self._layers = {f"{names[id(layer)]}.": layer for layer in decoder_layers(model)[resident:]}
        self._from_disk, self._device = from_disk, torch.device(device)

    def take(self, name: str, sources: Mapping[str, Source]) -> None:
        """Take the weight `name`, just filled, with its scales; no effect for other than linear weights of streamed layers."""
        prefix = next((prefix for prefix in self._layers if name.startswith(prefix)), None)
        if prefix is None:
            return
        layer, path = self._layers[prefix], name.removeprefix(prefix)
        homes = layer.__dict__.setdefault(HOMES, {})
        module = layer.get_submodule(path.rpartition(".")[0])
        for part, owner, attribute in _frozen_tensors(path.rpartition(".")[0], module):
            tensor = getattr(owner, attribute)
            source = sources.get(prefix + part)
            homes[part] = source if self._from_disk and source is not None else host_home(tensor, self._device)
            setattr(owner, attribute, torch.empty(0, dtype=tensor.dtype, device=self._device))


class StreamedLayers:
    """The layers from number `resident` on (None: no layer), streamed."""

    def __init__(self, layers: Sequence[torch.nn.Module], *, resident: int | None, device: torch.device) -> None:
        self._device = device
        self._stream = copy_stream(device) if resident is not None else None
        self._places: dict[int, list[_Place]] = {}
        self._slots: dict[_Shapes, list[_Slot]] = {}  # two for each kind of layer
        if resident is None or resident >= len(layers):
            return
        for index in range(resident, len(layers)):
            self._places[index] = _take_away(layers[index], device)
        with counted_as("weights"):
            for shapes in dict.fromkeys(map(self._shapes, self._places)):
                self._slots[shapes] = [
                    _Slot([torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]) for _ in range(2)
                ]

    def away(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """-> (weights, scales) that are tensors elsewhere; none of layers that stay in files."""
        places = [p for some in self._places.values() for p in some if isinstance(p.home, torch.Tensor)]
        weights, scales = ([p.tensor for p in places if p.is_scale == is_scale] for is_scale in (False, True))
        return weights, scales

    def buffers(self) -> list[torch.Tensor]:
        """Memory of the device for the layer in work and the next one."""
        return [tensor for slots in self._slots.values() for slot in slots for tensor in slot.tensors]

    def _shapes(self, index: int) -> "_Shapes":
        return tuple((place.shape, place.dtype) for place in self._places[index])

    @contextmanager
    def of(self, index: int, *, following: int) -> Iterator[None]:
        """Inside, the weights of layer `index` are on the device, and those of `following` on their way."""
        if index not in self._places:
            if following in self._places:
                self._fetch(following, beside=None)
            yield
            return
        slot = self._fetch(index, beside=None)
        if following in self._places:
            self._fetch(following, beside=slot)
        if slot.copied is not None:
            slot.copied.wait()
        for place, tensor in zip(self._places[index], slot.tensors, strict=True):
            place.put(tensor)
        try:
            yield
        finally:
            for place, tensor in zip(self._places[index], slot.tensors, strict=True):
                place.put(tensor.new_empty(0))
            if self._stream is not None:
                slot.used = self._stream.record_on_current()

    def _fetch(self, index: int, *, beside: _Slot | None) -> _Slot:
        """The slot with layer `index`, its copy begun; another layer leaves, not that of `beside`."""
        slots = self._slots[self._shapes(index)]
        for slot in slots:
            if slot.layer == index:
                return slot
        slot = next(some for some in slots if some is not beside)
        slot.layer = None  # until the copy is complete: an error in it leaves nothing that looks like a layer
        sources = [place.tensor for place in self._places[index]]
        if self._stream is None:
            for tensor, source in zip(slot.tensors, sources, strict=True):
                tensor.copy_(source)
        else:
            slot.copied = self._stream.copy(slot.tensors, sources, after=slot.used)
        slot.layer = index
        return slot

    def remove(self) -> None:
        """Bring every layer back to the device for good."""
        for places in self._places.values():
            for place in places:
                place.put(place.tensor.to(self._device))
        self._places.clear()
        self._slots.clear()


def _take_away(layer: torch.nn.Module, device: torch.device) -> list[_Place]:
    """Move a layer's frozen linear weights and their scales to their home; empty tensors take their place."""
    loaded: dict[str, torch.Tensor | Source] = layer.__dict__.get(HOMES, {})
    places = []
    tensors = [
        tensor
        for name, module in layer.named_modules()
        for tensor in _frozen_tensors(name.removesuffix(".base_layer"), module)
    ]
    for path, owner, attribute in tensors:
        tensor: torch.Tensor = getattr(owner, attribute)
        home = loaded[path] if path in loaded else host_home(tensor, device)
        shape = home.shape if isinstance(home, torch.Tensor) else home.value().shape
        places.append(_Place(owner, attribute, home, shape))
        setattr(owner, attribute, torch.empty(0, dtype=tensor.dtype, device=device))
    return places


def host_home(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in host memory, for copies to `device`; on the CPU and on meta itself, which only counts as there."""
    if not is_accelerator(device):
        return tensor.detach()
    home = empty_on_host(tensor.shape, tensor.dtype, device, HOST_WEIGHTS)
    return home.copy_(tensor.detach())


def _frozen_tensors(name: str, module: torch.nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Yield (path, owner, attribute) of the frozen weight of a linear layer and of its scales."""
    if not isinstance(module, torch.nn.Linear) or module.weight.requires_grad:
        return
    weight: Any = module.weight
    yield f"{name}.weight", weight, "data"
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        state = weight.quant_state
        yield f"{name}.weight.absmax", state, "absmax"
        if state.nested:
            yield f"{name}.weight.nested_absmax", state.state2, "absmax"
    elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
        weight.CB = None  # a second name of the same values, which only bitsandbytes' own forward reads
        yield f"{name}.SCB", *((weight, "SCB") if weight.SCB is not None else (module.state, "SCB"))


class StreamedEnds:
    """Embedding and head, each at home on the host if asked for. A tied pair has one weight and one home."""

    def __init__(self, model: PreTrainedModel, device: torch.device, *, embeddings: bool, head: bool) -> None:
        self._device = device
        self._undo: list[Callable[[], None]] = []
        self._homes: dict[str, torch.nn.Parameter] = {}  # by the name of the end
        self._num_users = 0  # of the head on the device
        self._gathers = self._streams = False
        if not (embeddings or head):
            return
        self._embedding, self._head = _base(model.get_input_embeddings()), _base(model.get_output_embeddings())
        is_tied = self._head.weight is self._embedding.weight
        self._gathers, self._streams = embeddings or (head and is_tied), head or (embeddings and is_tied)
        moved = {"embedding": self._embedding} if self._gathers else {}
        moved |= {"head": self._head} if self._streams else {}
        for name, module in moved.items():
            assert not module.weight.requires_grad, "a trained embedding or head stays on the device"
            is_done = is_tied and "embedding" in self._homes
            home = self._homes["embedding"] if is_done else _frozen(host_home(module.weight.data, device))
            self._homes[name] = home
        self._placeholders = {name: _frozen(home.new_empty(0, device=device)) for name, home in self._homes.items()}
        for name, module in moved.items():  # transformers asks the first parameter for the model's device
            module._parameters["weight"] = self._placeholders[name]
        if self._gathers:
            self._patch(self._embedding, self._gather)
        if self._streams:
            self._patch(model.get_output_embeddings(), self._project)

    def on_host(self) -> list[torch.Tensor]:
        """Weights in host memory."""
        return [home.data for home in dict.fromkeys(self._homes.values())]

    @contextmanager
    def head(self) -> Iterator[None]:
        """Inside, the head's weight is on the device."""
        self._load()
        try:
            yield
        finally:
            self._unload()

    def drop_head_after(self, hidden_ND: torch.Tensor) -> None:
        """Keep the head on the device until the gradient of `hidden_ND` exists."""
        if self._streams and hidden_ND.requires_grad:
            self._load()
            hidden_ND.register_hook(lambda _: self._unload())

    def _load(self) -> None:
        if self._streams and not self._num_users:
            with counted_as("weights"), torch.no_grad():
                self._head._parameters["weight"] = _frozen(self._homes["head"].data.to(self._device, copy=True))
        self._num_users += 1

    def _unload(self) -> None:
        self._num_users = max(0, self._num_users - 1)
        if self._streams and not self._num_users:
            self._head._parameters["weight"] = self._placeholders["head"]

    def end_step(self) -> None:
        """Take the head off the device, also after an error."""
        self._num_users = 0
        self._unload()

    def _gather(self, forward: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, gathered on the host."""
        self._embedding._parameters["weight"] = self._homes["embedding"]
        try:
            rows: torch.Tensor = forward(ids if ids.is_meta else ids.to("cpu"))
        finally:
            self._embedding._parameters["weight"] = self._placeholders["embedding"]
        return rows.to(self._device)

    def _project(self, forward: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        with self.head():
            logits: torch.Tensor = forward(hidden)
        return logits

    def _patch(self, module: torch.nn.Module, function: Callable[..., Any]) -> None:
        plain = module.forward
        module.forward = lambda *args, **kwargs: function(plain, *args, **kwargs)  # type: ignore[method-assign]
        self._undo.append(lambda: delattr(module, "forward"))

    def remove(self) -> None:
        """Bring embedding and head back to the device for good."""
        for undo in self._undo:
            undo()
        if not self._homes:
            return
        back = {home: _frozen(home.data.to(self._device)) for home in self._homes.values()}
        modules = {"embedding": self._embedding, "head": self._head}
        for name, home in self._homes.items():
            modules[name]._parameters["weight"] = back[home]
        self._homes.clear()


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _base(module: Any) -> Any:
    """The embedding or linear layer inside peft's wrappers: the one that holds the frozen weight."""
    while not isinstance(module, torch.nn.Embedding | torch.nn.Linear):
        module = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module.base_layer
    return module
