"""Frozen weights that wait in host memory, or in the base's files, and come to the device when they are needed.

A streamed layer computes from one of two buffers on the device. While it does, the next layer in the direction of travel is copied into
the other one, on a stream of its own; events keep a copy from overtaking the computation and the computation from overtaking a copy.
Scales travel with their weight. Between its turns a layer's tensors are empty, so nothing can compute with another layer's weights.

Embedding and head wait on the host as whole modules: rows are gathered there, and the head is on the device while a loss is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.device.accelerator import copy_stream, is_accelerator
from qlora_lite.memory.ledger import HOST_WEIGHTS, counted_as
from qlora_lite.model.host_tensors import on_host

DISK = "_qlora_lite_on_disk"  # attribute of a layer whose tensors stay in the base's files: a dict of Source by attribute path


class Source(Protocol):
    """A tensor in a file."""

    def value(self) -> torch.Tensor: ...


@dataclass
class _Place:
    """One frozen tensor of a layer: the object and attribute that hold it, and its home."""

    owner: Any
    attribute: str
    home: torch.Tensor | Source

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


class StreamedLayers:
    """The layers from number `resident` on (None: no layer), streamed."""

    def __init__(self, layers: Sequence[torch.nn.Module], *, resident: int | None, device: torch.device) -> None:
        self._device = device
        self._stream = copy_stream(device) if resident is not None else None
        self._places: dict[int, list[_Place]] = {}
        self._slots: list[_Slot] = []
        if resident is None or resident >= len(layers):
            return
        for index in range(resident, len(layers)):
            self._places[index] = _take_away(layers[index], device)
        with counted_as("weights"):
            widest = self._places[resident]
            self._slots = [
                _Slot([torch.empty(p.tensor.shape, dtype=p.tensor.dtype, device=device) for p in widest]) for _ in range(2)
            ]

    def on_host(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """-> (weights, scales) in host memory; none of layers that stay in files."""
        places = [p for some in self._places.values() for p in some if isinstance(p.home, torch.Tensor)]
        weights, scales = ([p.tensor for p in places if p.is_scale == is_scale] for is_scale in (False, True))
        return weights, scales

    def buffers(self) -> list[torch.Tensor]:
        """Memory of the device for the layer in work and the next one."""
        return [tensor for slot in self._slots for tensor in slot.tensors]

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
        for slot in self._slots:
            if slot.layer == index:
                return slot
        slot = next(some for some in self._slots if some is not beside)
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
    stored: dict[str, Source] = layer.__dict__.get(DISK, {})
    places = []
    for name, module in layer.named_modules():
        for path, owner, attribute in _frozen_tensors(name, module):
            tensor: torch.Tensor = getattr(owner, attribute)
            home: torch.Tensor | Source = stored[path] if path in stored else _host_home(tensor)
            places.append(_Place(owner, attribute, home))
            setattr(owner, attribute, torch.empty(0, dtype=tensor.dtype, device=device))
    return places


def _host_home(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory; on the CPU and on meta itself, which only counts as there."""
    if is_accelerator(tensor.device) or tensor.is_cpu and tensor.is_pinned():
        return on_host(tensor, HOST_WEIGHTS)
    return tensor.detach()


def _frozen_tensors(name: str, module: torch.nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Yield (path, owner, attribute) of the frozen weight of a linear layer and of its scales."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, torch.nn.Linear) or weight.requires_grad:
        return
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
        self._head, self._embedding = model.get_output_embeddings(), model.get_input_embeddings()
        is_tied = _base(self._head).weight is _base(self._embedding).weight
        self._homes: dict[int, tuple[Any, torch.Tensor]] = {}  # by parameter
        self._streams_head = head or (embeddings and is_tied)
        self._is_loaded = 0
        gathers_on_host = embeddings or (head and is_tied)
        for module, is_away in ((self._embedding, gathers_on_host), (self._head, self._streams_head)):
            weight = _base(module).weight
            if is_away and id(weight) not in self._homes:
                assert not weight.requires_grad, "a trained embedding or head stays on the device"
                self._homes[id(weight)] = (weight, _host_home(weight.data))
                weight.data = self._homes[id(weight)][1]
        self._undo: list[Callable[[], None]] = []
        if gathers_on_host:
            self._patch(_base(self._embedding), self._gather)
        if self._streams_head:
            self._patch(self._head, self._project)

    def on_host(self) -> list[torch.Tensor]:
        """Weights in host memory."""
        return [home for _, home in self._homes.values()]

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
        if self._streams_head and hidden_ND.requires_grad:
            self._load()
            hidden_ND.register_hook(lambda _: self._unload())

    def _load(self) -> None:
        if not self._streams_head:
            return
        weight, home = self._homes[id(_base(self._head).weight)]
        if not self._is_loaded:
            with counted_as("weights"):
                weight.data = home.to(self._device, copy=True)
        self._is_loaded += 1

    def _unload(self) -> None:
        if not self._streams_head or not self._is_loaded:
            return
        self._is_loaded -= 1
        if not self._is_loaded:
            weight, home = self._homes[id(_base(self._head).weight)]
            weight.data = home

    def end_step(self) -> None:
        """Free the head, also after an error."""
        self._is_loaded = min(self._is_loaded, 1)
        self._unload()

    def _gather(self, forward: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, gathered on the host."""
        if not is_accelerator(self._device):
            rows: torch.Tensor = forward(ids)
            return rows
        return torch.as_tensor(forward(ids.to("cpu"))).to(self._device)

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
        for weight, home in self._homes.values():
            weight.data = home.to(self._device)
        self._homes.clear()


def _base(module: Any) -> Any:
    """The module that holds the weight, inside peft's layers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module
