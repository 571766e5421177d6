"""What every test gets: no network, the same random numbers each time, and a cache of its own unless it asks for the real one."""

import gc
import os
import random
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import qlora_lite  # noqa: F401  (guards the import of bitsandbytes before a test imports peft)

gc.disable()  # importing makes a million objects and hardly any garbage; collections begin with the tests
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell starts what runs in its background so; the programs under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# About the longest first: tools/test gives a worker one file at a time, in this order, so that none of them is the last.
LONGEST_FILES = (
    "test_standin.py",
    "crash/test_kills.py",
    "crash/test_failing_calls.py",
    "promises/test_promise_06_plan.py",
    "promises/test_promise_13_network.py",
    "plan/test_forecast.py",
    "test_end_to_end.py",
    "test_architectures.py",
    "hostile/test_fuzz.py",
    "commands/test_pipeline.py",
    "promises/test_promise_01_split.py",
    "commands/test_doctor.py",
    "test_recipes_check.py",
    "test_methods.py",
    "test_gpu_check.py",
    "plan/test_scoring.py",
    "base/test_gguf_folder.py",
    "plan/test_every_key.py",
    "merging/test_write.py",
    "test_standard_streams.py",
    "commands/test_fetch.py",
)
# Two look at the run of tests/security/whole_run.py, and two kill the runs of one server: both are made once in a process.
TOGETHER = {
    "tests/security/test_secrets.py": "tests/promises/test_promise_13_network.py",
    "tests/crash/test_failing_calls.py": "tests/crash/test_kills.py",
}

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_HOME = os.environ.get("QLORA_LITE_HOME") or "~/.cache/qlora_lite"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting anywhere but to a socket on this machine is an error: nothing touches the network unless asked to."""
    real_connect = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise AssertionError(f"a test opened a connection to {address}")
        real_connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`QLORA_LITE_HOME` is an empty folder, so that no test reads or fills the user's cache."""
    monkeypatch.setenv("QLORA_LITE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    random.seed(0)
    if "torch" in sys.modules:  # tests that do not need torch do not pay for its import
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def repository() -> Path:
    """The folder with pyproject.toml."""
    return REPOSITORY


@pytest.fixture(scope="session")
def small_gguf() -> Path:
    """The small real model's file; skips when `tools/test` did not bring it. For tests marked slow."""
    path = Path(REAL_HOME).expanduser() / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("the small real model is not in the cache: python -m qlora_lite.base.shipped smollm2-135m")
    return path


@pytest.fixture
def real_home(small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's real cache as `QLORA_LITE_HOME`, with the small real model and what was made from it in it."""
    home = Path(REAL_HOME).expanduser()
    monkeypatch.setenv("QLORA_LITE_HOME", str(home))
    return home


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collections leave the imported modules alone."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker gets whole files, and the files that share a long piece of work."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """LONGEST_FILES first, and tests marked gpu are skipped without a card."""
    places = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    _skip_without_card(items)


def _skip_without_card(items: list[pytest.Item]) -> None:
    """torch is imported only when there are tests marked gpu."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))
