"""memory.json: planned, measured and their difference, by part and by phase."""

import torch

from qlora_lite.memory.ledger import Moment
from qlora_lite.runs.memory_record import _on_host, compared, memory_of_run
from qlora_lite.show.rows import beside_rows
from qlora_lite.training import Preflight, allocator_statistics, state_bytes

RESIDENT = {"weights_bytes": 100, "quant_constants_bytes": 10, "adapter_bytes": 5, "optimizer_bytes": 20}
PLANNED = {
    "peak_bytes": 200,
    "parts": {
        **RESIDENT, "gradients_bytes": 12, "activations_bytes": 40, "recompute_bytes": 0, "logits_bytes": 8, "workspace_bytes": 5,
        "runtime_bytes": 0,
    },
    "phases": {"forward": {"peak_bytes": 190}, "head": {"peak_bytes": 200}, "update": {"peak_bytes": 170}},
}  # fmt: skip
STEPS = [
    {"rss_bytes": 900, "phase_peaks": None},
    {"rss_bytes": 950, "phase_peaks": {"forward": 50, "head": 66, "update": 30}},
    {"rss_bytes": 800, "phase_peaks": {"forward": 52, "head": 60, "update": 30}},
]
TRIED = Preflight(
    {"head": {"gradients": 10, "activations": 42, "logits": 7}}, {"host_weights": 5}, (Moment("head", "embedding", 64),)
)


def test_planned_and_measured_stand_side_by_side_with_their_difference():
    found = memory_of_run(PLANNED, RESIDENT, gradients_bytes=12, steps=STEPS, tried=TRIED)
    assert found["peak_bytes"] == {"planned": 200, "measured": 135 + 66} and found["rss_bytes"] == 950
    assert found["phases"]["forward"] == {"planned": 190, "measured": 187, "difference": -3}
    measured = {part: line["measured"] for part, line in found["parts"].items()}
    assert measured["gradients_bytes"] == 10 and measured["activations_bytes"] == 42 and measured["logits_bytes"] == 7
    assert sum(measured.values()) == found["peak_bytes"]["measured"]  # what no tensor explains is workspace
    assert measured["workspace_bytes"] == 201 - 135 - 59
    assert found["timeline"] == [{"phase": "head", "layer": "embedding", "bytes": 64}]


def test_what_was_not_measured_has_no_difference():
    found = memory_of_run(PLANNED, RESIDENT, gradients_bytes=12, steps=STEPS[:1], tried=None)
    assert found["peak_bytes"] == {"planned": 200, "measured": None} and found["timeline"] == []
    assert set(map(str, found["parts"].values())) == {str(compared(size, None)) for size in PLANNED["parts"].values()}


class Optimizer:
    """Two parameters' state, one of them in managed memory as bitsandbytes marks it, and a table that both share."""

    def __init__(self) -> None:
        shared, paged = torch.zeros(256), torch.zeros(1000)
        paged.is_paged = True
        self.state = {1: {"state1": torch.zeros(100), "qmap": shared, "step": 3}, 2: {"state1": paged, "qmap": shared}}


def test_managed_memory_is_counted_apart():
    assert state_bytes(Optimizer()) == (4 * (100 + 256), 4 * 1000)


def test_a_card_tells_what_its_allocator_holds(monkeypatch):
    stats = {"reserved_bytes.all.current": 4096, "num_alloc_retries": 2, "num_ooms": 1}
    blocks = [
        {"size": 512, "state": "inactive"},
        {"size": 2048, "state": "active_allocated"},
        {"size": 1024, "state": "inactive"},
    ]
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{"blocks": blocks[:2]}, {"blocks": blocks[2:]}])
    found = allocator_statistics("cuda")
    assert found == {"reserved_bytes": 4096, "largest_free_bytes": 1024, "num_retries": 2, "num_out_of_memory": 1}
    assert [line[1] for line in beside_rows({"allocator": found, "paged_bytes": {"measured": 2048}})] == [
        "2 KiB", "4 KiB", "1 KiB", "2", "1",
    ]  # fmt: skip
    assert (
        allocator_statistics("cpu") is None and beside_rows({"allocator": None, "paged_bytes": {"measured": 0}}) == []
    )


def test_parts_on_the_host_stand_beside_their_plan_without_paged_state():
    planned = {"host_weights_bytes": 6, "host_layer_inputs_bytes": 3, "paged_bytes": 9}
    assert _on_host(planned, TRIED) == {
        "host_weights_bytes": {"planned": 6, "measured": 5, "difference": -1},
        "host_layer_inputs_bytes": {"planned": 3, "measured": None, "difference": None},
    }
