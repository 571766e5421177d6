"""Memory on the stand-in: its allocator against the plan and the ledger, running out of it, and what is then done."""

import gc
from dataclasses import replace

import pytest
import torch

from qlora_lite.data.batches import pack_batch, pack_trees
from qlora_lite.data.template import Encoded
from qlora_lite.device.accelerator import card_here
from qlora_lite.device.out_of_memory import is_out_of_memory
from qlora_lite.errors import DoesNotFit
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.measuring import measure_allocations
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.load import checkpoint_activations, load_base
from qlora_lite.model.trained import make_trainable
from qlora_lite.plan import rehearsal
from qlora_lite.plan.rehearsal import MicroBatch, Settings, Stage, num_labels
from qlora_lite.training import Footprint, TrainState, make_optimizer, optimizer, try_largest_batch
from qlora_lite.training.loop import StepStats, TrainSettings, train_steps
from qlora_lite.training.step import update
from tests import standin, tiny_model
from tests.training.test_loop import sampler_of

standin.install()  # before the first backward pass of the process
LABELS = (30, 25, 1, 7, 3, 30, 2, 5)


def test_gradients_are_summed_in_the_devices_thread_as_autograd_does_without_a_ledger():
    """A weight that is used three times; a ledger asks who calls an operator, and in that thread nobody of Python's does."""
    with standin.card("rtx-4090"):
        weight = torch.ones(1024, device=standin.NAME, requires_grad=True)
        factor = torch.full((1024,), 2.0, device=standin.NAME)

        def losses() -> list[torch.Tensor]:
            return [(weight * factor).sum() for _ in range(3)]

        made = losses()
        with measure_allocations(standin.NAME) as allocations:
            torch.autograd.backward(made)
        weight.grad, made = None, losses()
        with Ledger(card=card_here()) as ledger:
            torch.autograd.backward(made)
        assert torch.equal(weight.grad.cpu(), torch.full((1024,), 6.0))
        assert ledger.peak_bytes == allocations.peak_bytes == 2 * 4096 + 3 * 512


@pytest.mark.parametrize("trunk", [0, 40])
@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize(
    ("card", "method", "changes"),
    [
        ("rtx-4090", "qlora", {}),
        ("rtx-4090", "qlora", {"use_dora": True}),
        ("rtx-4090", "qlora", {"compute": torch.float32, "factors": torch.float32}),
        ("t4", "qlora", {"compute": torch.float16, "factors": torch.float32}),
        ("rtx-4090", "lora", {"optimizer": "adamw"}),
        ("rtx-4090", "full", {"optimizer": "adamw"}),
    ],
)
def test_a_planned_peak_is_the_allocators(card, method, changes, every, trunk, monkeypatch):
    """Of tensors: the stand-in's kernels allocate nothing inside themselves, and it has no cuBLAS, so the plan leaves both out here."""
    monkeypatch.setattr(rehearsal, "workspace_of", lambda card, num_threads: lambda *_: 0)
    micro_batch = MicroBatch(100, 3, 0.1, trunk=trunk, is_first=True)
    with standin.card(card):
        settings = Settings(method=method, card=card_here(), r=8, checkpoint_every=every, runtime_bytes=0)
        settings = replace(settings, **{"optimizer": "paged_adamw_8bit"} | changes)
        gc.collect()
        before = torch.standin.memory_allocated()
        model, step = real_step(settings, micro_batch)
        step()  # tables that are made once
        torch.standin.reset_peak_memory_stats()
        step()
        measured = torch.standin.max_memory_allocated() - before
        planned = Stage(causal_lm(model).config, settings).rehearse(micro_batch).peak_bytes
    assert planned == pytest.approx(measured, rel=0.01)


def real_step(settings: Settings, micro_batch: MicroBatch):
    """-> (the model, a function that runs one optimizer step on the stand-in)."""
    folder = tiny_model.tiny_artefact() if settings.method == "qlora" else tiny_model.tiny_source()
    model = load_base(folder, device=standin.NAME, compute=settings.compute).model
    if settings.method == "full":
        make_trainable(model)
    else:
        model = attach_adapter(
            model, Lora(r=settings.r, lora_alpha=16, use_dora=settings.use_dora), factor_dtype=settings.factors
        )
    checkpoint_activations(causal_lm(model), every=settings.checkpoint_every)
    made = make_optimizer(model.named_parameters(), name=settings.optimizer, learning_rate=1e-4, weight_decay=0.0)
    length, trunk, labels = micro_batch.length, micro_batch.trunk, num_labels(micro_batch)
    rows = [
        Encoded([0] * trunk + [1 + i if trunk else 0] * (length - trunk), ((length - labels, length),))
        for i in range(micro_batch.num_examples)
    ]
    batch = pack_trees(tiny_model.Rows(rows), range(len(rows))) if trunk else pack_batch(rows, range(len(rows)))
    batch = batch.to(standin.NAME)
    scaler = torch.amp.GradScaler(standin.NAME, enabled=False)
    model.train()

    def step() -> None:
        update(model, made, [batch], scaler=scaler, max_grad_norm=1.0)
        made.zero_grad(set_to_none=True)

    return model, step


def fresh_state() -> TrainState:
    """On the stand-in, with dropout, so that its result depends on the random numbers of the device."""
    base = load_base(tiny_model.tiny_artefact(), device=standin.NAME)
    model = attach_adapter(base.model, Lora(r=4, lora_alpha=8))
    tiny_model.set_dropout(model, 0.1)
    tiny_model.move_factors(model)
    made = make_optimizer(model.named_parameters(), name="paged_adamw_8bit", learning_rate=1e-3, weight_decay=0.0)
    return TrainState(model, made, torch.amp.GradScaler(standin.NAME, enabled=False))


def train(state: TrainState, *, footprint: Footprint, said: list[str] | None = None) -> list[StepStats]:
    rows = tiny_model.random_rows(LABELS, prompt=(30, 60))
    state.footprint = footprint
    torch.manual_seed(7)
    steps = train_steps(
        state, rows, sampler_of(rows, max_steps=3), TrainSettings(standin.NAME, 1e-3, "cosine", 0.2, 1.0),
        leaner=to_checkpointing, say=(said if said is not None else []).append,
    )  # fmt: skip
    return list(steps)


def to_checkpointing(footprint: Footprint) -> Footprint | None:
    """Leaner without another split."""
    return None if footprint.checkpoint_every else replace(footprint, checkpoint_every=1)


def peak_of(footprint: Footprint) -> int:
    """The allocator's highest sum in such a run."""
    state = fresh_state()
    gc.collect()
    before = torch.standin.memory_allocated()
    return before + max(stats.peak_bytes for stats in train(state, footprint=footprint))


def test_a_step_that_the_allocator_refuses_is_repeated_leaner_with_the_same_random_numbers():
    wide, lean = Footprint(400, 0), Footprint(400, 1)
    with standin.card("rtx-4090"):
        expected = [stats.loss for stats in train(fresh_state(), footprint=lean)]
        most, least = peak_of(wide), peak_of(lean)
        assert least < most
        state, said = fresh_state(), []
        gc.collect()
        with standin.limit((most + least) // 2):
            found = [stats.loss for stats in train(state, footprint=wide, said=said)]
        assert found == expected and state.footprint == lean
        assert "CUDA out of memory" in said[0] and "every layer checkpointed" in said[0]


def test_a_preflight_that_the_allocator_refuses_goes_leaner_and_leaves_the_random_numbers():
    wide, lean = Footprint(400, 0), Footprint(400, 1)
    rows = tiny_model.random_rows(LABELS, prompt=(30, 60))
    batches = [pack_batch([rows.encoded(i) for i in range(len(rows))], range(len(rows)))]

    def fly(footprint: Footprint, said: list[str]) -> tuple[TrainState, int]:
        state = fresh_state()
        state.footprint = footprint
        torch.standin.reset_peak_memory_stats()
        try_largest_batch(state, lambda _: batches, device=standin.NAME, leaner=to_checkpointing, say=said.append)
        return state, torch.standin.max_memory_allocated()

    with standin.card("rtx-4090"):
        (_, most), (_, least) = fly(wide, []), fly(lean, [])
        before = torch.standin.get_rng_state(), torch.get_rng_state()
        said: list[str] = []
        with standin.limit((most + least) // 2):
            state, _ = fly(wide, said)
        assert state.footprint == lean and "trying the largest micro-batch: CUDA out of memory" in said[0].replace(
            "out of memory (CUDA", "CUDA"
        )
        assert torch.equal(before[0], torch.standin.get_rng_state()) and torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.65 GiB"
        ),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", 2),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_every_spelling_of_a_lack_of_memory_is_answered_with_a_leaner_step(error, monkeypatch):
    from qlora_lite.training import step

    real, raised = step.batch_loss, []

    def batch_loss(*arguments, **keywords):
        loss = real(*arguments, **keywords)
        if not raised:
            raised.append(error)
            raise error
        return loss

    monkeypatch.setattr(step, "batch_loss", batch_loss)
    with standin.card("rtx-4090"):
        state = fresh_state()
        train(state, footprint=Footprint(400, 0))
        assert raised and state.footprint == Footprint(400, 1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx("),
    ],
)
def test_other_errors_of_a_card_are_not_taken_for_a_lack_of_memory(error):
    assert not is_out_of_memory(error)


def test_state_that_managed_memory_cannot_hold_is_refused_before_bitsandbytes_asks_for_it(monkeypatch):
    monkeypatch.setattr(optimizer, "host_memory", lambda: (100_000, 2**30))
    monkeypatch.setattr(optimizer, "free_memory", lambda: (50_000, 2**30))
    with standin.card("rtx-4090"):
        weight = torch.nn.Parameter(torch.zeros(400, 300, device=standin.NAME))
        with pytest.raises(DoesNotFit, match=r"its state needs 234 KiB of managed memory; .* 146 KiB free"):
            make_optimizer([("weight", weight)], name="paged_adamw_8bit", learning_rate=1e-3, weight_decay=0.0)
        make_optimizer([("weight", weight)], name="adamw", learning_rate=1e-3, weight_decay=0.0)  # nothing of it pages
