"""Residency: where the parts of a model wait while one of its layers computes.

    policy      where layer inputs, weights, ends, keys and values wait, and how many tokens pass through a layer at once (policy.py)
    a layer     one autograd function over the whole sequence; it saves nothing itself

Forward: a layer runs chunk by chunk of tokens, and attention keeps the keys and values of the sequence for this one layer
(chunk_attention.py). Backward, layer by layer:

    1. one pass fills the store of keys and values; the layer is left as soon as attention has them
    2. chunks from last to first: each is computed again with gradients and walked back through; the gradient of its output is
       overwritten by that of its input

So gradients are exact, and memory beyond the hidden states grows with the chunk, not with the sequence. A sequence within one chunk runs
as a whole, without step 1, and gives the same bits as ordinary gradient checkpointing. Where things wait changes no bit; the chunk
changes last ones.

Models that compute attention in their own modules (BLOOM, Falcon) run each layer as one chunk, with the same homes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_lite.device.accelerator import random_state as accelerators_state
from qlora_lite.device.accelerator import same_random_numbers, set_random_state
from qlora_lite.memory.ledger import HOST_CONSTANTS, HOST_INPUTS, HOST_WEIGHTS, ON_DISK, counted_as, current_category
from qlora_lite.model.attention import packs_rows
from qlora_lite.model.chunk_attention import Chunk, KeysAreComplete, KeysValues
from qlora_lite.model.host_tensors import Home, empty_on_host, on_device, on_host, wait_for_copies
from qlora_lite.model.policy import Policy, kept_inputs
from qlora_lite.model.streaming import StreamedEnds, StreamedLayers, decoder_layers


def apply_policy(model: PreTrainedModel, policy: Policy) -> None:
    """Let the layers of `model` run by `policy` from now on; a plain policy restores their own forward."""
    current = residency_of(model)
    if current is not None:
        if current.policy == policy:
            return
        current.remove()
    if not policy.is_plain:
        model.__dict__[_ATTRIBUTE] = Residency(model, policy)


@contextmanager
def one_step(model: PreTrainedModel) -> Iterator[None]:
    """Around forward and backward of a micro-batch: afterwards, also after an error, no streamed head is on the device."""
    try:
        yield
    finally:
        residency = residency_of(model)
        if residency is not None:
            residency.end_step()


def residency_of(model: PreTrainedModel) -> "Residency | None":
    """The residency that runs the model's layers; None if they run plainly."""
    residency: Residency | None = model.__dict__.get(_ATTRIBUTE)
    return residency


_ATTRIBUTE = "_qlora_lite_residency"


class Residency:
    """Runs the layers of one model by a policy."""

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        self.policy = policy
        self._model = model
        self._decoder = model.get_decoder()
        self._layers = decoder_layers(model)
        self._device = _computing_device(self._layers[0])
        self._chunk = policy.chunk_tokens if packs_rows(model) else 0
        self._kept = set(kept_inputs(len(self._layers)) if policy.keeps_fewest else range(len(self._layers)))
        self._run: _Run | None = None
        self._anchor = torch.zeros((), device=self._device, requires_grad=True)  # layers' outputs require gradients
        model._set_gradient_checkpointing(enable=False)
        self._weights = StreamedLayers(self._layers, resident=policy.resident_layers, device=self._device)
        self._ends = StreamedEnds(
            model, self._device, embeddings=policy.embeddings == "host", head=policy.head == "streamed"
        )
        for index, layer in enumerate(self._layers):
            layer.forward = partial(self._layer, index, partial(type(layer).forward, layer))  # type: ignore[method-assign]

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self._device

    def remove(self) -> None:
        """Restore the layers' own forward, and bring everything back to the device."""
        for layer in self._layers:
            del layer.forward
        self._weights.remove()
        self._ends.remove()
        del self._model.__dict__[_ATTRIBUTE]

    def away(self) -> dict[str, list[torch.Tensor]]:
        """Frozen tensors whose home is not the device, by the ledger's category."""
        weights, constants = self._weights.away()
        ends = self._ends.on_host()
        if self.policy.stream_from == "disk":
            return {ON_DISK: [*weights, *constants], HOST_WEIGHTS: ends}
        return {HOST_WEIGHTS: [*weights, *ends], HOST_CONSTANTS: constants}

    def buffers(self) -> list[torch.Tensor]:
        """The device's memory for streamed weights, kept between steps."""
        return self._weights.buffers()

    def head(self) -> AbstractContextManager[None]:
        """Inside, a streamed head is on the device."""
        return self._ends.head()

    def end_step(self) -> None:
        """Take a streamed head off the device."""
        self._ends.end_step()

    def drop_head_after(self, hidden_ND: torch.Tensor) -> None:
        """Free a streamed head as soon as the gradient of its input exists."""
        self._ends.drop_head_after(hidden_ND)

    def states_at(
        self,
        predictor_N: torch.Tensor,
        *,
        input_ids_1T: torch.Tensor,
        position_ids_1T: torch.Tensor,
        lengths: tuple[int, ...],
        parents: tuple[int, ...],
    ) -> torch.Tensor:
        """Last hidden states [N, D] at the positions `predictor_N` of a packed sequence; the final norm runs on these rows alone."""
        norm = _final_norm(self._decoder)
        run = self._run = _Run(current_category(), self._may_wait_on_host(norm))
        inputs: dict[str, Any] = {"input_ids": input_ids_1T, "position_ids": position_ids_1T}
        if run.is_on_host:  # between its layers, the decoder's own code runs on the host
            inputs = {"inputs_embeds": self._embedded(input_ids_1T), "position_ids": _host_copy(position_ids_1T)}
        try:
            with _without(self._decoder, norm), counted_as(HOST_INPUTS) if run.is_on_host else nullcontext():
                hidden = self._decoder(**inputs, use_cache=False, lengths=lengths, parents=parents).last_hidden_state
            rows_ND: torch.Tensor = _RowsOf.apply(hidden, predictor_N, run.is_on_host, self._device)  # type: ignore[no-untyped-call]
        finally:
            self._run = None
        del hidden
        return rows_ND if norm is None else self._decoder.get_submodule(norm)(rows_ND)

    def states_of_example(self, ids_1T: torch.Tensor) -> torch.Tensor:
        """Last hidden states [T, D] of one example, in models that run examples one at a time."""
        self._run = _Run(current_category(), False)
        try:
            states: torch.Tensor = self._decoder(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
            return states
        finally:
            self._run = None

    def _may_wait_on_host(self, norm: str | None) -> bool:
        """Whether whole hidden states can stay on the host: then the decoder only embeds, rotates and norms outside of its layers."""
        if self.policy.inputs_home != "host" or not self._chunk or norm is None:
            return False
        embedding = self._model.get_input_embeddings()
        return not any(
            list(child.parameters())
            for name, child in self._decoder.named_children()
            if child is not embedding and name != norm and not isinstance(child, torch.nn.ModuleList)
        )

    def _embedded(self, input_ids_1T: torch.Tensor) -> torch.Tensor:
        """Embeddings [1, T, D] on the host, gathered chunk by chunk."""
        embedding = self._model.get_input_embeddings()
        pieces = [slice(a, b) for a, b in _spans(input_ids_1T.shape[1], self._chunk)]
        if torch.is_grad_enabled() and any(p.requires_grad for p in embedding.parameters()):
            with counted_as(HOST_INPUTS):
                return torch.cat([_host_copy(embedding(input_ids_1T[:, piece])) for piece in pieces], dim=1)
        hidden: torch.Tensor | None = None
        for piece in pieces:
            gathered = embedding(input_ids_1T[:, piece])
            if hidden is None:
                shape = (1, input_ids_1T.shape[1], gathered.shape[-1])
                hidden = empty_on_host(shape, gathered.dtype, self._device, HOST_INPUTS)
            hidden[:, piece].copy_(gathered, non_blocking=True)
        assert hidden is not None
        wait_for_copies(self._device)  # the decoder's own code may read it
        return hidden

    def _layer(self, index: int, function: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The forward of layer `index`, called by the decoder."""
        run = self._run
        if run is None:  # generation: with a cache, without gradients
            assert not torch.is_grad_enabled(), "training goes through states_at"
            with self._weights.of(index, following=index + 1):
                return function(hidden, *args, **kwargs)
        call = _Call(index, function, args, kwargs, is_training=torch.is_grad_enabled())
        with counted_as(run.category):
            if call.is_training:
                output = _Layer.apply(self._anchor, hidden, self, run, call)  # type: ignore[no-untyped-call]
            else:
                output = self.forward(run, call, hidden)
        return output if call.rest is None else (output, *call.rest)

    def keep(self, run: "_Run", call: "_Call", hidden: torch.Tensor) -> None:
        """Keep what the backward pass needs of a layer."""
        run.calls[call.index] = call
        if call.index in self._kept:
            needs_copy = self.policy.inputs_home == "host" and not run.is_on_host
            run.inputs[call.index] = on_host(hidden, HOST_INPUTS) if needs_copy else hidden.detach()

    def forward(self, run: "_Run", call: "_Call", hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output [1, T, D], without gradients."""
        tokens = hidden.shape[1]
        with self._weights.of(call.index, following=call.index + 1), torch.no_grad():
            if not 0 < self._chunk < tokens:
                output = call.compute(self._piece(run, hidden, 0, tokens), pieces=self._pieces(run, 0, tokens, tokens))
                return on_host(output, HOST_INPUTS) if run.is_on_host else output
            output = self._empty(run, hidden)
            store = KeysValues(tokens, self.policy.keys_values, with_gradients=False)
            for a, b in _spans(tokens, self._chunk):
                chunk = Chunk(a, b, store, trains=call.is_training)
                part = call.compute(self._piece(run, hidden, a, b), chunk=chunk, pieces=self._pieces(run, a, b, tokens))
                output[:, a:b].copy_(part, non_blocking=True)
        return output

    def backward(
        self, run: "_Run", call: "_Call", grad: torch.Tensor, *, needs_input_grad: bool
    ) -> torch.Tensor | None:
        """Walk back through a layer: add to the gradients of its parameters, and return that of its input, in the place of `grad`."""
        hidden = self._input_of(run, call.index)
        tokens = hidden.shape[1]
        with self._weights.of(call.index, following=call.index - 1):
            if not 0 < self._chunk < tokens:
                whole = on_device(hidden, self._device, self.policy.inputs_home).detach()
                del hidden
                pieces = self._pieces(run, 0, tokens, tokens)
                output = call.recompute(whole.requires_grad_(needs_input_grad), pieces=pieces)
                torch.autograd.backward(output, self._piece(run, grad, 0, tokens))
                if not run.is_on_host or whole.grad is None:
                    return whole.grad
                return grad.copy_(whole.grad, non_blocking=True)
            store = KeysValues(tokens, self.policy.keys_values, with_gradients=True)
            spans = _spans(tokens, self._chunk)
            home = self.policy.inputs_home
            pieces_of = partial(self._pieces, run, tokens=tokens)
            for a, b in spans[:-1]:  # the last chunk has no later queries
                with torch.no_grad():
                    call.collect(_piece_of(hidden, a, b, self._device, home), Chunk(a, b, store, only_keys=True, trains=True),
                                 pieces_of(a, b))  # fmt: skip
            for a, b in reversed(spans):
                part = _piece_of(hidden, a, b, self._device, home).detach().requires_grad_(needs_input_grad)
                output = call.recompute(part, chunk=Chunk(a, b, store, trains=True), pieces=pieces_of(a, b))
                torch.autograd.backward(output, self._piece(run, grad, a, b))
                if part.grad is not None:
                    grad[:, a:b].copy_(part.grad, non_blocking=True)
                del output, part
        return grad if needs_input_grad else None

    def _input_of(self, run: "_Run", index: int) -> torch.Tensor:
        """Take the input of a layer out of the kept ones; one that is not kept is computed from the nearest, as are those between them."""
        nearest = max(kept for kept in run.inputs if kept <= index)
        for between in range(nearest, index):
            hidden, call = run.inputs[between], run.calls[between]
            if self.policy.inputs_home == "host" and not run.is_on_host:
                output = self.forward(run, call.again(), on_device(hidden, self._device, "host"))
                run.inputs[between + 1] = on_host(output, HOST_INPUTS)
            else:
                run.inputs[between + 1] = self.forward(run, call.again(), hidden)
        return run.inputs.pop(index)

    def _empty(self, run: "_Run", like: torch.Tensor) -> torch.Tensor:
        if run.is_on_host:
            return empty_on_host(like.shape, like.dtype, self._device, HOST_INPUTS)
        return torch.empty_like(like)

    def _piece(self, run: "_Run", whole: torch.Tensor, a: int, b: int) -> torch.Tensor:
        return _piece_of(whole, a, b, self._device, "host" if run.is_on_host else "device")

    def _pieces(self, run: "_Run", a: int, b: int, tokens: int) -> Callable[[Any], Any]:
        """A function that cuts an argument of a layer to the tokens from a to b."""

        def cut(value: Any) -> Any:
            if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
                return tuple(cut(item) for item in value)
            if not isinstance(value, torch.Tensor) or tokens not in value.shape[:2]:
                return value
            piece = value[:, a:b] if value.dim() > 1 else value[a:b]
            return on_device(piece, self._device, "host" if run.is_on_host else "device")

        return cut


@dataclass
class _Run:
    """One sequence on its way through the decoder, forward and back. It lives as long as the graph of its loss."""

    category: str  # of the ledger, for what layers compute
    is_on_host: bool  # whole hidden states are on the host
    calls: dict[int, "_Call"] = field(default_factory=dict)  # by layer
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)  # of layers, those that are kept


@dataclass
class _Call:
    """A layer's forward and its arguments beside the hidden state."""

    index: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_training: bool
    rest: tuple[Any, ...] | None = None  # of the layer's outputs, if it returns a tuple
    random: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)  # before each chunk
    is_again: bool = False

    def again(self) -> "_Call":
        """The same call, to be computed once more with the same random numbers."""
        return replace(self, is_again=True)

    def compute(
        self, hidden: torch.Tensor, *, chunk: Chunk | None = None, pieces: Callable[[Any], Any] = lambda value: value
    ) -> torch.Tensor:
        """The output for `hidden`, the input of a chunk or of the whole sequence."""
        place = 0 if chunk is None else chunk.start
        with self._random_numbers(place, hidden.device):
            kwargs = {name: pieces(value) for name, value in self.kwargs.items()}
            if chunk is not None:
                kwargs["chunk"] = chunk
            output = self.function(hidden, *map(pieces, self.args), **kwargs)
        if isinstance(output, tuple):
            output, *rest = output
            self.rest = tuple(None for _ in rest)
        result: torch.Tensor = output
        return result

    def recompute(self, hidden: torch.Tensor, **settings: Any) -> torch.Tensor:
        """As `compute`, with gradients and the random numbers of the forward pass."""
        with torch.enable_grad():
            return self.again().compute(hidden, **settings)

    def collect(self, hidden: torch.Tensor, chunk: Chunk, pieces: Callable[[Any], Any]) -> None:
        """Compute a chunk's keys and values only."""
        with suppress(KeysAreComplete):
            self.again().compute(hidden, chunk=chunk, pieces=pieces)

    @contextmanager
    def _random_numbers(self, place: int, device: torch.device) -> Iterator[None]:
        """Inside, the random numbers of the first computation of these tokens, if the layer draws any."""
        if not self.is_training or not _draws(self.function):
            yield
        elif not self.is_again:
            self.random[place] = torch.get_rng_state(), accelerators_state()
            yield
        else:
            with same_random_numbers(device.type):
                of_cpu, of_accelerator = self.random[place]
                torch.set_rng_state(of_cpu)
                if of_accelerator is not None:
                    set_random_state(of_accelerator)
                yield


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, hidden: torch.Tensor, residency: Residency, run: _Run, call: _Call
    ) -> torch.Tensor:
        ctx.residency, ctx.run, ctx.index = residency, run, call.index
        residency.keep(run, call, hidden)
        return residency.forward(run, call, hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        call = ctx.run.calls.pop(ctx.index)
        grad_input = ctx.residency.backward(ctx.run, call, grad, needs_input_grad=ctx.needs_input_grad[1])
        return None, grad_input, None, None, None


class _RowsOf(torch.autograd.Function):
    """Some rows of the last hidden state, on the device; their gradient is a whole one again, where the hidden state was."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, predictor_N: torch.Tensor, is_on_host: bool, device: torch.device
    ) -> torch.Tensor:
        ctx.shape, ctx.is_on_host, ctx.device = hidden.shape, is_on_host, device
        ctx.save_for_backward(predictor_N)
        if is_on_host:
            wait_for_copies(device)
        return hidden[0, predictor_N.to(hidden.device)].to(device)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (predictor_N,) = ctx.saved_tensors
        if not ctx.is_on_host:
            grad = grad_ND.new_zeros(ctx.shape)
            grad[0].index_put_((predictor_N,), grad_ND, accumulate=True)
            return grad, None, None, None
        grad = empty_on_host(ctx.shape, grad_ND.dtype, ctx.device, HOST_INPUTS)
        wait_for_copies(ctx.device)
        grad.zero_()
        with counted_as(HOST_INPUTS):
            grad[0].index_put_((predictor_N.to(grad.device),), grad_ND.to(grad.device), accumulate=True)
        return grad, None, None, None


def _spans(tokens: int, chunk: int) -> list[tuple[int, int]]:
    return [(a, min(a + chunk, tokens)) for a in range(0, tokens, chunk)]


def _piece_of(whole: torch.Tensor, a: int, b: int, device: torch.device, home: Home) -> torch.Tensor:
    return on_device(whole[:, a:b], device, home)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the CPU can read."""
    return tensor.clone() if tensor.device.type in ("cpu", "meta") else tensor.to("cpu")


def _draws(function: Callable[..., Any]) -> bool:
    """Whether a layer's forward, bound to the layer, draws random numbers."""
    layer = function.args[0]  # type: ignore[attr-defined]
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in layer.modules())


def _computing_device(layer: torch.nn.Module) -> torch.device:
    """The device of the parameters that never leave it: norms and factors."""
    parameters = list(layer.parameters())
    return next((p for p in parameters if p.requires_grad or p.dim() == 1), parameters[0]).device


def _final_norm(decoder: torch.nn.Module) -> str | None:
    """The name of the norm after the last layer, if it is the decoder's last step; None if other modules follow the layers."""
    names = [name for name, _ in decoder.named_children()]
    first = next(i for i, child in enumerate(decoder.children()) if isinstance(child, torch.nn.ModuleList)) + 1
    after = [name for name in names[first:] if list(decoder.get_submodule(name).parameters()) and name in _FINAL_NORMS]
    others = [name for name in names if name.startswith("project")]
    return after[0] if len(after) == 1 and not others else None


_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "layer_norm")


@contextmanager
def _without(decoder: torch.nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the decoder's submodule `name` returns its input."""
    if name is None:
        yield
        return
    module = decoder._modules[name]
    decoder._modules[name] = torch.nn.Identity()
    try:
        yield
    finally:
        decoder._modules[name] = module
