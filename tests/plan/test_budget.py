"""How much memory a run may take."""

import psutil
import pytest

from qlora_lite.plan import budget
from qlora_lite.plan.budget import budget_of

GIB = 2**30


def test_a_size_that_was_asked_for_is_taken_as_it_is():
    assert budget_of(24 * GIB, "cuda") == (24 * GIB, "24 GiB: asked for")


def test_auto_leaves_a_margin_and_says_so(monkeypatch):
    monkeypatch.setattr(budget, "_CGROUPS", ())
    found, reason = budget_of("auto", "cpu")
    memory = psutil.virtual_memory()
    assert 0 < found < memory.total and found == pytest.approx(
        memory.available - max(GIB, 0.05 * memory.total), rel=0.2
    )
    assert "are free, less a margin for the rest of the machine" in reason


def test_a_container_has_what_its_limit_leaves(monkeypatch, tmp_path):
    (tmp_path / "max").write_text(f"{3 * GIB}\n")
    (tmp_path / "now").write_text(f"{GIB // 2}\n")
    monkeypatch.setattr(budget, "_CGROUPS", ((tmp_path / "max", tmp_path / "now"),))
    found, reason = budget_of("auto", "cpu")
    assert found == 5 * GIB // 2 - GIB and "of this machine's 3 GiB, 2.5 GiB are free" in reason


def test_a_limit_of_none_is_no_limit(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "now").write_text("5\n")
    monkeypatch.setattr(budget, "_CGROUPS", ((tmp_path / "max", tmp_path / "now"),))
    assert budget_of("auto", "cpu")[0] > GIB // 4


def test_little_memory_is_halved_rather_than_used_up_by_the_margin(monkeypatch, tmp_path):
    (tmp_path / "max").write_text(f"{GIB}\n")
    (tmp_path / "now").write_text("0\n")
    monkeypatch.setattr(budget, "_CGROUPS", ((tmp_path / "max", tmp_path / "now"),))
    assert budget_of("auto", "cpu")[0] == GIB // 2
