"""Before the first step: the largest micro-batch of the real data, forward and backward once, so that what does not fit shows now.

    in    TrainState with its optimizer's state made, the batch       out    `Preflight`: bytes by phase and part, and layer by layer
    left  as it was: random numbers, gradients, weights; only the footprint is a leaner one where the first did not fit

`within_memory` is the answer to running out of memory, here and in every step: the next leaner footprint, said out loud, and the same
work again from the same random numbers. It begins after the failed work's exception is gone: a traceback keeps tensors alive.
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
from qlora_lite.model.resident import residents
from qlora_lite.training.footprint import Footprint, apply_footprint
from qlora_lite.training.optimizer import is_paged
from qlora_lite.training.state import TrainState
from qlora_lite.training.step import Observer, forward_backward

Result = TypeVar("Result")
Leaner = Callable[[Footprint], Footprint | None]


@dataclass(frozen=True)
class Preflight:
    """What one micro-batch held, storage by storage; what operators allocate inside themselves is no part of it."""

    phases: dict[str, dict[str, int]]  # forward, head, backward -> bytes by part at that phase's peak
    moments: tuple[Moment, ...]  # in order: the most that was held until a layer was done, phases named as above


def within_memory(
    state: TrainState, work: Callable[[Footprint], Result], *, leaner: Leaner, say: Callable[[str], None], what: str
) -> Result:
    """`work(state.footprint)`, again with leaner ones as long as memory runs out. Raises DoesNotFit when none is left.

    `work` may change gradients and random numbers, nothing else, before it runs out of memory.
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
                f"{what}: out of memory ({message}), with the leanest settings there are ({state.footprint}). Use a smaller "
                "data.max_seq_length, lora.r or model"
            )
        say(f"{what}: out of memory ({message}). Again with {following}, which gives the same result more slowly")
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
    """Try the last of `make_batches(footprint)`, the micro-batches of a step, as it will be when the others are done.

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
                what="trying the largest micro-batch",
            )  # fmt: skip
    finally:
        state.model.train(was_training)
        _give_back()


def _try(state: TrainState, batches: Sequence[Batch], footprint: Footprint, device: str) -> Preflight:
    batch = batches[-1].to(device)
    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    ledger = _ledger(state, batch)
    try:
        for parameter in trained if len(batches) > 1 else ():  # the others' gradients
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
            ledger.current = "recompute"  # the embedding comes last on the way back
            ledger.mark("embedding")
    finally:
        state.optimizer.zero_grad(set_to_none=True)
    return Preflight(
        phases={PHASES[name]: parts for name, parts in ledger.peaks.items()},
        moments=tuple(Moment(PHASES[m.phase], m.name, m.num_bytes) for m in ledger.moments),
    )


class _MarkingHead(Observer):
    """A mark when the loss has been computed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def see_loss(self, batch: Batch, loss: float) -> None:
        self._ledger.mark("head")


def _ledger(state: TrainState, batch: Batch) -> Ledger:
    """With all that is there already."""
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
    """A mark when a layer has been computed, and when its gradient is about to be."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [layer.register_forward_hook(_mark_layer(ledger, str(i))) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _holding_gradients(trained: Sequence[torch.nn.Parameter], ledger: Ledger) -> Iterator[None]:
    """A gradient counts as one as soon as it is there."""
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
            hidden.register_hook(lambda _: ledger.mark(name))  # all behind this layer is done

    return hook


def _give_back() -> None:
    give_back_free_memory()
    give_back_cache()
