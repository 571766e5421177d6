"""The items of tools/gpu_check: each a function that returns the values it saw, and names under "wrong" those that do not hold.

    1 versions       what is installed, and how torch's libraries are set          6 gradients   card against CPU, trees, splits
    2 operators      against fp64, and against the CPU to the bit                  7 peaks       an 8B shape against its plan
    3 run            a tiny run through the command line, stopped and resumed      8 speed       where a step's time goes
    4 settings       the same with dropout, DoRA, int8, fp16, fp32                 9 shapes      thirty new lengths through attention
    5 memory         the allocator refuses: the leaner retry                      10 paged       managed memory, last: it may hang a driver

Every item makes its own tensors on DEVICE, which is torch's word for the accelerator: of the card, or of the tests' stand-in.
"""

import contextlib
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import qlora_lite  # noqa: F401  (guards the import of bitsandbytes)
from qlora_lite.data.batches import Batch, pack_batch, pack_trees
from qlora_lite.data.template import Encoded
from qlora_lite.device import accelerator
from qlora_lite.device.accelerator import card_here, synchronize, torch_module
from qlora_lite.device.numerics import exact_sums
from qlora_lite.evaluate.generate import generate_batch, generating, greedy
from qlora_lite.model.adapter import attach_adapter
from qlora_lite.model.base import checkpoint_activations, load_base
from qlora_lite.model.bnb import bitsandbytes, native_library
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.known import known_config
from qlora_lite.model.products import product_in_fp32
from qlora_lite.model.quantization import BLOCK, Quantization
from qlora_lite.model.random_model import random_model
from qlora_lite.model.tree_attention import NO_PARENT, parts_of, tree_attention
from qlora_lite.plan.rehearsal import MicroBatch, Settings, Stage, num_labels
from qlora_lite.train import Footprint, TrainState, make_optimizer
from qlora_lite.train.loop import train_steps
from qlora_lite.train.measure import measure_allocations
from qlora_lite.train.update import accumulate, update
from tests import tiny_model
from tests.tiny_run import run_cli, write_recipe

REPO = Path(__file__).resolve().parent.parent
PRECISION = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-5}
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
LARGE_ERROR = 2.0  # percent, of a plan against the allocator
Found = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One check."""

    number: int
    name: str
    work: Callable[[], Found]
    on_stand_in: bool = False


@contextlib.contextmanager
def on_device(*, stand_in: bool) -> Iterator[None]:
    """The card, or the tests' stand-in for one."""
    if not stand_in:
        yield
        return
    from tests import standin

    with standin.card("rtx-4090"):
        yield


def chosen(only: Sequence[int] | None, *, stand_in: bool) -> list[Item]:
    """In order; on the stand-in those that it can show."""
    return [item for item in ITEMS if (only is None or item.number in only) and (item.on_stand_in or not stand_in)]


def run(item: Item) -> Found:
    """What it saw, or why it does not hold; never raises."""
    begin = time.perf_counter()
    found: Found = {"item": item.number, "name": item.name, "ok": True}
    try:
        found["found"] = item.work()
        found["ok"] = not found["found"].get("wrong")
    except Exception as error:  # each item stands alone
        found |= {
            "ok": False,
            "error": f"{type(error).__name__}: {error}"[:2000],
            "where": traceback.format_exc()[-3000:],
        }
    gc.collect()
    with contextlib.suppress(Exception):
        torch_module().empty_cache()
    return found | {"elapsed_s": round(time.perf_counter() - begin, 2)}


def device() -> str:
    return accelerator.ACCELERATOR


# 1 ---------------------------------------------------------------------------------------------------------------------------------------


def versions() -> Found:
    """Versions, the native library, the card, and how torch's libraries are set before and inside our own context."""
    card, products = card_here(), torch.backends.cuda.matmul
    assert card is not None
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "triton", "numpy")
    installed = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    with exact_sums():
        inside = {
            "allow_bf16_reduced_precision_reduction": products.allow_bf16_reduced_precision_reduction,
            "allow_fp16_reduced_precision_reduction": products.allow_fp16_reduced_precision_reduction,
            "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        }
    assert not any(inside.values()), inside
    library, error = native_library()
    assert library is not None and "_cpu" not in library, (
        f"bitsandbytes' library for this card is not loaded: {error or library}"
    )
    return {
        "versions": installed,
        "cuda": torch.version.cuda,
        "card": vars(card) | {"capability": list(card.capability or ())},
        "known": "assumed" not in card.source,
        "native_library": Path(library).name,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "backends_outside": {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "allow_bf16_reduced_precision_reduction": products.allow_bf16_reduced_precision_reduction,
        },
        "inside": inside,
        "cublas_workspace_bytes": _cublas_workspace(),
        "planned_cublas_workspace_bytes": card.cublas_workspace_bytes,
        "free_bytes": torch_module().mem_get_info()[0],
    }


def _cublas_workspace() -> int:
    from qlora_lite.overheads import cublas_workspace_bytes

    return cublas_workspace_bytes(device())


# 2 ---------------------------------------------------------------------------------------------------------------------------------------


def operators() -> Found:
    """The arithmetic that only a card runs."""
    return _each(
        {
            "dequantize": _dequantized,
            "products": _products,
            "optimizers": _optimizers,
            "attention": _attention,
            "lora_product": _lora_products,
        }
    )


def _each(parts: dict[str, Callable[[], Any]]) -> Found:
    """All of `parts`, whatever one of them raises; "wrong" names those that do not hold."""
    found: Found = {"wrong": []}
    for name, work in parts.items():
        try:
            found[name] = work()
            found["wrong"] += [f"{name}: {each}" for each in _wrong_of(found[name])]
        except Exception as error:  # the others may still tell something
            found[name] = {"error": f"{type(error).__name__}: {error}"[:1500]}
            found["wrong"].append(f"{name}: {type(error).__name__}")
        gc.collect()
        with contextlib.suppress(Exception):
            torch_module().empty_cache()
    return found


def _wrong_of(part: Any) -> list[str]:
    """The cases of a part that it found wrong itself."""
    cases = part if isinstance(part, list) else [part]
    return [str(case["wrong"]) for case in cases if isinstance(case, dict) and case.get("wrong")]


def _dequantized() -> Found:
    """NF4 and FP4 with double quantization: the same values as on the CPU."""
    found = {}
    for kind in ("nf4", "fp4"):
        weight = torch.randn(256, 512).bfloat16()
        quantize = bitsandbytes.functional.quantize_4bit
        packed, state = quantize(weight, blocksize=BLOCK, compress_statistics=True, quant_type=kind)
        expected = bitsandbytes.functional.dequantize_4bit(packed, state)
        state.to(device())
        there = bitsandbytes.functional.dequantize_4bit(packed.to(device()), state)
        found[kind] = {
            "differing_share": (there.cpu() != expected).float().mean().item(),
            "error": _distance(there, expected),
        }
        assert found[kind]["error"] < 4e-3, found
    return found


def _products() -> Found:
    """16-bit inputs, fp32 result, at the ranks of adapters."""
    found = {}
    for rank in (4, 8, 16, 32, 64):
        left, right = torch.randn(rank, 2048).bfloat16(), torch.randn(2048, 512).bfloat16()
        there = product_in_fp32(left.to(device()), right.to(device()))
        assert there.dtype == torch.float32
        found[str(rank)] = _distance(there, left.double() @ right.double())
        assert found[str(rank)] < 1e-5, found
    return found


def _optimizers() -> Found:
    """Three updates of bf16 weights with an fp32 master, in state that is too small to page."""
    found = {}
    for name in ("paged_adamw_8bit", "paged_adamw_32bit", "adamw"):
        after = {place: _updated(name, place) for place in ("cpu", device())}
        differing = (after["cpu"] != after[device()]).float().mean().item()
        found[name] = {"differing_share": differing, "distance": _distance(after[device()], after["cpu"].double())}
        assert found[name]["distance"] < 1e-3, found
    return found


def _updated(name: str, place: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(200, 300, generator=generator).bfloat16().to(place))
    weight.grad_dtype = torch.float32
    optimizer = make_optimizer([("weight", weight)], name=name, learning_rate=1e-2, weight_decay=0.1)
    for _ in range(3):
        weight.grad = torch.randn(weight.shape, generator=generator).to(place)
        optimizer.step()
    return weight.detach().cpu()


TREE = (40, 7, 1, 9, 30, 5, 1), (NO_PARENT, 0, 0, 0, NO_PARENT, 4, 4)  # segments of one token among them
ROWS = (33, 1, 64, 129), (NO_PARENT,) * 4


def _attention() -> list[Found]:
    """Forward and backward over a tree and over rows, for every kernel that this card takes, against plain attention in fp64."""
    card, found = card_here(), []
    assert card is not None
    half = torch.bfloat16 if card.has_bf16 else torch.float16
    for dtype in (half, torch.float32):
        for lengths, parents in (TREE, ROWS):
            for heads, key_heads, width in ((8, 2, 64), (4, 4, 128), (4, 2, 256), (4, 2, 60)):
                errors, bounds = _attention_errors(dtype, heads, key_heads, width, lengths, parents)
                wrong = [name for name in errors if not errors[name] <= bounds[name]]
                case = {"dtype": str(dtype), "kernel": card.attention_kernel(dtype, width), "heads": [heads, key_heads]}
                found.append(case | {"width": width, "errors": errors, "bounds": bounds, "wrong": wrong})
    return found


def _attention_errors(
    dtype: torch.dtype, heads: int, key_heads: int, width: int, lengths: tuple[int, ...], parents: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """-> (errors of output and gradients against fp64; what they may be: twice those of plain attention in the same type)."""
    rows = [torch.randn(1, sum(lengths), count, width).to(dtype) for count in (heads, key_heads, key_heads)]
    there = [row.to(device()).transpose(1, 2).requires_grad_() for row in rows]
    with exact_sums():
        output = tree_attention(*there, parts_of(lengths, parents), scaling=width**-0.5)
        grad = torch.randn(output.shape).to(dtype)
        (output * grad.to(device())).sum().backward()
    found = [output, *(tensor.grad for tensor in there)]
    exact, plain = (_plain_attention(rows, grad, _mask(lengths, parents), to) for to in (torch.float64, dtype))
    names = ("output", "q", "k", "v")
    errors = {name: _distance(mine, right) for name, mine, right in zip(names, found, exact, strict=True)}
    rounding = {name: _distance(rough, right) for name, rough, right in zip(names, plain, exact, strict=True)}
    return errors, {name: max(2 * rounding[name], PRECISION[dtype]) for name in names}


def _plain_attention(
    rows: list[torch.Tensor], grad: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients on the CPU; weights and products are rounded to `dtype`, as a kernel's are."""
    query, key, value = (row.to(dtype).transpose(1, 2).requires_grad_() for row in rows)
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).mT).to(torch.promote_types(dtype, torch.float32)) * query.shape[
        -1
    ] ** -0.5
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).to(dtype)
    output = weights @ value.repeat_interleave(groups, 1)
    (output * grad.to(dtype)).sum().backward()
    return [output.detach(), query.grad, key.grad, value.grad]


def _mask(lengths: tuple[int, ...], parents: tuple[int, ...]) -> torch.Tensor:
    """[T, T]: what each token sees."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for start, length, parent in zip(starts, lengths, parents, strict=True):
        mask[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
        while parent != NO_PARENT:
            mask[start : start + length, starts[parent] : starts[parent] + lengths[parent]] = True
            parent = parents[parent]
    return mask


def _lora_products() -> list[Found]:
    """How much of a small change survives the rounding: joined in one product, added in place, and added to a rounded product (peft)."""
    found = []
    tokens, width, rank = 128, 1024, 16
    x, weight, hidden = torch.randn(tokens, width), torch.randn(width, width) * 0.02, torch.randn(tokens, rank)
    x, weight, hidden = (tensor.bfloat16() for tensor in (x, weight, hidden))
    exact = x.double() @ weight.double().T
    for size in (1e-2, 1e-3, 2e-4):
        factor = (torch.randn(width, rank) * size * 0.16).bfloat16()
        change = hidden.double() @ factor.double().T
        x_there, weight_there, hidden_there, factor_there = (
            tensor.to(device()) for tensor in (x, weight, hidden, factor)
        )
        with exact_sums():
            joined = torch.cat([x_there, hidden_there], 1) @ torch.cat([weight_there, factor_there], 1).T
            added = torch.addmm(hidden_there @ factor_there.T, x_there, weight_there.T)
            apart = x_there @ weight_there.T + hidden_there @ factor_there.T
        rounded = exact.bfloat16().double()

        def kept(result: torch.Tensor, change: torch.Tensor = change, rounded: torch.Tensor = rounded) -> float:
            return (((result.cpu().double() - rounded) * change).sum() / change.square().sum()).item()

        found.append(
            {"size": size, "joined": kept(joined), "added_in_place": kept(added), "rounded_first": kept(apart)}
        )
        assert 0.8 < found[-1]["joined"] < 1.2, found[-1]
    return found


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.detach().cpu().double() - exact.double()).norm() / exact.double().norm()).item()


# 3, 4 ------------------------------------------------------------------------------------------------------------------------------------


def whole_run() -> Found:
    """Through the command line, as processes of their own: train with validation, Ctrl-C after two steps, resume, merge with proof, ask."""
    with tempfile.TemporaryDirectory() as name, _own_cache():
        folder = Path(name)
        recipe, run = write_recipe(folder, eval_every_steps=2, max_steps=6), folder / "run"
        tiny_source = str(tiny_model.tiny_source())  # made in this process, read by the others
        words = [sys.executable, "-m", "qlora_lite", "train", str(recipe), "--run-dir", str(run), "--json"]
        stopped = None if device() != "cuda" else _stopped(words, run)
        trained = run_cli(*words[3:], *(["--resume"] if stopped is not None else []))
        assert trained.code == 0, trained.stderr[-2000:]
        merged, asked = run_cli("merge", run, "--json"), run_cli("ask", run, "What is it?", "--which", "all", "--json")
        assert merged.code == 0 and asked.code == 0, merged.stderr[-1000:] + asked.stderr[-1000:]
        steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == list(range(1, 7)) and Path(tiny_source).is_dir()
        return {
            "stopped_after": stopped,
            "losses": [step["loss"] for step in steps],
            "eval_losses": [step["eval_loss"] for step in steps],
            "card": json.loads((run / "env.json").read_text())["card"],
            "arithmetic_ratio": merged.json["arithmetic_ratio"],
            "storage_ratio": merged.json["storage_ratio"],
            "answers": asked.json["answers"],
        }


def _stopped(words: list[str], run: Path) -> int:
    """-> steps that were done when Ctrl-C came."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        words, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        log, until = run / "steps.jsonl", time.monotonic() + 180
        while time.monotonic() < until and process.poll() is None:
            if log.is_file() and log.read_text().count("\n") >= 2:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.02)
        _, said = process.communicate(timeout=180)
    assert process.returncode in (0, 130), said[-2000:]
    return len(log.read_text().splitlines())


SETTINGS: dict[str, tuple[str, ...]] = {
    "dropout": ("lora.lora_dropout=0.1",),
    "dora": ("lora.use_dora=true",),
    "int8": ("model.quantization=int8",),
    "lora": ("method=lora",),
    "full": ("method=full",),
    "fp16": ("model.dtype=fp16",),
    "fp32": ("model.dtype=fp32",),
    "rows": ("data.share_prefixes=false", "memory.gradient_checkpointing=true"),
}


def settings() -> Found:
    """A few steps of each, merged with proof where there is something to merge; a failure is named and the others go on."""
    found: Found = {}
    with tempfile.TemporaryDirectory() as name, _own_cache():
        recipe = write_recipe(Path(name), max_steps=3)
        for setting, changes in SETTINGS.items():
            flags = [word for change in changes for word in ("--set", change)]
            run = Path(name) / setting
            trained = run_cli("train", recipe, "--run-dir", run, "--json", *flags)
            merged = run_cli("merge", run, "--json") if trained.code == 0 and setting != "full" else None
            found[setting] = {
                "code": trained.code,
                "merge_code": None if merged is None else merged.code,
                "arithmetic_ratio": merged.json["arithmetic_ratio"]
                if merged is not None and merged.code == 0
                else None,
                "said": "" if trained.code == 0 else trained.stderr[-800:],
            }
    wrong = [setting for setting, each in found.items() if each["code"] or each["merge_code"]]
    assert not wrong, json.dumps({setting: found[setting] for setting in wrong})
    return found


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    before = os.environ.get("QLORA_LITE_HOME")
    with tempfile.TemporaryDirectory() as name:
        os.environ["QLORA_LITE_HOME"] = name
        try:
            yield
        finally:
            os.environ.pop("QLORA_LITE_HOME")
            if before is not None:
                os.environ["QLORA_LITE_HOME"] = before


# 5 ---------------------------------------------------------------------------------------------------------------------------------------


def memory() -> Found:
    """The allocator is told to refuse beyond a share of the card: the step comes again, leaner, with the same random numbers."""
    lean, wide = Footprint(8192, 1), Footprint(8192, 0)
    expected, least = _trained(lean, None)
    _, most = _trained(wide, None)
    assert least < most, (least, most)
    losses, _ = _trained(wide, (least + most) // 2)
    # Kernels add with atomic operations, so the last bits may differ; other random numbers would show in the first digits.
    is_close = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(losses, expected, strict=True))
    return {
        "after running out of memory": losses, "leaner from the start": expected, "reserved_bytes": {"wide": most, "lean": least},
        "wrong": [] if is_close else ["the losses differ"],
    }  # fmt: skip


def _trained(footprint: Footprint, limit_bytes: int | None) -> tuple[list[float], int]:
    """-> (losses of three steps with dropout, bytes that the allocator has reserved at their end, which a limit is held against)."""
    config = known_config("smollm2-135m")
    config.num_hidden_layers = 6
    torch.manual_seed(0)
    base = random_model(config, quantization=Quantization("nf4"), device=device())
    model = attach_adapter(base, r=8, lora_alpha=16)
    tiny_model.set_dropout(model, 0.1)
    tiny_model.move_factors(model)
    optimizer = make_optimizer(model.named_parameters(), name="adamw", learning_rate=1e-4, weight_decay=0.0)
    state = TrainState(model, optimizer, torch.amp.GradScaler(device(), enabled=False))
    rows = tiny_model.random_rows([64] * 8, prompt=(900, 960))
    from qlora_lite.data.batches import StepSampler

    sampler = StepSampler(8, examples_per_step=8, epochs=1, max_steps=3, seed=0)
    gc.collect()
    torch_module().empty_cache()
    total = torch_module().mem_get_info()[1]
    if limit_bytes is not None:
        torch_module().set_per_process_memory_fraction(limit_bytes / total)
    try:
        torch.manual_seed(7)
        steps = list(
            train_steps(
                state, rows, sampler, device=device(), footprint=footprint, learning_rate=1e-4, schedule="constant",
                warmup_ratio=0.0, max_grad_norm=1.0,
                leaner=lambda now: None if now.checkpoint_every else replace(now, checkpoint_every=1),
            )
        )  # fmt: skip
    finally:
        torch_module().set_per_process_memory_fraction(1.0)
    return [step.loss for step in steps], torch_module().memory_reserved()


# 6 ---------------------------------------------------------------------------------------------------------------------------------------


def gradients() -> Found:
    """In fp32: the card's against the CPU's, a tree's against its rows', one micro-batch against four; in bf16 the first again."""
    rows = tiny_model.random_rows([3, 9, 1, 5])
    by_device = {place: _gradients(place, rows, 1, torch.float32) for place in ("cpu", device())}
    found = {"fp32_card_against_cpu": tiny_model.relative_difference(by_device[device()], by_device["cpu"])}
    split = _gradients(device(), rows, 4, torch.float32)
    found["one_against_four_micro_batches"] = tiny_model.relative_difference(split, by_device[device()])
    shared = _sharing_rows()
    tree = _gradients_of(device(), [pack_trees(shared, range(len(shared)))], torch.float32)
    alone = _gradients_of(
        device(), [pack_batch([shared.encoded(i) for i in range(len(shared))], range(len(shared)))], torch.float32
    )
    found["tree_against_rows"] = tiny_model.relative_difference(tree, alone)
    found["bf16_against_fp32"] = tiny_model.relative_difference(
        _gradients(device(), rows, 1, torch.bfloat16), by_device["cpu"]
    )
    assert found["fp32_card_against_cpu"] < 1e-3 and found["one_against_four_micro_batches"] < 1e-4, found
    assert found["tree_against_rows"] < 1e-4 and found["bf16_against_fp32"] < 0.1, found
    return found


def _sharing_rows() -> tiny_model.Rows:
    passage = list(range(3, 43))
    return tiny_model.Rows([Encoded([*passage, *range(50 + 7 * i, 57 + 7 * i)], ((44, 47),)) for i in range(4)])


def _gradients(place: str, rows: tiny_model.Rows, num_batches: int, compute: torch.dtype) -> dict[str, torch.Tensor]:
    return _gradients_of(place, tiny_model.split_batches(rows, num_batches), compute)


def _gradients_of(place: str, batches: Sequence[Batch], compute: torch.dtype) -> dict[str, torch.Tensor]:
    base = load_base(tiny_model.tiny_artefact(), device=place, compute=compute)
    model = attach_adapter(base.model, r=4, lora_alpha=8, factor_dtype=compute)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # the same factors on both devices
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    found = tiny_model.gradients(model, [batch.to(place) for batch in batches])
    return {name: gradient.cpu() for name, gradient in found.items()}


# 7 ---------------------------------------------------------------------------------------------------------------------------------------


def peaks() -> Found:
    """Llama-3.1-8B's shape, random weights: the plan against the allocator, phase by phase; then what varied lengths leave reserved."""
    cells = {
        f"{tokens} tokens, every {every}": partial(cell, EIGHT_B, tokens, every)
        for tokens in (1024, 4096)
        for every in (1, 0)
    }
    varied = {
        f"reserved after varied lengths, {setting}": partial(_varied_in_a_process, setting)
        for setting in ("expandable_segments:True", "expandable_segments:False")
    }
    return _each(cells | varied)


def cell(name: str, tokens: int, every: int, *, r: int = 16) -> Found:
    """One step of one row: planned and measured, in all and by phase."""
    card = card_here()
    assert card is not None
    micro_batch = MicroBatch(tokens, 1, 0.1)
    planned = Stage(known_config(name), Settings(card=card, r=r, checkpoint_every=every)).rehearse(micro_batch)
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
    model, step = _step_of(name, micro_batch, every, r=r)
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


def _step_of(
    name: str, micro_batch: MicroBatch, every: int, *, r: int = 16
) -> tuple[Any, Callable[..., dict[str, int]]]:
    """A model of random weights, and a function that runs a step whose gradients are there already."""
    base = random_model(known_config(name), quantization=Quantization("nf4"), device=device())
    model = attach_adapter(base, r=r, lora_alpha=2 * r)
    checkpoint_activations(causal_lm(model), every=every)
    optimizer = make_optimizer(model.named_parameters(), name="paged_adamw_8bit", learning_rate=1e-4, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device(), enabled=False)
    batch = _batch(micro_batch)
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
        from qlora_lite.ledger import PHASES

        return {PHASES[name]: gradients + peak for name, peak in allocations.peaks.items()}

    return model, step


def _batch(micro_batch: MicroBatch) -> Batch:
    length, labels = micro_batch.length, num_labels(micro_batch)
    rows = [Encoded([0] * length, ((length - labels, length),))] * micro_batch.num_examples
    return pack_batch(rows, range(len(rows))).to(device())


def _varied_in_a_process(allocator: str) -> Found:
    """Twenty lengths, long and short in turn, in a process with this allocator: what is reserved beside what was allocated."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; import gpu_items; gpu_items.print_varied()"
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
    from qlora_lite.overheads import CARD_MODEL, measure_card

    found = measure_card(device())
    print(json.dumps(found | {"model": list(CARD_MODEL)}))


# 8 ---------------------------------------------------------------------------------------------------------------------------------------


def speed() -> Found:
    """Llama-3.1-8B's shape: seconds of a step, kernels launched, how long the card idles, decoding, the update, the product both ways."""
    micro_batch = MicroBatch(2048, 1, 0.1)
    model, step = _step_of(EIGHT_B, micro_batch, 1)
    step(measured=False)
    seconds = [_timed(partial(step, measured=False)) for _ in range(5)]
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


def _timed(work: Callable[[], object]) -> float:
    synchronize(device())
    begin = time.perf_counter()
    work()
    synchronize(device())
    return time.perf_counter() - begin


def _launches(work: Callable[[], object]) -> Found:
    """Kernels of one step, and the share of its time that none ran."""
    from torch.profiler import profile, supported_activities

    with profile(activities=supported_activities()) as profiler:
        elapsed = _timed(work)
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
    scaler = torch.amp.GradScaler(device(), enabled=False)
    optimizer = make_optimizer(model.named_parameters(), name="paged_adamw_8bit", learning_rate=1e-4, weight_decay=0.0)
    batch = _batch(micro_batch)
    gradient_s = _timed(lambda: accumulate(model, [batch], scaler=scaler))
    return {"gradient_s": gradient_s, "update_s": _timed(optimizer.step)}


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
                found[f"{name}, {which}, tokens_per_s"] = 16 * num_prompts / _timed(work)
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
        name: statistics.median(_timed(lambda work=work: [work() for _ in range(20)]) / 20 for _ in range(5))
        for name, work in ways.items()
    }


# 9, 10 -----------------------------------------------------------------------------------------------------------------------------------


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
    first = [_timed(partial(attend, length)) for length in lengths]
    again = [_timed(partial(attend, length)) for length in lengths]
    ratio = statistics.median(a / b for a, b in zip(first, again, strict=True))
    assert ratio < 3, {"first": first, "again": again}
    return {"lengths": lengths, "first_s": first, "again_s": again, "first_over_again": ratio}


def paged() -> Found:
    """Three updates with state in managed memory, small: bitsandbytes keeps it as long as the process lives."""
    weight = torch.nn.Parameter(torch.randn(2000, 500, device=device(), dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    optimizer = make_optimizer([("weight", weight)], name="paged_adamw_8bit", learning_rate=1e-3, weight_decay=0.0)
    from qlora_lite.train import state_bytes

    seconds = []
    for _ in range(3):
        weight.grad = torch.randn(weight.shape, device=device())
        seconds.append(_timed(optimizer.step))
    on_device, in_managed = state_bytes(optimizer)
    assert in_managed == 2 * weight.numel(), (on_device, in_managed)
    assert bool(torch.isfinite(weight).all())
    return {"paged_bytes": in_managed, "update_s": seconds}


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


ITEMS = (
    Item(1, "versions", versions),
    Item(2, "operators", operators, on_stand_in=True),
    Item(3, "run", whole_run, on_stand_in=True),
    Item(4, "settings", settings, on_stand_in=True),
    Item(5, "memory", memory),
    Item(6, "gradients", gradients, on_stand_in=True),
    Item(7, "peaks", peaks),
    Item(8, "speed", speed),
    Item(9, "shapes", shapes),
    Item(10, "paged", paged),
)
