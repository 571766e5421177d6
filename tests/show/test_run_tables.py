"""The terminal shows what the page of a run shows."""

import json

import pytest

from qlora_lite import show
from tests.show.run_files import write_run


@pytest.fixture(autouse=True)
def fresh_console():
    show.console.cache_clear()
    yield
    show.console.cache_clear()


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run-1")


def test_a_whole_run_shows_every_table(run_dir, capsys):
    show.show_run(run_dir)
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.err.splitlines()]
    for expected in (
        "exact match 6.0 49.0 +43.0",
        "untrained: exact match 6.0 41.5 +35.5",
        "peak 368 MiB 359 MiB -9 MiB",
        "backward 368 MiB 359 MiB -9 MiB",
        "peak 368 MiB 514 MiB 1.68 GiB 2.43 GiB",
        "training 1 min 58 s 55%",
        "adapter/ 29.3 KiB",
        "device: cpu: torch finds no CUDA device",
    ):
        assert expected.split() in lines, expected
    assert "adapter's effect" in printed.err and printed.out == "" and "\x1b[2J" not in printed.err


def test_an_empty_folder_shows_nothing(tmp_path, capsys):
    show.show_run(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "document", [[], 3, {"before": 3, "groups": {"x": 3}, "methods": {"qlora": 3}, "retries": 3, "reasons": 3}]
)
def test_files_of_another_shape_are_no_error(run_dir, document):
    for name in ("eval.json", "memory.json", "plan.json", "merge.json", "train.json"):
        (run_dir / name).write_text(json.dumps(document))
    show.show_run(run_dir)


def test_a_damaged_file_is_a_warning(run_dir, capsys):
    (run_dir / "eval.json").write_text("{")
    show.show_run(run_dir)
    assert "warning: could not be read: eval.json" in capsys.readouterr().err
