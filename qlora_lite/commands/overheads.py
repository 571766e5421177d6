"""Measurements on this machine that a planning ledger cannot make: memory of libraries, waste of allocators, time of 4-bit weights.

    in    cpu or cuda
    out   a dict. Sizes end in _bytes, times in _s; `_tokens` is a time in tokens: the number of tokens whose bf16 product with the same
          weight takes as long. A repeated measurement is {"median", "low", "high", "num"}

    CPU    imports_rss_bytes         resident memory after training's imports, before any model
           step_peak_bytes           peak of a training step above its start, by the allocator
           step_rss_growth_bytes     growth in the same step, by the system (None where Linux does not report it)
           allocator_overhead_bytes  the difference of the two
    CUDA   context_bytes             memory of the card outside torch's allocator: the context and the kernels that training loads
           cublas_workspace_bytes    growth of the allocator in the first bf16 product, for one handle
           step_allocated_bytes, step_reserved_bytes    peaks in training steps on rows of many lengths
           fragmentation_bytes       the difference of the two
    both   dequantize                time to dequantize NF4 weights of 1,536 x 4,096, more than the cache holds, against products with them

The measurement runs in its own process, which has imported and allocated nothing before; the calling process measures the context from
outside. The CUDA half has not run on a card yet.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_lite import show
from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.base.known import known_config
from qlora_lite.base.quantization import BLOCK, Quantization
from qlora_lite.data.batches import pack_batch
from qlora_lite.data.template import Encoded
from qlora_lite.device.accelerator import card_at, free_memory, is_accelerator, synchronize, torch_module
from qlora_lite.errors import UserError
from qlora_lite.files.cache import default_cache
from qlora_lite.memory.measuring import measure_allocations, rss_bytes
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.dtypes import choose_types
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.load import checkpoint_activations
from qlora_lite.model.random_model import random_model
from qlora_lite.training.optimizer import make_optimizer
from qlora_lite.training.step import update

# Shapes: on the CPU, the fewest layers that stand out from noise; on a card, layers of a commonly tuned width if it can hold a few.
CPU_MODEL, CARD_MODEL, SMALL_CARD_MODEL = ("smollm2-135m", 4), ("llama-3.1-8b", 4), ("smollm2-135m", 30)
LARGE_CARD = 12 * 2**30  # bytes
LENGTH, LABEL_SHARE = 512, 0.1
CARD_LENGTHS = tuple(
    range(256, 2817, 128)
)  # tokens of a micro-batch; `measure_card` orders them so that they leave holes
NUM_STEPS = 5
NUM_WRITES = 3
WEIGHT = (1536, 4096)  # out, in: a layer of a 7B model
NUM_TOKENS = (64, 128, 256, 512, 1024, 2048)
NUM_ROUNDS = 9
CACHES = 4  # weights of a round, in multiples of the card's cache, so that they are not read from it
_ROOT = Path(__file__).resolve().parent.parent


def measure(device: str) -> dict[str, Any]:
    """Measure for half a minute. Raises UserError when the measuring process fails; that process prints its own error on stderr."""
    before = _free_bytes(device)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(_ROOT), *_path()])}
    command = [sys.executable, "-m", "qlora_lite.commands.overheads", device, str(NUM_ROUNDS)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), None)
        held = before - _free_bytes(device)  # while the process still runs
        process.stdin.close()  # ends the process
    if line is None:
        raise UserError(f"--measure: the measuring process ended with exit code {process.returncode} and no result")
    measured: dict[str, Any] = json.loads(line)
    del measured["schema_version"]  # belongs to a whole document; this is a part of one
    measured["disk_write_bytes_per_s"] = disk_write_rate(default_cache())
    if is_accelerator(device):
        measured["context_bytes"] = held - measured.pop("reserved_bytes")
    return measured


def disk_write_rate(folder: Path, *, num_bytes: int = 64 * 2**20) -> dict[str, float]:
    """Durable write speed of `folder` in bytes per second, as for a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    data, rates = os.urandom(num_bytes), []
    for _ in range(NUM_WRITES):
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            begin = time.perf_counter()
            file.write(data)
            os.fsync(file.fileno())
            rates.append(num_bytes / (time.perf_counter() - begin))
    return spread(rates)


def _path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _free_bytes(device: str) -> int:
    return free_memory()[0] if is_accelerator(device) else 0


def main(device: str, num_rounds: int) -> None:
    """The measuring process: print one JSON document, then wait for the end of stdin, so that the caller can see its memory."""
    measured = measure_card(device) if is_accelerator(device) else measure_cpu()
    with show.phase("measuring the time to dequantize a weight"):
        measured["dequantize"] = dequantize_price(device, num_rounds=num_rounds)
    if is_accelerator(device):
        measured["reserved_bytes"] = torch_module().memory_reserved()
    show.print_json({"device": device, **measured})
    sys.stdin.read()


def measure_cpu() -> dict[str, Any]:
    """Measure the process and its allocator."""
    imports = rss_bytes()
    with show.phase("measuring steps of training, by the system and by the allocator"):
        step = partial(training("cpu", *CPU_MODEL), [LENGTH] * 2)
        step()  # makes all one-time allocations
        growths = [growth for growth in (rss_growth(step) for _ in range(NUM_STEPS)) if growth is not None]
        with measure_allocations("cpu") as allocations:
            step()
    return {
        "imports_rss_bytes": imports,
        "step_peak_bytes": allocations.peak_bytes,
        "step_rss_growth_bytes": spread(growths) if growths else None,
        "allocator_overhead_bytes": spread([g - allocations.peak_bytes for g in growths]) if growths else None,
    }


def measure_card(device: str) -> dict[str, Any]:
    """Measure cuBLAS and the caching allocator, in which alternating long and short rows leave holes."""
    card, torch_cuda = card_at(device), torch_module()
    with show.phase("measuring steps of training on the card"):
        workspace = cublas_workspace_bytes(device)
        step = training(device, *(CARD_MODEL if card.memory_bytes >= LARGE_CARD else SMALL_CARD_MODEL))
        torch_cuda.reset_peak_memory_stats()
        half = len(CARD_LENGTHS) // 2
        for short, long in zip(CARD_LENGTHS[:half], reversed(CARD_LENGTHS[half:]), strict=False):
            step([long])
            step([short])
        synchronize(device)
        allocated, reserved = torch_cuda.max_memory_allocated(), torch_cuda.max_memory_reserved()
    return {
        "card": card.name,
        "cublas_workspace_bytes": workspace,
        "step_allocated_bytes": allocated,
        "step_reserved_bytes": reserved,
        "fragmentation_bytes": reserved - allocated,
    }


def cublas_workspace_bytes(device: str) -> int:
    """Bytes that the first product of a process leaves in the allocator."""
    dtype = choose_types("auto", card_at(device)).compute
    left, right = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
    before = torch_module().memory_allocated()
    product = left @ right
    synchronize(device)
    return torch_module().memory_allocated() - before - product.nbytes  # 512 KiB, a multiple of the allocator's blocks


def training(device: str, model_name: str, num_layers: int) -> Callable[[Sequence[int]], None]:
    """-> a function that runs one optimizer step of QLoRA on rows of the given lengths, by training's own code."""
    types = choose_types("auto", card_at(device))
    config = known_config(model_name)
    config.num_hidden_layers = num_layers
    base = random_model(config, quantization=Quantization("nf4"), device=device, compute=types.compute)
    model = attach_adapter(base, Lora(r=16, lora_alpha=32), factor_dtype=types.factors)
    checkpoint_activations(causal_lm(model), every=1)
    optimizer = make_optimizer(model.named_parameters(), name="adamw", learning_rate=1e-4, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device, enabled=types.scale_loss)
    model.train()

    def step(lengths: Sequence[int]) -> None:
        examples = [Encoded([0] * length, ((length - round(LABEL_SHARE * length), length),)) for length in lengths]
        batch = pack_batch(examples, range(len(examples))).to(device)
        update(model, optimizer, [batch], scaler=scaler, max_grad_norm=1.0)
        optimizer.zero_grad(set_to_none=True)

    return step


def rss_growth(work: Callable[[], object]) -> int | None:
    """Peak resident bytes while `work` runs, above the start; None where the system cannot reset the peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM (proc_pid_clear_refs(5))
    except OSError:
        return None
    before = rss_bytes()
    work()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    highest = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * highest - before


def dequantize_price(
    device: str, *, num_rounds: int, shape: tuple[int, int] = WEIGHT, num_tokens: Sequence[int] = NUM_TOKENS
) -> dict[str, Any]:
    """Seconds to dequantize a weight [out, in], and the same in tokens of a product with it.

    Every round measures both, so that a busy moment affects both. Each time is that of enough weights to fill the device's cache several
    times, without waiting between them, so that neither the cache nor kernel launches dominate.
    """
    card = card_at(device)
    dtype = choose_types("auto", card).compute
    weight_OI = torch.randn(shape, device=device).to(dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight_OI, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    num_weights = 1 if card.is_cpu else max(1, math.ceil(CACHES * card.l2_bytes / packed.nbytes))
    stored = [packed.clone() for _ in range(num_weights)]
    plain = [
        weight_OI.clone() for _ in range(min(num_weights, math.ceil(CACHES * card.l2_bytes / weight_OI.nbytes) or 1))
    ]
    inputs_TI = {tokens: torch.randn(tokens, shape[1], device=device).to(dtype) for tokens in num_tokens}
    dequantize_s: list[float] = []
    product_s: dict[int, list[float]] = {tokens: [] for tokens in num_tokens}
    for _ in range(1 + num_rounds):
        dequantize = [partial(bitsandbytes.functional.dequantize_4bit, weight, state) for weight in stored]
        dequantize_s.append(_seconds(device, dequantize))
        for tokens, x_TI in inputs_TI.items():
            product_s[tokens].append(_seconds(device, [partial(torch.matmul, x_TI, weight.T) for weight in plain]))
    dequantize_s, product_s = dequantize_s[1:], {tokens: times_s[1:] for tokens, times_s in product_s.items()}  # warm
    price = {
        tokens: [tokens * one_s / other_s for one_s, other_s in zip(dequantize_s, times_s, strict=True)]
        for tokens, times_s in product_s.items()
    }
    return {
        "weight_shape": list(shape),
        "dequantize_s": spread(dequantize_s),
        "products": [
            {"num_tokens": n, "product_s": spread(product_s[n]), "dequantize_tokens": spread(price[n])}
            for n in num_tokens
        ],
        "dequantize_tokens": spread([tokens for tokens_by_round in price.values() for tokens in tokens_by_round]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest, and the number of values."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "num": len(values)}


def _seconds(device: str, work: Sequence[Callable[[], object]]) -> float:
    """Mean seconds per piece of `work`."""
    synchronize(device)
    begin = time.perf_counter()
    for piece in work:
        piece()
    synchronize(device)
    return (time.perf_counter() - begin) / len(work)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
