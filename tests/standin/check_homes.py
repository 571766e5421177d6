"""Parts of the model in host memory, on a device with a memory of its own: the same bits, the planned peaks, nothing left behind."""

import gc
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_lite.device.accelerator import card_here
from qlora_lite.model import host_tensors
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.policy import Policy
from qlora_lite.model.residency import residency_of
from qlora_lite.plan import rehearsal
from qlora_lite.plan.rehearsal import MicroBatch, Settings, Stage
from qlora_lite.training.footprint import Footprint, apply_footprint
from tests import standin
from tests.standin.check_memory import real_step
from tests.tiny_run import run_cli, train_cli, write_recipe

standin.install()  # before the first backward pass of the process

ENDS = {"embeddings": "host", "head": "streamed"}
POLICIES = [
    Policy(40),
    Policy(40, "fewest"),
    Policy(40, "host", embeddings="host"),
    Policy(0, "host", 1),
    Policy(40, "host_fewest", 0, **ENDS),
    Policy(40, "host_fewest", 0, keys_values="host", **ENDS),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("trunk", [0, 30])
def test_a_planned_peak_is_the_allocators_wherever_parts_wait(policy, trunk, monkeypatch):
    monkeypatch.setattr(rehearsal, "workspace_of", lambda card, num_threads: lambda *_: 0)
    micro_batch = MicroBatch(100, 3, 0.1, trunk=trunk, is_first=True)
    with standin.card("rtx-4090"):
        settings = Settings(card=card_here(), r=8, runtime_bytes=0, policy=policy)
        gc.collect()
        before = torch.standin.memory_allocated()
        model, step = real_step(settings, micro_batch)
        apply_footprint(model, Footprint(0, policy=policy))
        step()  # tables that are made once
        torch.standin.reset_peak_memory_stats()
        step()
        measured = torch.standin.max_memory_allocated() - before
        assert planned(model, settings, micro_batch) == pytest.approx(measured, rel=0.01)
        away = residency_of(causal_lm(model)).away()
        assert all(tensor.is_cpu for tensors in away.values() for tensor in tensors)


def planned(model: torch.nn.Module, settings: Settings, micro_batch: MicroBatch) -> int:
    return Stage(causal_lm(model).config, settings).rehearse(micro_batch).peak_bytes


def test_training_from_other_homes_is_the_same_to_the_bit_and_every_verb_works(tmp_path: Path):
    recipe = write_recipe(tmp_path / "recipe", eval_every_steps=2, learning_rate=2e-3)
    chunks = ["--set", "memory.chunk_tokens=24"]
    homes = ["layer_inputs=host_fewest", "resident_layers=1", "embeddings=host", "head=streamed", "keys_values=host"]
    away = [word for home in homes for word in ("--set", f"memory.{home}")]
    from_disk = ["--set", "memory.resident_layers=0", "--set", "memory.stream_from=disk"]
    adapters, losses = [], []
    with standin.card("rtx-4090"):
        for name, flags in (("chunks", []), ("away", away), ("disk", from_disk)):
            run = tmp_path / name
            done = train_cli(recipe, run, "--json", *chunks, *flags)
            assert done.code == 0, done.stderr
            losses.append([json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()])
            adapters.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
        assert losses[0] == losses[1] == losses[2] and adapters[0] == adapters[1] == adapters[2]
        memory = json.loads((tmp_path / "away" / "memory.json").read_text())
        assert {"host_layer_inputs_bytes", "host_weights_bytes"} <= memory["host"].keys()
        assert all(entry["measured"] for entry in memory["host"].values())
        for verb in (("eval", run), ("merge", tmp_path / "away"), ("ask", tmp_path / "away", "What is it?")):
            assert run_cli(*verb, "--json").code == 0


@pytest.mark.parametrize("policy", POLICIES[2:], ids=str)
def test_a_step_that_fails_anywhere_leaves_nothing_on_the_device(policy):
    """An exception in the MLP of a layer or in the head, the first, second, ... time: forward, recomputed, in the backward pass."""
    micro_batch = MicroBatch(100, 3, 0.1, is_first=True)
    with standin.card("rtx-4090"):
        model, step = real_step(Settings(card=card_here(), r=8, policy=policy), micro_batch)
        apply_footprint(model, Footprint(0, policy=policy))
        step()
        gc.collect()
        before = torch.standin.memory_allocated()
        number, has_failed = 0, True
        while has_failed:
            number += 1
            has_failed = fails(model, step, number)
            model.zero_grad(set_to_none=True)
            assert allocated_soon(before) == before, number
        assert number > 4


def test_host_memory_that_is_refused_is_a_lack_of_memory_like_any_other(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with standin.card("rtx-4090"):
        monkeypatch.setattr(host_tensors, "_free", defaultdict(list))
        monkeypatch.setattr(host_tensors.mmap, "mmap", refuse)
        with pytest.raises(MemoryError, match="of host memory left"):
            host_tensors.empty_on_host((4, 4), torch.float32, torch.device(standin.NAME), "host_weights")


def test_sequences_of_many_lengths_do_not_pile_up_host_memory(monkeypatch):
    monkeypatch.setattr(host_tensors, "_free", defaultdict(list))
    device = torch.device(standin.NAME)
    with standin.card("rtx-4090"):
        for length in (100, 5000, 2000, 9000, 300, 9001):
            tensors = [
                host_tensors.empty_on_host((length, 64), torch.float32, device, "host_weights") for _ in range(2)
            ]
            for number, tensor in enumerate(tensors):
                tensor.fill_(number)
            assert [tensor.unique().tolist() for tensor in tensors] == [[0.0], [1.0]]  # no two share pages
            del tensors, tensor
        kept = sum(size * len(pages) for size, pages in host_tensors._free.items())
        assert kept < 2.1 * 9001 * 64 * 4
        host_tensors.give_back_host_memory()
        assert not host_tensors._free


def allocated_soon(expected: int) -> int:
    """Bytes allocated, once autograd's thread has let go of a failed step."""
    for _ in range(100):
        gc.collect()
        if torch.standin.memory_allocated() == expected:
            break
        time.sleep(0.05)
    return torch.standin.memory_allocated()


def fails(model: torch.nn.Module, step: Callable[[], None], number: int) -> bool:
    """Run a step in which the `number`-th call of an MLP raises; False if there are fewer."""
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise ValueError("on purpose")

    hooks = [
        m.register_forward_pre_hook(fail) for name, m in model.named_modules() if name.endswith((".mlp", "lm_head"))
    ]
    try:
        step()
    except ValueError:
        return True
    finally:
        for hook in hooks:
            hook.remove()
    return False
