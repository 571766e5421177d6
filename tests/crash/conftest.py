"""One server and one undisturbed run for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.crash.scenario import Scenario, prepare
from tests.crash.server import Server


@pytest.fixture(scope="session")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    folder = tmp_path_factory.mktemp("crash")
    with Server(folder / "scratch", home=folder / "home") as server:
        yield prepare(folder, server)
