"""How much memory a run may take."""

import json

import psutil
import pytest

from qlora_lite.device import accelerator
from qlora_lite.device.card import CPU, Card, card_named
from qlora_lite.memory import host
from qlora_lite.memory.kept import KEPT
from qlora_lite.model.dtypes import choose_types
from qlora_lite.plan import budget
from qlora_lite.plan.budget import budget_of, measured_here
from qlora_lite.plan.resolve import Place, settings_of
from qlora_lite.recipe import DEFAULT_RECIPE, Reason, load_recipe

GIB = 2**30


def test_a_size_that_was_asked_for_is_taken_as_it_is():
    assert budget_of(24 * GIB, SOME) == (24 * GIB, "asked for")


def test_auto_leaves_a_margin_and_says_so(monkeypatch):
    monkeypatch.setattr(host, "_CGROUPS", ())
    found, reason = budget_of("auto", CPU)
    memory = psutil.virtual_memory()
    assert 0 < found < memory.total and found == pytest.approx(
        memory.available - max(GIB, 0.05 * memory.total), rel=0.2
    )
    assert "are free, less a margin for other programs" in reason


def test_a_container_has_what_its_limit_leaves(monkeypatch, tmp_path):
    (tmp_path / "max").write_text(f"{3 * GIB}\n")
    (tmp_path / "now").write_text(f"{GIB // 2}\n")
    monkeypatch.setattr(host, "_CGROUPS", ((tmp_path / "max", tmp_path / "now"),))
    found, reason = budget_of("auto", CPU)
    assert found == 5 * GIB // 2 - GIB and "2.5 GiB of this machine's 3 GiB are free" in reason


def test_a_limit_of_none_is_no_limit(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "now").write_text("5\n")
    monkeypatch.setattr(host, "_CGROUPS", ((tmp_path / "max", tmp_path / "now"),))
    assert budget_of("auto", CPU)[0] > GIB // 4


def test_little_memory_is_halved_rather_than_used_up_by_the_margin(monkeypatch, tmp_path):
    (tmp_path / "max").write_text(f"{GIB}\n")
    (tmp_path / "now").write_text("0\n")
    monkeypatch.setattr(host, "_CGROUPS", ((tmp_path / "max", tmp_path / "now"),))
    assert budget_of("auto", CPU)[0] == GIB // 2


SOME = Card("Some Card", "cuda", 20 * GIB, (8, 6))
MEASURED = {"card": "Some Card", "fragmentation_bytes": GIB, "cublas_workspace_bytes": 32 * 2**20, "versions": {}}


@pytest.fixture
def card(monkeypatch):
    for module in (accelerator, budget):
        monkeypatch.setattr(module, "card_here", lambda: SOME)
    monkeypatch.setattr(budget, "free_memory", lambda: (16 * GIB, 20 * GIB))


def test_what_doctor_measured_on_the_card_that_is_here_is_used(card, tmp_path):
    (tmp_path / KEPT).write_text(json.dumps(MEASURED))
    measured = measured_here(SOME, cache=tmp_path)
    assert measured == MEASURED
    found, reason = budget_of("auto", SOME, measured=measured)
    assert found == 15 * GIB and reason.endswith("less a margin for the allocator's fragmentation, measured by doctor")
    place = Place(SOME, Reason("device", "cuda", "here"), choose_types("auto", SOME), 0, "", measured)
    settings = settings_of(load_recipe(DEFAULT_RECIPE), place)
    assert settings.runtime_bytes == 2 * 32 * 2**20  # the program's thread and autograd's have a handle each


def test_what_was_measured_on_another_card_or_not_at_all_is_not(card, tmp_path):
    assert measured_here(SOME, cache=tmp_path) == {}
    (tmp_path / KEPT).write_text(json.dumps(MEASURED | {"card": "Another Card"}))
    assert measured_here(SOME, cache=tmp_path) == {} == measured_here(CPU, cache=tmp_path)
    (tmp_path / KEPT).write_text(json.dumps(MEASURED))
    assert measured_here(card_named("t4"), cache=tmp_path) == {}  # planned for, and not the one that is here
    assert budget_of("auto", SOME)[0] == 16 * GIB - int(0.03 * 20 * GIB)


def test_a_card_that_is_not_here_has_what_cuda_reports_less_context_and_margin():
    found, reason = budget_of("auto", card_named("t4"))
    reported = int(14.56 * GIB)
    assert found == reported - 500 * 2**20 - int(0.03 * reported)
    assert (
        "CUDA reports about 14.6 GiB on Tesla T4, less 500 MiB for its context" in reason and "both assumed" in reason
    )
