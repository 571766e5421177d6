"""A short batch of tools/fuzz: some mutated inputs of every reader, each run in a watched process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.hostile.fuzzing import READERS, run_cases
from tests.hostile.mutations import mutate_bytes, mutate_json, mutate_text
from tests.hostile.reader import Reader

NUM_CASES = 40
CASES_OF = {"plan": 15}  # one takes seconds, and "config" reads all 40 of the same mutated files


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own, because it forks."""
    out = tmp_path_factory.mktemp("fuzz") / "fuzz.json"
    tool = [sys.executable, str(REPOSITORY / "tools" / "fuzz"), "--cases", str(NUM_CASES), "--json", str(out)]
    tool += [f"--cases-of={name}={number}" for name, number in CASES_OF.items()]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=600)
    assert out.is_file(), done.stderr
    return json.loads(out.read_text(encoding="utf-8"))["readers"]


@pytest.mark.parametrize("name", READERS)
def test_mutated_input_is_read_or_refused_with_exit_code_2(name: str, counts: dict[str, Any]) -> None:
    assert counts[name]["failures"] == []
    assert counts[name]["num_ok"] + counts[name]["num_refused"] == CASES_OF.get(name, NUM_CASES)


@pytest.mark.parametrize("name", READERS)
def test_a_fifth_of_the_mutated_input_gets_past_the_first_parse(name: str, counts: dict[str, Any]) -> None:
    assert counts[name]["num_past_first_parse"] >= CASES_OF.get(name, NUM_CASES) / 5


def test_a_case_is_the_same_each_time_it_is_drawn() -> None:
    document = {"a": [1, 2, {"b": "text of words"}], "c": None}

    def draw(number: int) -> tuple[bytes, str, str]:
        rng = Random(f"reader:{number}")
        return mutate_bytes(b"some bytes", rng), mutate_text("some words here", rng), mutate_json(document, rng)

    assert [draw(n) for n in range(50)] == [draw(n) for n in range(50)]
    assert len({draw(n) for n in range(50)}) == 50


def _misbehave(folder: Path) -> object:
    what = (folder / "what").read_text(encoding="utf-8")
    match what:
        case "traceback":
            return {}["x"]
        case "endless":
            while True:
                pass
        case "memory":
            return bytearray(2**40)
        case "large":
            return bytearray(2**30).count(b"\1")
        case "signal":
            return os.kill(os.getpid(), 11)
        case "outside":
            return (folder.parent / "outside" / "secret.safetensors").read_bytes()
        case "elsewhere":
            return Path(folder.parent.parent, "qlora-lite-fuzz-test").mkdir()
        case "program":
            return subprocess.run(["true"])
    return None


def _write_what(seed: str, folder: Path, rng: Random | None) -> None:
    (folder / "what").write_text(seed, encoding="utf-8")


MISBEHAVIOUR = {
    "traceback": "crash", "endless": "hang", "memory": "memory", "large": "memory", "signal": "died", "outside": "outside",
    "elsewhere": "outside", "program": "outside", "nothing": "ok",
}  # fmt: skip


@pytest.mark.parametrize("what", MISBEHAVIOUR)
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_the_fuzzer_sees_a_reader_that(what: str, tmp_path: Path) -> None:
    reader = Reader("test", lambda _: [what], _write_what, lambda folder: True, _misbehave)
    seconds = 2 if what == "endless" else 60  # a busy machine takes its time with the others
    outcomes = list(run_cases(reader, [0, 1], case_seconds=seconds, first_seconds=seconds))
    assert [outcome.case for outcome in outcomes] == [0, 1]
    assert {outcome.what for outcome in outcomes} == {MISBEHAVIOUR[what]}
