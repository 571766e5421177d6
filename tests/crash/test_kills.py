"""Killed at any moment, a run goes on and ends as if nothing had happened: promise 8. A choice here; `tools/soak` does all of it."""

import random
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.crash.faults import Fault
from tests.crash.scenario import Scenario, kinds_of_points, outcome_of
from tests.crash.server import Outcome

pytestmark = pytest.mark.slow
NUM_MOMENTS = 5


def chosen(kinds: dict[str, int]) -> dict[str, int]:
    """Every second of those at which something is half done; the others lie next to one of these."""
    half_done = [kind for kind in kinds if kind.split()[0] in ("write", "rename", "lock")]
    return {
        kind: kinds[kind]
        for kind in (*half_done[::2], *(kind for kind in half_done if "checkpoints" in kind or "step-N" in kind))
    }


def ended_well(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.stderr


def test_two_undisturbed_runs_are_equal_bit_by_bit(scenario: Scenario) -> None:
    """Without this, none of the comparisons below could hold."""
    run = scenario.new_run()
    ended_well(scenario.train(run))
    assert scenario.difference(run) == []


def test_a_run_that_was_killed_at_a_write_point_of_each_kind_ends_as_if_it_had_not_been(scenario: Scenario) -> None:
    kinds = kinds_of_points(scenario.points)
    assert {
        "write steps.jsonl",
        "rename manifest.json",
        "sync checkpoints",
        "write adapter_model.safetensors",
    } <= kinds.keys()
    for kind, number in chosen(kinds).items():
        run = scenario.new_run()
        assert scenario.train(run, fault=Fault("kill", number)).was_killed, kind
        ended_well(scenario.go_on(run))
        assert scenario.difference(run) == [], kind


def test_a_run_that_was_killed_at_random_moments_of_it_ends_as_if_it_had_not_been(scenario: Scenario) -> None:
    moments = random.Random(0)
    run = scenario.new_run()
    whole_s = scenario.train(run).elapsed_s
    for _ in range(NUM_MOMENTS):
        run = scenario.new_run()
        scenario.train(run, kill_after_s=moments.uniform(0, whole_s))
        ended_well(scenario.go_on(run))
        assert scenario.difference(run) == []


def test_a_run_that_was_killed_again_and_again_ends_as_if_it_had_not_been(scenario: Scenario) -> None:
    run = scenario.new_run()
    for number in (60, 40, 50, 60):
        words = ["--resume"] if run.exists() else []
        assert scenario.train(run, *words, fault=Fault("kill", number)).was_killed
    ended_well(scenario.go_on(run))
    assert scenario.difference(run) == []


def test_a_merge_that_was_killed_at_a_write_point_of_each_kind_ends_as_if_it_had_not_been(scenario: Scenario) -> None:
    calm = scenario.folder / "calm"
    for kind, number in chosen(kinds_of_points(scenario.merge_points)).items():
        run = scenario.copy_unmerged()
        assert scenario.server.run("merge", run, roots=[run], fault=Fault("kill", number)).was_killed, kind
        ended_well(scenario.merge_again(run))
        assert outcome_of(run) == outcome_of(calm), kind
        ended_well(scenario.server.run("verify", run))


def test_a_merge_elsewhere_leaves_no_rubbish_when_it_was_killed_and_is_done_again(
    scenario: Scenario, tmp_path: Path
) -> None:
    run, out = scenario.copy_unmerged(), tmp_path / "out"
    assert scenario.server.run("merge", run, out, roots=[tmp_path], fault=Fault("kill", 6)).was_killed
    assert [path.name for path in tmp_path.iterdir()] != []
    ended_well(scenario.server.run("merge", run, out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    ended_well(scenario.server.run("verify", out))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_the_printed_command_continues(
    scenario: Scenario, number: int, code: int
) -> None:
    run = scenario.new_run()
    outcome = scenario.train(run, fault=Fault("signal", scenario.point("write calm/steps.jsonl"), number=number))
    assert outcome.code == code, outcome.stderr
    said = r"stopped after step 1 of 4; a checkpoint is written\. Continue with:\n  qlora-lite (train .* --resume)\n"
    command = re.search(said, outcome.stderr)
    assert command is not None, outcome.stderr
    ended_well(scenario.server.run(*shlex.split(command[1])))
    assert scenario.difference(run) == []


def test_a_second_signal_stops_at_once_and_loses_only_what_is_after_the_last_checkpoint(scenario: Scenario) -> None:
    run = scenario.new_run()
    third = scenario.point("write calm/steps.jsonl", nth=3)
    outcome = scenario.train(run, fault=Fault("signal", third, count=2, number=signal.SIGINT))
    assert outcome.code == 130 and "stopped; continue with:" in outcome.stderr, outcome.stderr
    resumed = scenario.go_on(run)
    assert "continues after step 2" in resumed.stderr
    assert scenario.difference(run) == []
