"""Items 8 to 10: where a step's time goes, attention at lengths that were never seen, and managed memory."""

import contextlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu.common import Found, device, timed
from gpu.peaks import EIGHT_B, batch_of, step_of
from qlora_lite.device.accelerator import card_here
from qlora_lite.device.numerics import exact_sums
from qlora_lite.evaluation.generate import generate_batch, generating, greedy
from qlora_lite.model.tree_attention import NO_PARENT, parts_of, tree_attention
from qlora_lite.plan.rehearsal import MicroBatch
from qlora_lite.training import make_optimizer, state_bytes
from qlora_lite.training.step import forward_backward


def speed() -> Found:
    """Llama-3.1-8B's shape: seconds of a step, kernels launched, how long the card idles, decoding, the update, the product both ways."""
    micro_batch = MicroBatch(2048, 1, 0.1)
    model, step = step_of(EIGHT_B, micro_batch, 1)
    step(measured=False)
    seconds = [timed(partial(step, measured=False)) for _ in range(5)]
    found: Found = {
        "tokens": micro_batch.num_tokens,
        "step_s": {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)},
        "tokens_per_s": micro_batch.num_tokens / statistics.median(seconds),
        **_launches(partial(step, measured=False)),
        **_update_seconds(model, micro_batch),
        "decoding": _decoding(model),
        "product": _product_times(),
    }
    return found


def _launches(work: Callable[[], object]) -> Found:
    """Kernels of one step, and the share of its time that none ran."""
    from torch.profiler import profile, supported_activities

    with profile(activities=supported_activities()) as profiler:
        elapsed = timed(work)
    kernels = [
        event
        for event in profiler.events()
        if "cuda" in str(event.device_type).lower()
        and event.device_time > 0
        and not getattr(event, "is_user_annotation", False)  # a span over kernels
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    busy_s = sum(event.device_time for event in kernels) / 1e6
    by_name: dict[str, float] = {}
    for event in kernels:
        by_name[event.name[:80]] = by_name.get(event.name[:80], 0.0) + event.device_time / 1e6
    top = dict(sorted(by_name.items(), key=lambda pair: -pair[1])[:15])
    return {"launches": len(kernels), "busy_s": busy_s, "idle_share": 1 - busy_s / elapsed, "top_kernels_s": top}


def _update_seconds(model: Any, micro_batch: MicroBatch) -> Found:
    """Of the gradient and of the update apart."""
    optimizer = make_optimizer(model.named_parameters(), name="paged_adamw_8bit", learning_rate=1e-4, weight_decay=0.0)
    batch = batch_of(micro_batch)
    gradient_s = timed(lambda: forward_backward(model, [batch]))
    return {"gradient_s": gradient_s, "update_s": timed(optimizer.step)}


def _decoding(model: Any) -> Found:
    """Greedy, one prompt and sixteen; with the adapter and without."""
    found = {}
    for name, num_prompts in (("one", 1), ("sixteen", 16)):
        ids = torch.ones(num_prompts, 128, dtype=torch.int64)
        for which in ("adapter", "base"):
            with generating(model), model.disable_adapter() if which == "base" else contextlib.nullcontext():
                config = greedy(stop_token=-1 % 2**31, max_new_tokens=16)
                work = partial(generate_batch, model, ids, torch.ones_like(ids), config=config)
                work()
                found[f"{name}, {which}, tokens_per_s"] = 16 * num_prompts / timed(work)
    return found


def _product_times() -> Found:
    """One layer of 4,096 x 4,096 with rank 16 on 2,048 tokens: joined, added in place, and as peft has it."""
    x, weight = (torch.randn(n, 4096, device=device(), dtype=torch.bfloat16) for n in (2048, 4096))
    hidden, factor = (
        torch.randn(2048, 16, device=device(), dtype=torch.bfloat16),
        torch.randn(4096, 16, device=device(), dtype=torch.bfloat16),
    )
    ways: dict[str, Callable[[], object]] = {
        "joined": lambda: torch.cat([x, hidden], 1) @ torch.cat([weight, factor], 1).T,
        "added in place": lambda: (hidden @ factor.T).addmm_(x, weight.T),
        "peft": lambda: x @ weight.T + hidden @ factor.T,
    }
    return {
        name: statistics.median(timed(lambda work=work: [work() for _ in range(20)]) / 20 for _ in range(5))
        for name, work in ways.items()
    }


def shapes() -> Found:
    """Seconds of attention, forward and backward, at thirty lengths that were never seen, and at each again."""
    dtype = torch.bfloat16 if (card := card_here()) is not None and card.has_bf16 else torch.float16

    def attend(length: int) -> None:
        tensors = [
            torch.randn(1, length, heads, 128, device=device(), dtype=dtype).transpose(1, 2) for heads in (32, 8, 8)
        ]
        with exact_sums():
            output = tree_attention(
                *(t.requires_grad_() for t in tensors), parts_of((length,), (NO_PARENT,)), scaling=0.1
            )
            output.sum().backward()

    attend(500)
    lengths = [503 + 61 * index for index in range(30)]
    first = [timed(partial(attend, length)) for length in lengths]
    again = [timed(partial(attend, length)) for length in lengths]
    ratio = statistics.median(a / b for a, b in zip(first, again, strict=True))
    assert ratio < 3, {"first": first, "again": again}
    return {"lengths": lengths, "first_s": first, "again_s": again, "first_over_again": ratio}


def paged() -> Found:
    """Three updates with state in managed memory, small: bitsandbytes keeps it as long as the process lives."""
    weight = torch.nn.Parameter(torch.randn(2000, 500, device=device(), dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    optimizer = make_optimizer([("weight", weight)], name="paged_adamw_8bit", learning_rate=1e-3, weight_decay=0.0)
    seconds = []
    for _ in range(3):
        weight.grad = torch.randn(weight.shape, device=device())
        seconds.append(timed(optimizer.step))
    on_device, in_managed = state_bytes(optimizer)
    assert in_managed == 2 * weight.numel(), (on_device, in_managed)
    assert bool(torch.isfinite(weight).all())
    return {"paged_bytes": in_managed, "update_s": seconds}
