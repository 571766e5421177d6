"""A full disk, an unreadable sector, a read-only folder, a jumping clock: one clear message, nothing lost, and the run can go on."""

import errno

import pytest

from tests.crash.faults import Fault
from tests.crash.scenario import Scenario, kinds_of_points

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_checkpoint_that_cannot_be_written_is_lost_alone_and_training_goes_on(scenario: Scenario, code: int) -> None:
    run = scenario.new_run()
    first = scenario.point("adapter_model.safetensors")
    outcome = scenario.train(run, fault=Fault("error", first, errno=code))
    assert outcome.code == 0, outcome.stderr
    assert "the checkpoint of step 2 cannot be written" in outcome.stderr and "Training continues" in outcome.stderr
    assert not (run / "checkpoints" / "step-000002").exists()
    assert [found for found in scenario.difference(run) if "step-000002" not in found] == ["files"]


def test_a_log_line_that_cannot_be_written_comes_later_and_training_goes_on(scenario: Scenario) -> None:
    run = scenario.new_run()
    outcome = scenario.train(run, fault=Fault("error", scenario.point("open calm/steps.jsonl", nth=2)))
    assert outcome.code == 0 and "the line is written as soon as there is space" in outcome.stderr, outcome.stderr
    assert scenario.difference(run) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_whatever_call_fails_there_is_one_clear_message_and_the_run_can_go_on(scenario: Scenario, code: int) -> None:
    for kind, number in list(kinds_of_points(scenario.points).items())[code % 2 :: 6]:
        run = scenario.new_run()
        outcome = scenario.train(run, fault=Fault("error", number, count=1, errno=code))
        assert outcome.code in (0, 2) and "Traceback" not in outcome.stderr, (kind, outcome.stderr)
        resumed = scenario.go_on(run)
        assert resumed.code == 0, (kind, resumed.stderr)
        assert [each for each in scenario.difference(run) if "step-000002" not in each and each != "files"] == [], kind


def test_short_writes_are_gone_on_with(scenario: Scenario) -> None:
    for what in ("write calm/steps.jsonl",):
        run = scenario.new_run()
        assert scenario.train(run, fault=Fault("short", scenario.point(what))).code == 0
        assert scenario.difference(run) == []


def test_a_folder_that_has_become_read_only_is_one_clear_message_and_the_run_goes_on_later(scenario: Scenario) -> None:
    run = scenario.new_run()
    outcome = scenario.train(run, fault=Fault("read_only", scenario.point("write calm/steps.jsonl", nth=3)))
    assert outcome.code == 2 and "Read-only file system" in outcome.stderr and "Traceback" not in outcome.stderr
    assert scenario.go_on(run).code == 0
    assert scenario.difference(run) == []


def test_a_clock_that_jumps_changes_nothing(scenario: Scenario) -> None:
    run = scenario.new_run()
    for seconds in (1e7, -1e7):
        run = scenario.new_run()
        assert scenario.train(run, fault=Fault("clock", 5, seconds=seconds)).code == 0
        assert scenario.difference(run) == []
