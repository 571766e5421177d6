"""One server and one undisturbed run for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.crash.scenario import Scenario, prepare
from tests.crash.server import Server
from tests.quick_folder import quick_folder


@pytest.fixture(scope="session")
def scenario() -> Iterator[Scenario]:
    with quick_folder("crash") as folder, Server(folder / "scratch", home=folder / "home") as server:
        yield prepare(folder, server)
