"""The memory of evaluation, rehearsed with its own code on the meta device: the validation loss and a batch of answers.

    validation   `batch_loss` of the largest batch without gradients, but with the optimizer's state: it interrupts training
    prompt       transformers' `generate` on a batch of prompts: activations of B x T tokens, a mask of B x T x T for padded prompts,
                 keys and values of every layer
    reading      if prompts may share prefixes: one packed sequence of all prompts, its keys and values and their padded copy
    answer       its last two steps, when the cache has T + new tokens: each step reallocates a layer's keys and values, one longer

In: a `Stage` and a `Scoring`. Out: one more phase of a `Rehearsal`, `evaluate`, the highest of these. Keys, values and the head's
logits of one position each count as activations. Answers are generated before and after training, without an optimizer.

The most expensive batch depends on the prompts: long ones need a large mask, short ones are many per batch and each grows by an answer.
B prompts of T tokens need a sum of multiples of B T, B T^2 and B. For full batches (equal B T), the largest sum is that of the longest
prompts or that of the most prompts: these two are rehearsed.

`generate` reads two values that meta tensors lack: whether the mask hides anything, and whether all answers have ended. The ledger
supplies them (`_answering`). The steps between are skipped: tensors of their shape are put into the cache.

Left out: packing buffers of the CPU's matrix products, about 100 KB per thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache

from qlora_lite.evaluation.generate import (
    BATCH_TOKENS,
    generate_batch,
    generating,
    greedy,
    length_batches,
    read_prompts,
)
from qlora_lite.memory.ledger import PAGED
from qlora_lite.model.forward import causal_lm
from qlora_lite.plan.rehearsal import MicroBatch, Phases, Rehearsal, Scene, Stage, attention_on, meta_batch
from qlora_lite.training.step import batch_loss


@dataclass(frozen=True)
class Scoring:
    """The work of an evaluation. `prompts` are the token counts of all prompts to answer; empty if only the loss is computed.

    For unknown prompts, the expected number of prompts of the longest length is an upper bound, except for very short prompts.
    """

    validation: MicroBatch  # the largest batch of the validation loss
    prompts: tuple[int, ...] = ()
    max_new_tokens: int = 32
    batch_tokens: int = BATCH_TOKENS
    share_prefixes: bool = False  # prompts are packed as prefix trees
    longest: int = 0  # tokens of the longest held-out example; 0 if unknown

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """-> (number of prompts, tokens of the longest) of the batch with the longest prompts and of the one with most prompts."""
        indices = list(length_batches(self.prompts, self.batch_tokens))
        sizes = [(len(batch), max(self.prompts[i] for i in batch)) for batch in indices]
        return tuple(dict.fromkeys([*sizes[:1], *sorted(sizes)[-1:]]))


def with_evaluation(rehearsal: Rehearsal, parts: dict[str, int]) -> Rehearsal:
    """Return the rehearsal with a phase `evaluate` beside those of a step; the run's peak is the highest of all."""
    return replace(rehearsal, stretches={**rehearsal.stretches, "evaluate": parts})


def rehearse_evaluation(stage: Stage, scoring: Scoring) -> dict[str, int]:
    """Return bytes by part at the highest peak of an evaluation."""
    moments = stage.rehearse_phases(lambda scene: evaluation_moments(scene, scoring))
    return max(moments.values(), key=lambda parts: sum(parts.values()))


def evaluation_moments(scene: Scene, scoring: Scoring) -> Phases:
    """Return bytes by part at the peaks of the validation loss, of each batch of prompts and of its answers' last steps."""
    moments = {"validation": _validation(scene, scoring.validation)}
    for num_prompts, length in scoring.batches:
        phases = _generation(
            scene,
            num_prompts,
            length,
            max_new_tokens=scoring.max_new_tokens,
            share_prefixes=scoring.share_prefixes and length > 1,
        )
        moments |= {f"{name}, {num_prompts} of {length} tokens": parts for name, parts in phases.items()}
    return moments


def _validation(scene: Scene, micro_batch: MicroBatch) -> dict[str, int]:
    batch, model = meta_batch(micro_batch), scene.model.eval()
    scene.ledger.forget_peaks()
    scene.ledger.hold("activations", batch.input_ids_1T, batch.position_ids_1T, batch.predictor_N, batch.target_N)
    with scene.ledger, attention_on(scene.ledger.card), torch.no_grad():
        batch_loss(model, batch).item()
    return scene.ledger.peak


def _generation(scene: Scene, num_prompts: int, length: int, *, max_new_tokens: int, share_prefixes: bool) -> Phases:
    """Rehearse the answers: the first token is the prompt's forward pass, each later one a step that lengthens the cache by one.

    With `share_prefixes` the prompts are read first as one packed sequence, as if they shared no tokens: the upper bound.
    """
    cache = DynamicCache(config=causal_lm(scene.model).config.get_text_config(decoder=True))
    prompt = _ids_and_mask(num_prompts, length)  # held until the answers are complete
    scene.ledger.hold("activations", *prompt)
    phases: Phases = {}
    if share_prefixes:
        cache, phases["reading"] = _read(scene, num_prompts, length)
    if max_new_tokens <= 3:
        return phases | {"prompt": _generate(scene, *prompt, cache, num_tokens=max_new_tokens)}
    phases["prompt"] = _generate(scene, *prompt, cache, num_tokens=2)
    _lengthen(scene, cache, max_new_tokens - 4)
    longer = _ids_and_mask(num_prompts, length + max_new_tokens - 2)
    scene.ledger.hold(PAGED, *longer)  # in place of the prompt's, already counted; only tensors made from them count
    phases["answer"] = _generate(scene, *longer, cache, num_tokens=2)
    return phases


def _read(scene: Scene, num_prompts: int, length: int) -> tuple[Cache, dict[str, int]]:
    """-> (keys and values of all but the prompts' last tokens, parts at the peak)."""
    tree = meta_batch(MicroBatch(length, num_prompts, 0.0))
    scene.ledger.forget_peaks()
    scene.ledger.hold("activations", tree.input_ids_1T, tree.position_ids_1T, tree.predictor_N, tree.target_N)
    with scene.ledger, attention_on(scene.ledger.card), generating(scene.model):
        cache = read_prompts(scene.model, tree)
    return cache, {part: size for part, size in scene.ledger.peak.items() if part != "optimizer"}


def _generate(
    scene: Scene, ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: DynamicCache, *, num_tokens: int
) -> dict[str, int]:
    """Return parts at the peak of `num_tokens` forward passes; the cache already holds the first tokens of each prompt."""
    ledger, model = scene.ledger, scene.model
    ledger.forget_peaks()
    with ledger, attention_on(ledger.card), generating(model), _answering(scene, len(ids_BT) > 1, num_tokens):
        config = greedy(stop_token=0, max_new_tokens=num_tokens + 1)
        generate_batch(model, ids_BT, mask_BT, config=config, cache=cache)
    return {part: size for part, size in ledger.peak.items() if part != "optimizer"}


def _ids_and_mask(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT, mask_BT = (torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(2))
    return ids_BT, mask_BT


def _lengthen(scene: Scene, cache: DynamicCache, num_tokens: int) -> None:
    """Append `num_tokens` to the cache, the last one separately: a layer with a sliding window drops old tokens at each step."""
    for index, layer in enumerate(cache.layers):
        for count in (num_tokens - 1, 1) if num_tokens else ():
            keys, values = (
                torch.empty(*old.shape[:-2], count, old.shape[-1], dtype=old.dtype, device="meta")
                for old in (layer.keys, layer.values)
            )
            cache.update(keys, values, index)
        scene.ledger.hold("activations", layer.keys, layer.values)


@contextmanager
def _answering(scene: Scene, is_padded: bool, num_tokens: int) -> Iterator[None]:
    """Supply the values that generation reads: the mask is not all ones, no check fails, and all answers end together."""
    ledger, before, num_done = scene.ledger, scene.ledger.answer, 0

    def count(*_: Any) -> None:
        nonlocal num_done
        num_done += 1

    def answer(operator: Any) -> float:
        if operator is torch.ops.aten.all.default:
            return float(not is_padded)
        return float(num_done == num_tokens)

    hook = causal_lm(scene.model).register_forward_hook(count)
    ledger.answer = answer
    try:
        yield
    finally:
        ledger.answer = before
        hook.remove()
