"""Promise 13: nothing touches the network unless asked to fetch; nothing is unpickled.

The whole program runs once (tests/security/whole_run.py), in an environment that tells the libraries below to go online. What the
source may not hold is in tests/test_imports.py, and that `fetch` alone opens a connection in tests/commands/test_fetch.py.
"""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.security.whole_run import known_verbs, namespace, opens_a_connection, tracer, whole_run

CONNECTING = {
    "connect": "import socket; socket.socket().connect(('127.0.0.1', 9))",
    "resolve": "import socket; socket.getaddrinfo('hub.example', 443)",
    "serve": "import socket; socket.socket().bind(('127.0.0.1', 0))",
    "datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "http": "import http.client; http.client.HTTPConnection('127.0.0.1', 9).request('GET', '/')",
}
NATIVE = "import ctypes; ctypes.CDLL(None).socket(2, 1, 0)"  # AF_INET, SOCK_STREAM, unseen by Python


@pytest.mark.slow
def test_every_verb_but_fetch_is_done_without_asking_for_a_connection():
    run = whole_run()
    assert run.connections == (), run.output.decode()
    assert set(run.codes.values()) == {0}, (run.codes, run.output.decode())
    assert set(run.codes) == known_verbs() - {"fetch"} | {"process"}


@pytest.mark.slow
def test_every_verb_but_fetch_is_done_where_there_is_no_network():
    run = whole_run()
    if not run.in_namespace:
        pytest.skip("this machine allows no network namespace (unshare)")
    assert set(run.codes.values()) == {0}, run.output.decode()


@pytest.mark.slow
def test_native_code_does_not_ask_the_kernel_for_a_connection_either():
    run = whole_run()
    if run.system_calls is None:
        pytest.skip("needs strace")
    assert [call for call in run.system_calls if opens_a_connection(call)] == []


@pytest.mark.slow
def test_nothing_is_unpickled_and_no_other_program_is_started():
    run = whole_run()
    assert run.pickles == ()
    assert [line for line in run.processes if "('uname', ['uname', '-p']" not in line] == []  # Python's platform module


@pytest.mark.parametrize("name", CONNECTING)
def test_a_connection_would_have_been_seen(name, tmp_path):
    """The hook by itself: what it forbids ends the process, and stands in the log."""
    log = tmp_path / "log"
    code = f"import os; from tests.security.guarded import forbid; forbid(os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT))\n"
    command = [sys.executable, "-c", f"{code}try: {CONNECTING[name]}\nexcept Exception: pass"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode != 0 and "Forbidden" in done.stderr
    assert log.read_text().startswith("network ")


def test_a_connection_of_native_code_would_have_been_seen(tmp_path):
    traced = tracer(tmp_path / "calls")
    if not traced:
        pytest.skip("needs strace")
    pair = "import socket; socket.socketpair()"  # between processes of this machine: not meant
    subprocess.run([*traced, sys.executable, "-c", f"{pair}; {NATIVE}"], check=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [opens_a_connection(call) for call in calls if " socket" in call] == [False, True]


def test_there_is_no_network_in_the_namespace():
    if not (without_routes := namespace()):
        pytest.skip("this machine allows no network namespace (unshare)")
    code = "import json, socket; print(json.dumps([name for _, name in socket.if_nameindex()]))"
    done = subprocess.run([*without_routes, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["lo"]
