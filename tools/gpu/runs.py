"""Items 3 to 5: a tiny run through the command line, the same in other settings, and one whose allocator refuses."""

import contextlib
import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from gpu.common import Found, device
from qlora_lite.base.known import known_config
from qlora_lite.base.quantization import Quantization
from qlora_lite.data.batches import StepSampler
from qlora_lite.device.accelerator import torch_module
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.random_model import random_model
from qlora_lite.training import Footprint, TrainState, make_optimizer
from qlora_lite.training.loop import TrainSettings, train_steps
from tests import tiny_model
from tests.tiny_run import run_cli, write_recipe

REPO = Path(__file__).resolve().parents[2]


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
    model = attach_adapter(base, Lora(r=8, lora_alpha=16))
    tiny_model.set_dropout(model, 0.1)
    tiny_model.move_factors(model)
    optimizer = make_optimizer(model.named_parameters(), name="adamw", learning_rate=1e-4, weight_decay=0.0)
    state = TrainState(model, optimizer, torch.amp.GradScaler(device(), enabled=False), footprint=footprint)
    rows = tiny_model.random_rows([64] * 8, prompt=(900, 960))
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
                state, rows, sampler, TrainSettings(device(), 1e-4, "constant", 0.0, 1.0),
                leaner=lambda now: None if now.checkpoint_every else replace(now, checkpoint_every=1),
            )
        )  # fmt: skip
    finally:
        torch_module().set_per_process_memory_fraction(1.0)
    return [step.loss for step in steps], torch_module().memory_reserved()
