"""The memory report: the map against whole rehearsals, the longest sequence against its budget, and what `plan` prints."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from qlora_lite.base.known import known_config
from qlora_lite.base.known_shapes import SHAPES
from qlora_lite.plan import CARDS, METHODS, MicroBatch, Rehearsals, Room, Settings, Stage, forecast, sweep
from qlora_lite.plan.compare import Comparison, as_method, own_method
from qlora_lite.plan.fits import STEP, Growth, Labels, is_straight, longest_length, memory_map
from qlora_lite.plan.forecast import growth_by_method
from qlora_lite.plan.homes import Budgets
from qlora_lite.plan.largest import largest_model
from qlora_lite.plan.merging import Merging
from qlora_lite.plan.planner import Needs, fit
from qlora_lite.plan.rehearsal import PARTS, Rehearsal
from qlora_lite.plan.strategy import Free
from qlora_lite.recipe.hub_names import commit_folder, revisions_file
from tests.tiny_model import tiny_source
from tests.tiny_run import run_cli

GIB = 2**30


@pytest.fixture(scope="module")
def small() -> Comparison:
    return Comparison(Rehearsals(known_config("smollm2-135m")), Settings())


@cache
def rehearsing(name: str, settings: Settings) -> Callable[[MicroBatch], Rehearsal]:
    """Whole rehearsals of one model; a second one on a stage is that of a fresh stage, see tests/promises/test_promise_06_plan.py."""
    return cache(Stage(known_config(name), settings).rehearse)


def growth_of(name: str, settings: Settings = Settings()) -> Growth:  # noqa: B008  # frozen
    rehearse = rehearsing(name, settings)
    return Growth(rehearse, known_config(name), Labels(rehearse), label_share=0.1)


@pytest.mark.parametrize("name", ["smollm2-135m", "bloom-560m", "gemma-3-1b"])
def test_the_map_is_what_rehearsals_say(name):
    growth, rehearse = growth_of(name), rehearsing(name, Settings())
    cells = memory_map(growth, Room(2 * GIB, 2048))
    assert {cell.max_seq_length for cell in cells} == {512, 1024, 2048}
    for cell in cells[::3]:
        exact = rehearse(MicroBatch(cell.max_seq_length, cell.batch)).peak_bytes
        assert cell.peak_bytes == pytest.approx(exact, rel=0.02) and cell.fits == (cell.peak_bytes <= 2 * GIB)


@pytest.mark.parametrize("method", ["qlora", "full"])
@pytest.mark.parametrize(("name", "lengths"), [("gemma-3-1b", (320, 3000, 10_000)), ("gemma-2-9b", (1500, 6000))])
def test_lengths_between_those_that_are_rehearsed_are_what_rehearsals_say(name, lengths, method):
    """Windows, soft caps: below the window, between the lengths that are rehearsed, and beyond them."""
    growth, rehearse = growth_of(name, Settings(method=method)), rehearsing(name, Settings(method=method))
    for length in lengths:
        assert growth.peak_bytes(length) == pytest.approx(rehearse(MicroBatch(length)).peak_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "bloom-560m"])
def test_every_method_grows_as_its_rehearsals_say(name):
    """Labels and optimizer states that two methods share are rehearsed once; a second example and a second chunk of labels add more
    than a third."""
    config = known_config(name)
    comparison = Comparison(Rehearsals(config), Settings(head_chunk=64))
    growth = growth_by_method(comparison, config, MicroBatch(1024), 0.1)
    for method in METHODS:
        for length, batch in ((600, 1), (700, 3), (5000, 2)):
            exact = comparison.rehearse(method, MicroBatch(length, batch)).peak_bytes
            assert growth[method].peak_bytes(length, batch) == pytest.approx(exact, rel=0.015)


def test_which_models_grow_in_straight_lines():
    straight = {
        name: is_straight(known_config(name))
        for name in ("llama-3.1-8b", "qwen2.5-7b", "phi-4", "gemma-2-9b", "bloom-560m")
    }
    assert straight == {
        "llama-3.1-8b": True,
        "qwen2.5-7b": True,
        "phi-4": True,
        "gemma-2-9b": False,
        "bloom-560m": False,
    }


@pytest.mark.parametrize(
    ("name", "budgets"),
    [("smollm2-135m", (0.5, 1)), ("bloom-560m", (1.5,))],  # straight and not
)
def test_the_longest_sequence_fits_and_a_longer_one_does_not(name, budgets):
    growth, rehearse = growth_of(name), rehearsing(name, Settings())
    for budget in (int(gib * GIB) for gib in budgets):
        longest = longest_length(growth, Room(budget, 20_000))
        assert longest is not None and longest % STEP == 0
        assert rehearse(MicroBatch(longest)).peak_bytes <= 1.001 * budget
        assert rehearse(MicroBatch(longest + STEP)).peak_bytes > 0.999 * budget
    assert longest_length(growth, Room(10 * 2**20, 2048)) is None
    assert longest_length(growth, Room(80 * GIB, 640)) == 640


def test_more_memory_never_fits_less():
    growth = growth_of("smollm2-135m")
    found = [longest_length(growth, Room(GIB * i // 4, 20_000)) or 0 for i in range(1, 41)]
    assert found == sorted(found) and found[0] < found[-1]


def test_the_methods_differ_as_they_should(small):
    found = {name: small.rehearse(name, MicroBatch(1024, 2)) for name in METHODS}
    assert (
        found["qlora"].peak_bytes < found["lora"].peak_bytes < found["full_8bit"].peak_bytes < found["full"].peak_bytes
    )
    assert all(tuple(each.parts) == PARTS and sum(each.parts.values()) == each.peak_bytes for each in found.values())
    weights = found["full"].num_weights
    assert weights == found["qlora"].num_weights == 134_515_008 == found["full"].num_trained
    assert found["full"].parts["gradients"] == pytest.approx(4 * weights, rel=1e-3)
    assert found["full"].parts["optimizer"] == pytest.approx(10 * weights, rel=1e-3)
    assert own_method("full", "paged_adamw_8bit") == "full_8bit" and own_method("qlora", "adamw") == "qlora"
    assert as_method(replace(Settings(), use_dora=True), "full") == replace(
        Settings(), method="full", optimizer="adamw"
    )


def test_falcon_180b_needs_what_the_article_says():
    """A 16-bit checkpoint of about 360 GB, ten of 3.6 TB, and adapters of tens of MB to gigabytes instead, in proportion to the rank."""
    config, batch = known_config("falcon-180b"), MicroBatch(256)
    comparison = Comparison(Rehearsals(config), Settings(r=8))
    disk, by_rank = comparison.checkpoint_bytes(batch), comparison.adapter_bytes(batch)
    assert disk["full"] == pytest.approx(360e9, rel=0.01) and 10 * disk["full"] == pytest.approx(3.6e12, rel=0.01)
    assert (
        list(by_rank) == [1, 8, 64]
        and by_rank[8] == disk["adapter"] == 8 * by_rank[1]
        and by_rank[64] == 64 * by_rank[1]
    )
    one = config.num_hidden_layers * (
        (14848 + 14848 + 2 * 8 * 64) + (14848 + 14848) + (14848 + 4 * 14848) + (4 * 14848 + 14848)
    )  # query, key and value; their sum; up; down: in + out of each, in each layer
    assert by_rank[1] == 2 * one


def test_the_forecast_as_json_is_the_contracts():
    rehearsals, needs = Rehearsals(known_config("smollm2-135m")), Needs(1024, "as a test", 0.1)
    chosen = fit(rehearsals, Settings(), Free(checkpoint_every=1), needs, Budgets(24 * GIB, 0))
    found = forecast(rehearsals, chosen, Settings(), Room(24 * GIB, 8192), method="qlora").to_json_dict()
    assert found["methods"].keys() == set(METHODS) and found["fits"] is True
    assert found["methods"]["qlora"]["parts"].keys() == {f"{part}_bytes" for part in PARTS}
    assert found["savings_vs_full"]["percent"] > 80
    assert found["checkpoint_bytes"].keys() >= {"full", "full_resume", "adapter"}
    assert found["max_seq_length"] == 8192
    assert found["grid"][0].keys() == {"max_seq_length", "batch", "peak_bytes", "fits"}
    assert found["merge"] is None


def test_each_method_is_told_its_largest_model():
    """In 24 GiB: 4 bits hold tens of billions of weights, 16 bits a few, and an fp32 master with its moments about one."""
    sizes = {
        name: SHAPES[largest_model(name, Settings(), budget_bytes=24 * GIB, label_share=0.1)].num_weights
        for name in METHODS
    }
    assert sizes["qlora"] > 27e9 and 7e9 < sizes["lora"] < 12e9 and sizes["full"] < 1.5e9 < sizes["full_8bit"] < 2.6e9
    assert largest_model("qlora", Settings(), budget_bytes=2**26, label_share=0.1) is None


def test_the_largest_model_does_not_depend_on_names_of_this_models_modules():
    settings = Settings(target_modules=("q_proj",), modules_to_save=("lm_head",))
    assert largest_model("qlora", settings, budget_bytes=24 * GIB, label_share=0.1) is not None


def test_merging_is_planned_where_something_is_merged():
    rehearsals, needs = Rehearsals(known_config("smollm2-135m")), Needs(1024, "as a test", 0.1)
    chosen = fit(rehearsals, Settings(), Free(checkpoint_every=1), needs, Budgets(24 * GIB, 0))
    found = forecast(
        rehearsals, chosen, Settings(), Room(24 * GIB, 8192), method="qlora", merging=Merging(chosen.settings)
    ).to_json_dict()
    assert 2**24 < found["merge"]["peak_host_bytes"] < found["merge"]["proof_peak_host_bytes"] < 4 * GIB


def test_a_sweep_has_a_line_a_model_and_more_tokens_on_larger_cards():
    names = ("smollm2-135m", "llama-3.1-8b")
    models = ((name, known_config(name), 8192) for name in names)
    rows = list(sweep(models, Settings(), label_share=0.1, host_budget_bytes=64 * GIB))
    assert [row.model for row in rows] == list(names)
    for row in rows:
        lengths = [row.max_seq_length[card] or 0 for card in CARDS]
        assert lengths == sorted(lengths)
        longer = [row.max_seq_length_with_homes[card] or 0 for card in CARDS]
        assert longer == sorted(longer) and longer[-1] >= lengths[-1]


def test_plan_prints_what_the_contract_names_and_writes_it_as_a_page(tmp_path):
    page = tmp_path / "plan.html"
    done = run_cli("plan", "smollm2-135m", "--budget", "2GiB", "--set", "lora.r=8", "--json", "--html", str(page))
    assert done.json["model"] == "smollm2-135m" and done.json["settings"]["lora"]["r"] == 8
    assert done.json["budget_bytes"] == 2 * GIB and done.json["num_weights"] == 134_515_008
    assert any("built-in" in reason or "config" in reason for reason in done.json["reasons"])
    assert "memory at the peak of a step" in done.stderr
    text = page.read_text()
    assert "Memory plan: smollm2-135m" in text and "It fits." in text
    assert "largest well-known model" in text and "proving the merge" in text and "an adapter of rank 64" in text
    assert set(done.json["adapter_bytes"]) == {"1", "8", "64"}
    largest = {name: method["largest_model"] for name, method in done.json["methods"].items()}
    assert largest["qlora"] and largest["lora"] and largest["full"] is None


def test_plan_says_what_does_not_fit_and_exits_3():
    done = run_cli("plan", "llama-3.1-8b", "--budget", "1GiB", "--json")
    assert done.code == 3 and "does not fit: needs" in done.stderr and "Largest part: weights" in done.stderr
    assert '"fits": false' in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("plan",), "give a recipe or a model's name, or --sweep"),
        (("plan", "--sweep", "--html", "x.html"), "--html writes the page of one recipe or model"),
        (("plan", "llama-3.1-9b"), "llama-3.1-8b"),
        (("plan", "someone/some-model"), "Fetch it with: qlora-lite fetch someone/some-model"),
        (("plan", "llama-3.1-8b", "--budget", "24XB"), "--budget: expected a size"),
        (("plan", "llama-3.1-8b", "--set", "lora.rr=8"), "did you mean lora.r?"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, expected):
    done = run_cli(*arguments)
    assert done.code == 2 and expected in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_fetched_model_is_planned_by_its_hub_name(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_HOME", str(tmp_path))
    commit = "1" * 40
    folder = commit_folder("someone/tiny", commit, cache=tmp_path)
    shutil.copytree(tiny_source(), folder)
    revisions_file("someone/tiny", cache=tmp_path).write_text(
        json.dumps({"newest": commit, "revisions": {"main": commit}})
    )
    found = run_cli("plan", "someone/tiny", "--budget", "64MiB", "--json").json
    assert found["model"] == "someone/tiny" and found["settings"]["model"]["base"] == "someone/tiny"
    assert any(str(folder) in reason for reason in found["reasons"])


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-2-9b", "falcon-7b"])
def test_one_model_serves_all_settings_of_a_step(name):
    """Whatever was rehearsed on it before."""
    config, batch = known_config(name), MicroBatch(300, 2)
    rehearsals = Rehearsals(config)
    for method in ("qlora", "full"):
        for every, chunk, optimizer in ((1, 256, "adamw"), (0, 16, "paged_adamw_8bit"), (2, 64, "adamw")):
            settings = Settings(method=method, checkpoint_every=every, head_chunk=chunk, optimizer=optimizer)
            assert rehearsals.of(settings, batch) == Stage(config, settings).rehearse(batch)
