"""Item 7, and what follows the items: steps of real models' shapes with random weights, the plan against the allocator."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.common import Found, device, each
from qlora_lite.base.known import known_config
from qlora_lite.base.quantization import Quantization
from qlora_lite.data.batches import Batch, pack_batch
from qlora_lite.data.template import Encoded
from qlora_lite.device.accelerator import card_here, torch_module
from qlora_lite.memory.ledger import PHASES
from qlora_lite.memory.measuring import measure_allocations
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.policy import PLAIN, Policy
from qlora_lite.model.random_model import random_model
from qlora_lite.plan.rehearsal import MicroBatch, Settings, Stage, num_labels
from qlora_lite.training import Footprint, apply_footprint, make_optimizer
from qlora_lite.training.step import update

REPO = Path(__file__).resolve().parents[2]
EIGHT_B = "llama-3.1-8b"
LARGEST_FIRST = (
    "llama-3.1-70b",
    "qwen2.5-32b",
    "qwen3-14b",
    "llama-3.1-8b",
    "qwen2.5-7b",
    "llama-3.2-3b",
    "llama-3.2-1b",
)
HOMES = (  # tokens, and how they are made to fit
    (32_768, Policy(2048, "fewest")),
    (32_768, Policy(2048, "host", embeddings="host")),
    (4096, Policy(2048, "host_fewest", 0, embeddings="host", head="streamed", keys_values="host")),
)
LARGE_ERROR = 2.0  # percent, of a plan against the allocator


def peaks() -> Found:
    """Llama-3.1-8B's shape, random weights: the plan against the allocator, phase by phase; then what varied lengths leave reserved."""
    cells = {
        f"{tokens} tokens, every {every}": partial(cell, EIGHT_B, tokens, every)
        for tokens in (1024, 4096)
        for every in (1, 0)
    }
    cells |= {
        f"{tokens} tokens, {policy}": partial(cell, EIGHT_B, tokens, 1, policy=policy) for tokens, policy in HOMES
    }
    varied = {
        f"reserved after varied lengths, {setting}": partial(_varied_in_a_process, setting)
        for setting in ("expandable_segments:True", "expandable_segments:False")
    }
    return each(cells | varied)


def cell(name: str, tokens: int, every: int, *, r: int = 16, policy: Policy = PLAIN) -> Found:
    """One step of one row: planned and measured, in all and by phase."""
    card = card_here()
    assert card is not None
    micro_batch = MicroBatch(tokens, 1, 0.1)
    planned = Stage(known_config(name), Settings(card=card, r=r, checkpoint_every=every, policy=policy)).rehearse(
        micro_batch
    )
    free = torch_module().mem_get_info()[0]
    if planned.peak_bytes > free:
        return {
            "model": name,
            "tokens": tokens,
            "checkpoint_every": every,
            "left_out": f"planned {planned.peak_bytes:,} of {free:,} bytes",
        }
    gc.collect()
    torch_module().empty_cache()
    before = torch_module().memory_allocated()
    model, step = step_of(name, micro_batch, every, r=r, policy=policy)
    step(measured=False)  # what is made once
    torch_module().reset_peak_memory_stats()
    held = torch_module().memory_allocated()
    phases = step(measured=True)
    measured = held + max(phases.values())
    torch_module().reset_peak_memory_stats()
    step(measured=False)  # the same once more, with the peaks of all counters left alone
    stats = torch_module().memory_stats()
    del model, step
    error = 100 * (planned.peak_bytes / measured - 1)
    return {
        "wrong": [f"{error:+.2f}%"] if abs(error) > LARGE_ERROR else [],
        "model": name, "tokens": tokens, "checkpoint_every": every, "planned_bytes": planned.peak_bytes, "measured_bytes": measured,
        "before_bytes": before, "error_percent": round(error, 3),
        "planned_phases": {phase: sum(parts.values()) for phase, parts in planned.phases.items()},
        "planned_parts": planned.parts,
        "measured_phases": {phase: held + size for phase, size in phases.items()},
        "reserved_bytes": torch_module().max_memory_reserved(),
        "requested_peak_bytes": stats.get("requested_bytes.all.peak"),
        "allocated_peak_bytes": stats.get("allocated_bytes.all.peak"),
    }  # fmt: skip


def step_of(
    name: str, micro_batch: MicroBatch, every: int, *, r: int = 16, policy: Policy = PLAIN
) -> tuple[Any, Callable[..., dict[str, int]]]:
    """A model of random weights, and a function that runs a step whose gradients are there already."""
    base = random_model(known_config(name), quantization=Quantization("nf4"), device=device())
    model = attach_adapter(base, Lora(r=r, lora_alpha=2 * r))
    apply_footprint(model, Footprint(micro_batch.num_tokens, every, policy=policy))
    optimizer = make_optimizer(model.named_parameters(), name="paged_adamw_8bit", learning_rate=1e-4, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device(), enabled=False)
    batch = batch_of(micro_batch)
    model.train()

    def step(*, measured: bool) -> dict[str, int]:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros(parameter.shape, dtype=parameter.grad_dtype, device=device())
        gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not measured:
            update(model, optimizer, [batch], scaler=scaler, max_grad_norm=1.0)
            optimizer.zero_grad(set_to_none=True)
            return {}
        with measure_allocations(device()) as allocations:
            update(model, optimizer, [batch], scaler=scaler, max_grad_norm=1.0)
        optimizer.zero_grad(set_to_none=True)
        return {PHASES[name]: gradients + peak for name, peak in allocations.peaks.items()}

    return model, step


def batch_of(micro_batch: MicroBatch) -> Batch:
    length, labels = micro_batch.length, num_labels(micro_batch)
    rows = [Encoded([0] * length, ((length - labels, length),))] * micro_batch.num_examples
    return pack_batch(rows, range(len(rows))).to(device())


def _varied_in_a_process(allocator: str) -> Found:
    """Twenty lengths, long and short in turn, in a process with this allocator: what is reserved beside what was allocated."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; from gpu.peaks import print_varied; print_varied()"
    command = [sys.executable, "-c", code, str(REPO), str(REPO / "tools")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTORCH_ALLOC_CONF": allocator},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": done.stderr[-800:]}


def print_varied() -> None:
    """Child of `_varied_in_a_process`."""
    from qlora_lite.commands.overheads import CARD_MODEL, measure_card

    found = measure_card(device())
    print(json.dumps(found | {"model": list(CARD_MODEL)}))


def plan_against_allocator(*, until: float) -> Iterator[Found]:
    """Cells of the plan beside the allocator, largest model first, as long as there is time; what the card cannot hold is named."""
    card = card_here()
    assert card is not None
    for name in LARGEST_FIRST:
        for tokens, every in ((1024, 1), (4096, 1)):
            if time.perf_counter() > until:
                return
            planned = Stage(known_config(name), Settings(card=card, checkpoint_every=every)).rehearse(
                MicroBatch(tokens, 1, 0.1)
            )
            if planned.peak_bytes > 0.95 * torch_module().mem_get_info()[0]:
                yield {"model": name, "tokens": tokens, "left_out": f"planned {planned.peak_bytes:,} bytes"}
                continue
            try:
                yield cell(name, tokens, every)
            except Exception as error:  # the next model may still go
                yield {"model": name, "tokens": tokens, "error": f"{type(error).__name__}: {error}"[:500]}
            gc.collect()
            torch_module().empty_cache()
