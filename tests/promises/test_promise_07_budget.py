"""Promise 7: a smaller budget never yields a plan that needs more memory; an impossible one says which part is largest, and what helps."""

import numpy as np
import pytest

from qlora_lite.base.known import known_config
from qlora_lite.plan import Rehearsals, Settings
from qlora_lite.plan.homes import Budgets
from qlora_lite.plan.planner import Fit, Needs, concessions, fit, shortage
from qlora_lite.plan.strategy import Free
from tests.tiny_run import run_cli, train_cli, write_recipe

GIB = 2**30
ANY = Free()


@pytest.fixture(scope="module")
def llama() -> Rehearsals:
    return Rehearsals(known_config("llama-3.1-8b"))


def peak_of(rehearsals: Rehearsals, found: Fit) -> int:
    return rehearsals.of(found.settings, found.batch).peak_bytes


@pytest.mark.parametrize(
    ("is_free", "host_gib"),
    [(False, 0), (True, 0), (False, 64)],
    ids=["length asked for", "length free", "with a host"],
)
def test_from_1_to_80_gib_in_40_steps_a_smaller_budget_never_needs_more(llama, is_free, host_gib):
    needs = Needs(2048, "as a test", 0.1, is_free=is_free, lengths=np.arange(64, 2049))
    budgets = [int(GIB * (1 + 79 * step / 39)) for step in range(40)]
    found = [fit(llama, Settings(), ANY, needs, Budgets(budget, host_gib * GIB)) for budget in budgets]
    peaks = [peak_of(llama, each) for each in found]
    assert peaks == sorted(peaks) and len(set(peaks)) >= 4
    assert [each.slowdown for each in found] == sorted((each.slowdown for each in found), reverse=True)
    least = min(peaks)
    assert all(peak <= budget for peak, budget in zip(peaks, budgets, strict=True) if budget >= least)
    assert found[-1].footprint.checkpoint_every == 0 and found[-1].settings.optimizer == "adamw"
    assert found[0].footprint.checkpoint_every == 1 and found[0].settings.optimizer == "paged_adamw_8bit"


def test_a_length_that_does_not_fit_is_cut_to_the_longest_that_does_and_the_rows_it_loses_are_counted():
    small, budgets = Rehearsals(known_config("smollm2-135m")), Budgets(GIB // 4, 0)
    lengths = np.arange(1, 20_001)
    needs = Needs(20_000, "as a test", 0.1, is_free=True, lengths=lengths)
    found = fit(small, Settings(), ANY, needs, budgets)
    assert 64 <= found.length < 20_000 and found.length % 64 == 0 and peak_of(small, found) <= budgets.device
    longer = fit(small, Settings(), ANY, Needs(found.length + 64, "", 0.1), budgets)
    assert peak_of(small, longer) > budgets.device
    assert f"{20_000 - found.length} of 20000 examples are longer" in " ".join(map(str, found.reasons))


def test_what_does_not_fit_says_its_largest_part_and_each_concession_keeps_its_word(llama):
    needs = Needs(4096, "as a test", 0.1)
    found = fit(llama, Settings(method="lora"), Free(policy=(("resident_layers", None),)), needs, Budgets(12 * GIB, 0))
    further = concessions(llama, found.settings, found.batch, None)
    own = llama.of(found.settings, found.batch)
    text = shortage(own, further, Budgets(12 * GIB, 0))
    assert "Largest part: weights 15" in text and "--set method=qlora" in text
    assert {each.setting for each in further} >= {"method=qlora", "data.max_seq_length=2048", "lora.r=8"}
    assert all(each.peak_bytes + each.saves_bytes == own.peak_bytes and each.saves_bytes > 0 for each in further)


def test_a_shortage_names_the_largest_part_of_the_tighter_memory(llama):
    needs = Needs(4096, "as a test", 0.1)
    found = fit(
        llama, Settings(), Free(policy=(("resident_layers", 0), ("stream_from", "host"))), needs, Budgets(3 * GIB, GIB)
    )
    own = llama.of(found.settings, found.batch)
    text = shortage(own, (), Budgets(3 * GIB, GIB))
    assert (
        own.peak_bytes <= 6 * GIB < own.homes_bytes + 6 * GIB and "of host memory. Largest part: host weights" in text
    )


def test_a_number_of_resident_layers_that_the_recipe_sets_is_kept(llama):
    needs, budgets = Needs(512, "as a test", 0.1), Budgets(8 * GIB, 64 * GIB)
    kept = fit(llama, Settings(), Free(policy=(("resident_layers", 3),)), needs, budgets)
    none = fit(llama, Settings(), Free(policy=(("resident_layers", 0),)), needs, budgets)
    assert (kept.settings.policy.resident_layers, none.settings.policy.resident_layers) == (3, 0)


def test_the_smallest_budget_that_is_named_is_enough_and_a_byte_less_is_not(llama):
    needs = Needs(2048, "as a test", 0.1)
    least = peak_of(llama, fit(llama, Settings(), ANY, needs, Budgets(1, 2**40)))
    assert peak_of(llama, fit(llama, Settings(), ANY, needs, Budgets(least, 2**40))) == least
    assert peak_of(llama, fit(llama, Settings(), ANY, needs, Budgets(least - 1, 2**40))) > least - 1


def test_plan_says_what_would_help_and_exits_3():
    done = run_cli("plan", "llama-3.1-8b", "--budget", "1GiB", "--json")
    assert done.code == 3 and done.json["fits"] is False
    assert done.json["smallest_budget_bytes"] == done.json["methods"]["qlora"]["peak_bytes"]
    assert "Largest part: weights" in done.stderr and "No single setting is enough" in done.stderr
    assert all(each.keys() == {"setting", "peak_bytes", "saves_bytes"} for each in done.json["concessions"])


def test_train_refuses_what_does_not_fit_before_anything_is_loaded(tmp_path):
    done = train_cli(write_recipe(tmp_path), tmp_path / "run", "--set", "memory.budget=64KiB")
    assert done.code == 3 and "does not fit: needs" in done.stderr and "Largest part" in done.stderr
    assert "loading the base" not in done.stderr and not (tmp_path / "run").exists()
