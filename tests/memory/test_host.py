"""What others take of the machine."""

import multiprocessing
import os
import time

import pytest

from qlora_lite.memory import host
from qlora_lite.memory.host import OtherWork, in_words


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_work_of_another_process_counts_and_our_own_does_not():
    work = OtherWork()
    spin(0.6)
    alone = work.cores()
    context = multiprocessing.get_context("spawn")
    other = context.Process(target=spin, args=(8.0,))
    other.start()
    deadline = time.monotonic() + 7
    seen = 0.0
    while time.monotonic() < deadline and seen < alone + 0.3:  # it takes a while to start
        time.sleep(0.5)
        seen = max(seen, work.cores())
    other.terminate()
    other.join()
    assert seen >= min(alone + 0.3, (os.cpu_count() or 1) - 0.3)


def test_a_moment_too_short_for_the_clock_tells_nothing():
    work = OtherWork()
    work.cores()
    assert work.cores() == 0.0


@pytest.mark.parametrize(("cores", "remark"), [(0.0, None), (0.4, None), (1.6, "other programs take 1.6 of 2 cores")])
def test_a_quarter_of_the_machine_is_worth_a_remark(cores, remark, monkeypatch):
    monkeypatch.setattr(host.os, "cpu_count", lambda: 2)
    assert in_words(cores) == remark
