"""Try the largest micro-batch before the first step: one forward and backward pass, so that a lack of memory shows early.

    in         TrainState with the optimizer's state, the batch      out    `Preflight`: bytes by phase and part, and layer by layer
    unchanged  random numbers, gradients, weights; only the footprint becomes leaner if the first one does not fit

`within_memory` handles a lack of memory, here and in every step: it reports the next leaner footprint and repeats the same work from
the same random numbers, after the exception of the failed work is gone: a traceback keeps tensors alive.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lite.data.batches import Batch
from qlora_lite.device.accelerator import card_at, give_back_cache, same_random_numbers
from qlora_lite.device.out_of_memory import is_out_of_memory
from qlora_lite.errors import DoesNotFit
from qlora_lite.memory.ledger import PAGED, PHASES, Ledger, Moment
from qlora_lite.memory.measuring import give_back_free_memory
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.host_tensors import give_back_host_memory
from qlora_lite.model.resident import residents
from qlora_lite.training.footprint import Footprint, apply_footprint
from qlora_lite.training.optimizer import is_paged
from qlora_lite.training.state import TrainState
from qlora_lite.training.step import Observer, forward_backward

Result = TypeVar("Result")
Leaner = Callable[[Footprint], Footprint | None]


@dataclass(frozen=True)
class Preflight:
    """The memory of one micro-batch, counted by storage, without internal allocations of operators."""

    phases: dict[str, dict[str, int]]  # forward, head, backward -> bytes by part at that phase's peak
    on_host: dict[str, int]  # bytes in host memory by part, at the peak of their sum
    moments: tuple[Moment, ...]  # in order: the peak up to the end of each layer, phases named as above


def within_memory(
    state: TrainState, work: Callable[[Footprint], Result], *, leaner: Leaner, say: Callable[[str], None], name: str
) -> Result:
    """Return `work(state.footprint)`, retried with leaner footprints while memory runs out. Raises DoesNotFit after the leanest.

    `name` is the work in messages. Before it runs out of memory, `work` may change gradients and random numbers only.
    """
    while True:
        assert state.footprint is not None
        before = state.random_numbers()
        try:
            return work(state.footprint)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).split("\n")[0]
        state.optimizer.zero_grad(set_to_none=True)
        _give_back()
        state.restore_random_numbers(before)
        following = leaner(state.footprint)
        if following is None:
            raise DoesNotFit(
                f"{name}: out of memory ({message}), even with the leanest settings ({state.footprint}). Use a smaller "
                "data.max_seq_length, lora.r or model"
            )
        say(f"{name}: out of memory ({message}). Retrying with {following}: same result, slower")
        state.footprint = following
        apply_footprint(state.model, following)


def try_largest_batch(
    state: TrainState,
    make_batches: Callable[[Footprint], Sequence[Batch]],
    *,
    device: str,
    leaner: Leaner,
    say: Callable[[str], None],
) -> Preflight:
    """Try the last of `make_batches(footprint)`, the micro-batches of a step, with gradients of the earlier ones in memory.

    Raises DoesNotFit.
    """
    assert state.footprint is not None
    apply_footprint(state.model, state.footprint)
    was_training = state.model.training
    state.model.train()
    try:
        with same_random_numbers(device):
            return within_memory(
                state, lambda footprint: _try(state, make_batches(footprint), footprint, device), leaner=leaner, say=say,
                name="trying the largest micro-batch",
            )  # fmt: skip
    finally:
        state.model.train(was_training)
        _give_back()


def _try(state: TrainState, batches: Sequence[Batch], footprint: Footprint, device: str) -> Preflight:
    batch = batches[-1].to(device)
    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    ledger = _ledger(state, batch)
    try:
        for parameter in trained if len(batches) > 1 else ():  # gradients of earlier micro-batches
            parameter.grad = torch.zeros(parameter.shape, dtype=parameter.grad_dtype, device=parameter.device)
            ledger.hold("gradients", parameter.grad)
        with ledger, _marking_layers(causal_lm(state.model), ledger), _holding_gradients(trained, ledger):
            forward_backward(
                state.model,
                [batch],
                backward=lambda loss: state.scaler.scale(loss).backward(),
                observer=_MarkingHead(ledger),
                head_chunk=footprint.head_chunk,
            )
            ledger.current = "recompute"  # the embedding is last in the backward pass
            ledger.mark("embedding")
    finally:
        state.optimizer.zero_grad(set_to_none=True)
    return Preflight(
        phases={PHASES[name]: parts for name, parts in ledger.peaks.items() if name in PHASES},
        on_host={part: size for part, size in ledger.host_peak.items() if part != PAGED},
        moments=tuple(Moment(PHASES.get(m.phase, m.phase), m.name, m.num_bytes) for m in ledger.moments),
    )


class _MarkingHead(Observer):
    """Marks the ledger when the loss has been computed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def see_loss(self, batch: Batch, loss: float) -> None:
        self._ledger.mark("head")


def _ledger(state: TrainState, batch: Batch) -> Ledger:
    """Return a ledger with all tensors that are already in memory."""
    ledger = Ledger(card=card_at(batch.input_ids_1T.device))
    for category, tensors in residents(state.model).items():
        ledger.hold(category, *tensors)
    for value in (value for of_parameter in state.optimizer.state.values() for value in of_parameter.values()):
        if isinstance(value, torch.Tensor):
            ledger.hold(PAGED if is_paged(value) else "optimizer", value)
    ledger.hold("activations", batch.input_ids_1T, batch.position_ids_1T, batch.predictor_N, batch.target_N)
    return ledger


@contextmanager
def _marking_layers(model: torch.nn.Module, ledger: Ledger) -> Iterator[None]:
    """Mark the ledger after each layer of the forward pass, and before each of the backward pass."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [layer.register_forward_hook(_mark_layer(ledger, str(i))) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _holding_gradients(trained: Sequence[torch.nn.Parameter], ledger: Ledger) -> Iterator[None]:
    """Count each gradient in the ledger as soon as it is computed."""
    handles = [p.register_post_accumulate_grad_hook(lambda p: ledger.hold("gradients", p.grad)) for p in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark_layer(ledger: Ledger, name: str) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        ledger.mark(name)
        hidden = output[0] if isinstance(output, Sequence) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: ledger.mark(name))  # all later layers are done

    return hook


def _give_back() -> None:
    give_back_free_memory()
    give_back_cache()
    give_back_host_memory()
