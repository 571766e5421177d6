"""Processes that start together and need the same thing of the cache: one makes it, and all of them use it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_lite.errors import UserError
from qlora_lite.files import made_once
from qlora_lite.files.made_once import make_folder_once, making
from tests.conftest import REPOSITORY
from tests.tiny_model import tiny_source

# Quantizes and tokenizes when `go` appears; says what it has made itself.
BOTH = """
import json, sys, time
from pathlib import Path
from qlora_lite.data import examples
from qlora_lite.base import artefact
from tests.data.tiny_tokenizer import make_tokenizer
folder, source, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
tokenizer, made = make_tokenizer(), []
quantize, write = artefact._write_artefact, examples._write_cache
artefact._write_artefact = lambda *a: (made.append("base"), time.sleep(0.5), quantize(*a))
examples._write_cache = lambda *a: (made.append("rows"), time.sleep(0.5), write(*a))[-1]
(folder / f"{name}.ready").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
base = artefact.quantize_base(source, cache=folder / "cache")
rows = examples.load_examples(
    folder / "rows.jsonl", tokenizer, examples.Reading(no_answer_text="none"), max_seq_length=None, cache_dir=folder / "cache" / "data"
)
print(json.dumps({"made": made, "base": artefact.verify_artefact(base), "rows": len(rows), "counts": rows.counts.num_read}))
"""
HOLDS = """
import sys, time
from pathlib import Path
from qlora_lite.files.made_once import making
with making(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def start(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_of_two_processes_one_quantizes_and_one_tokenizes_and_both_use_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    both = [start(BOTH, tmp_path, tiny_source(), name) for name in "ab"]
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.ready"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / "go").touch()
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    found = [json.loads(out) for out, _ in ended]
    assert sorted(found[0]["made"] + found[1]["made"]) == ["base", "rows"]
    assert found[0]["base"] == found[1]["base"] and found[0]["rows"] == found[1]["rows"] == found[0]["counts"] == 5


def test_a_process_that_was_killed_while_making_something_blocks_nobody(tmp_path):
    with start(HOLDS, tmp_path / "thing") as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        os.kill(holder.pid, signal.SIGKILL)
    begin = time.monotonic()
    with making(tmp_path / "thing"):
        pass
    assert time.monotonic() - begin < 5


class NoLocks:
    def __init__(self, path):
        pass

    def __enter__(self):
        raise NotImplementedError

    def __exit__(self, *_):
        pass


def test_without_locks_whoever_loses_takes_what_the_winner_made(tmp_path, monkeypatch):
    monkeypatch.setattr(made_once, "FileLock", NoLocks)
    out = tmp_path / "thing"

    def make(staging: Path) -> None:
        (staging / "done").write_text("ours")
        out.mkdir()  # another process is faster
        (out / "done").write_text("theirs")

    assert make_folder_once(out, is_made=(out / "done").is_file, make=make) == out
    assert (out / "done").read_text() == "theirs" and [path.name for path in tmp_path.iterdir()] != []


def test_a_failure_to_make_something_is_told_and_leaves_it_to_the_next(tmp_path):
    out = tmp_path / "thing"

    def fail(staging: Path) -> None:
        raise UserError("cannot")

    with pytest.raises(UserError, match="cannot"):
        make_folder_once(out, is_made=(out / "done").is_file, make=fail)
    make_folder_once(out, is_made=(out / "done").is_file, make=lambda staging: (staging / "done").write_text("x"))
    assert (out / "done").is_file()
