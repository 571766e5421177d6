"""Tokens and passwords of the environment stay there: no file, no output, no message holds one, and no file is others' to write."""

import os
import stat
import subprocess

import pytest

from qlora_lite.base import shipped as bring
from qlora_lite.base.hub import look_up, open_hub
from qlora_lite.base.shipped import bring_shipped, without_credentials
from qlora_lite.errors import ModelError
from tests.hub_server import COMMIT, REPO, fake_hub
from tests.security.whole_run import SECRET, whole_run
from tests.tiny_run import run_cli


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.slow
def test_a_secret_of_the_environment_is_in_no_file_and_no_output():
    run = whole_run()
    assert {"env.json", "plan.json", "report.html", "predictions.jsonl", "recipe.yaml"} <= {
        path.name for path in run.files
    }
    assert any("tfevents" in path.name for path in run.files)
    assert [path for path in run.files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET.encode() not in run.output


@pytest.mark.slow
def test_no_file_or_folder_is_for_others_to_write():
    run = whole_run()
    loose = [
        path for path in run.folder.rglob("*") if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o022
    ]
    assert len(run.files) > 20 and loose == []


@pytest.mark.parametrize(
    "endpoint",
    [f"https://{SECRET}@hub.example", f"https://me:{SECRET}@hub.example/api", f"hub.example?token={SECRET}", f"https://hub.example/#{SECRET}"],
)  # fmt: skip
def test_an_address_of_the_hub_with_a_secret_in_it_is_refused_without_showing_it(endpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr("qlora_lite.commands.fetch.OFFLINE_ASKED", False)
    done = run_cli("fetch", REPO)
    assert done.code == 2 and "HF_ENDPOINT: contains a user, a password or a query" in done.last_line
    assert SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize("endpoint", ["http://[", "https://", "https:///x", "ftp://hub.example", "file:///etc/passwd"])
def test_an_address_of_the_hub_that_is_none_is_refused(endpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ModelError, match="HF_ENDPOINT: expected an address such as"), open_hub():
        pass


def test_a_token_is_not_sent_where_everyone_on_the_way_can_read_it(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    with pytest.raises(ModelError, match="HF_TOKEN: would be sent unencrypted") as caught, open_hub():
        pass
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("proxy", [f"gopher://{SECRET}:{SECRET}@proxy.example:1", f"socks5://{SECRET}@proxy.example:1"])
def test_a_proxy_that_cannot_be_used_is_said_without_its_password(proxy, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ModelError, match="names an unusable proxy") as caught, open_hub():
        pass
    assert SECRET not in str(caught.value)


def test_a_proxy_that_does_not_answer_is_said_without_its_password(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://{SECRET}:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    with pytest.raises(ModelError, match="no connection to http://hub") as caught, open_hub() as hub:
        look_up(hub, REPO, None)
    assert SECRET not in str(caught.value)


def test_a_listing_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr("qlora_lite.base.hub.MOST_LISTING_BYTES", 1000)
    with fake_hub({REPO: {COMMIT: {"config.json": b"{}"}}}) as hub:
        hub.raw_listing = b" " * 100_000
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(ModelError, match="endless answer about some-org/tiny"), open_hub() as opened:
            look_up(opened, REPO, None)


def test_what_pip_says_is_shown_without_the_password_of_its_index(monkeypatch, tmp_path):
    words = f"ERROR: https://me:{SECRET}@index.example/simple/ and https://{SECRET}@index.example/x: not found"

    def fails(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=words)

    monkeypatch.setattr(bring.subprocess, "run", fails)
    with pytest.raises(ModelError, match="https://index") as caught:
        bring_shipped("smollm2-135m", cache=tmp_path)
    assert SECRET not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://a:b@c/d", "https://c/d"),
        ("see http://t@c, then https://x:y@z/", "see http://c, then https://z/"),
        ("https://c/@scope/name and me@c", "https://c/@scope/name and me@c"),
        ("https://a:p@ss@c/d", "https://c/d"),
    ],
)
def test_only_the_credentials_of_an_address_are_taken_out(text, clean):
    assert without_credentials(text) == clean
