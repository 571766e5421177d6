"""What `plan --json` prints, and what a run keeps as plan.json, is what qlora_lite/plan/plan.schema.json says; and its numbers agree."""

import copy
import json
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from qlora_lite import api
from qlora_lite.recipe import load_recipe
from qlora_lite.runs.folder import RunDir
from tests.architectures import published
from tests.tiny_model import tiny_source
from tests.tiny_run import run_cli, write_recipe

SCHEMA = json.loads((resources.files("qlora_lite.plan") / "plan.schema.json").read_text(encoding="utf-8"))
RUN = {**SCHEMA, "$ref": "#/$defs/run"}
FITTING, TIGHT = "64MiB", "4MiB"  # for the tiny model, on a card
MIB = 2**20


def plan_document(*arguments: object) -> dict[str, Any]:
    """What `plan --json` prints; it exits with 3 where nothing fits, and prints all the same."""
    done = run_cli("plan", *arguments, "--json")
    assert done.code in (0, 3), done.stderr
    assert done.stdout.count("\n") == 1
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.code == (0 if document["fits"] else 3)
    return document


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return plan_document(tiny_source(), "--budget", FITTING)


def own(document: dict[str, Any]) -> dict[str, Any]:
    """Of `methods`, the one that would be run."""
    settings = document["settings"]
    is_8bit = settings["method"] == "full" and settings["train"]["optimizer"] == "paged_adamw_8bit"
    return document["methods"]["full_8bit" if is_8bit else settings["method"]]


def check_numbers(document: dict[str, Any]) -> None:
    """What a schema cannot say."""
    mine, full = own(document), document["methods"]["full"]
    assert document["fits"] == (mine["peak_bytes"] <= document["budget_bytes"])
    for method in document["methods"].values():
        assert sum(method["parts"].values()) == method["peak_bytes"]
        assert method["peak_bytes"] == max(phase["peak_bytes"] for phase in method["phases"].values())
        for phase in method["phases"].values():
            assert sum(phase["parts"].values()) == phase["peak_bytes"]
    saved = full["peak_bytes"] - mine["peak_bytes"]
    assert document["savings_vs_full"]["bytes"] == saved
    assert document["savings_vs_full"]["percent"] == pytest.approx(100 * saved / full["peak_bytes"])
    disk = document["checkpoint_bytes"]
    assert disk["full"] < disk["full_resume"] and disk["adapter"] < disk["adapter_resume"]
    for cell in document.get("grid", ()):
        assert cell["fits"] == (cell["peak_bytes"] <= document["budget_bytes"])
    for concession in document.get("concessions", ()):
        assert concession["peak_bytes"] == mine["peak_bytes"] - concession["saves_bytes"] < mine["peak_bytes"]
    if "smallest_budget_bytes" in document:
        assert document["smallest_budget_bytes"] == (None if document["fits"] else mine["peak_bytes"])


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("budget", [FITTING, TIGHT])
@pytest.mark.parametrize("settings", [(), ("method=full",), ("method=lora", "train.optimizer=adamw"), ("device=cpu",)])
def test_a_plan_is_what_the_schema_says_and_its_numbers_agree(settings, budget):
    sets = [word for setting in settings for word in ("--set", setting)]
    found = plan_document(tiny_source(), "--budget", budget, *sets)
    Draft202012Validator(SCHEMA).validate(found)
    check_numbers(found)
    assert found["methods"]["qlora"]["max_seq_length"] is None or found["methods"]["qlora"]["max_seq_length"] <= 512


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_so_it_is_for_models_that_grow_in_no_straight_line(name):
    found = plan_document(published(name), "--budget", FITTING)
    Draft202012Validator(SCHEMA).validate(found)
    check_numbers(found)


def test_a_runs_plan_json_is_what_the_schema_says(tmp_path):
    plan = api.make_plan(load_recipe(str(write_recipe(tmp_path))))
    run = RunDir.create(tmp_path / "run")
    run.write_json("plan.json", plan.to_json_dict())
    found = json.loads((run.path / "plan.json").read_text(encoding="utf-8"))
    Draft202012Validator(RUN).validate(found)
    check_numbers(found)


def test_new_keys_are_welcome_anywhere(document):
    more = copy.deepcopy(document)
    more["new"] = more["methods"]["new"] = copy.deepcopy(more["methods"]["qlora"])
    more["methods"]["qlora"]["parts"]["new_bytes"] = 1
    more["concessions"] = [{"setting": "train.micro_batch_tokens=512", "saves_bytes": MIB, "peak_bytes": 9 * MIB}]
    more |= {"slowdown": 1.3, "smallest_budget_bytes": 5 * MIB}
    Draft202012Validator(SCHEMA).validate(more)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("fits",), None),
        (("budget_bytes",), -1),
        (("schema_version",), 2),
        (("methods", "full_8bit"), None),
        (("methods", "qlora", "parts", "logits_bytes"), None),
        (("methods", "lora", "max_seq_length"), "long"),
        (("methods", "lora", "phases", "update"), None),
        (("grid", 0, "batch"), 0),
        (("merge", "proof_peak_host_bytes"), None),
        (("adapter_bytes",), {"sixteen": 1}),
        (("methods", "full", "largest_model"), 7),
        (("slowdown",), "1.3"),
        (("concessions",), [{"setting": "a=1", "saves_bytes": 1}]),
        (("smallest_budget_bytes",), 1.5),
    ],
)
def test_a_document_without_what_is_promised_is_refused(document, where, value):
    """None: the key is taken away."""
    broken = copy.deepcopy(document)
    place: Any = broken
    for step in where[:-1]:
        place = place[step]
    if value is None:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    with pytest.raises(ValidationError):
        Draft202012Validator(SCHEMA).validate(broken)
