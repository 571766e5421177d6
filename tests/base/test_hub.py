"""Fetching from a hub: what is taken, by which hash it is believed, and how each thing that goes wrong is said and mended."""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from qlora_lite.base import hub as hub_module
from qlora_lite.base.hub import fetch_files, look_up, open_hub
from qlora_lite.errors import ModelError
from qlora_lite.files.made_once import making
from qlora_lite.files.manifest import read_manifest, verify_manifest
from qlora_lite.recipe.hub_names import commit_folder, find_fetched, read_revisions
from tests.hub_server import COMMIT, OTHER_COMMIT, REPO, FakeHub, fake_hub

WEIGHTS = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(200)) * 50  # 320,000 bytes without a pattern
CONFIG = json.dumps({"model_type": "llama"}).encode()
TAKEN = {
    "config.json": CONFIG,
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# Tiny",
    "LICENSE": b"Apache",
    "NOTICE": b"",
    "model.safetensors": WEIGHTS,
}
LEFT = {
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"import os",
    "consolidated.safetensors": WEIGHTS,
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"onnx",
    "tokenizer.py": b"import os",
    "tiny.Q4_0.gguf": b"GGUF",
    ".gitattributes": b"",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub_module, "RETRY_S", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with fake_hub({REPO: {COMMIT: TAKEN | LEFT}}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield hub


def fetch(cache: Path, repo: str = REPO, revision: str | None = None, **options) -> Path:
    with open_hub() as hub:
        return fetch_files(hub, look_up(hub, repo, revision), cache=cache, **options)


def refused(cache: Path, repo: str = REPO, revision: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        fetch(cache, repo, revision)
    return str(caught.value)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def partial_folder(cache: Path) -> Path:
    return cache / "hub" / "some-org" / f".tiny@{COMMIT}.partial"


def nothing_is_left(cache: Path) -> bool:
    """No folder and no partial one; a lock file may stay."""
    return not [path for path in (cache / "hub").rglob("*") if path.is_dir() and "tiny" in path.name]


# what is taken


def test_a_model_is_fetched_whole_without_pickles_code_or_second_copies_and_with_its_hashes(hub, tmp_path):
    folder = fetch(tmp_path)
    assert folder == tmp_path / "hub" / "some-org" / f"tiny@{COMMIT}"
    found = files(folder)
    manifest = json.loads(found.pop("manifest.json"))
    assert found == TAKEN
    assert (manifest["repo"], manifest["commit"]) == (REPO, COMMIT)
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in TAKEN.items()
    }
    assert not partial_folder(tmp_path).exists()


def test_a_pull_request_is_a_revision_like_any_other(hub, tmp_path):
    hub.revisions["refs/pr/1"] = COMMIT
    assert fetch(tmp_path, revision="refs/pr/1") == find_fetched(REPO, "refs/pr/1", cache=tmp_path)


def test_the_index_says_which_shards_are_taken(hub, tmp_path):
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 1000 for i in (1, 2)}
    index = {"weight_map": dict(zip("abc", [*shards, next(iter(shards))], strict=True))}
    model = TAKEN | shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.models[REPO][COMMIT] = model | {"model-00001-of-00001.safetensors": b"a second copy"}
    found = files(fetch(tmp_path))
    found.pop("manifest.json")
    del model["model.safetensors"]  # the index counts, as when the weights are read
    assert found == model


def test_the_bytes_are_counted_to_the_total(hub, tmp_path):
    seen: list[tuple[int, int]] = []
    fetch(tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = sum(len(content) for content in TAKEN.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# a second time


def test_a_second_fetch_of_a_commit_downloads_nothing(hub, tmp_path):
    folder = fetch(tmp_path)
    before, times = len(hub.answers), {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert fetch(tmp_path, revision=COMMIT) == folder
    assert [answer.path for answer in hub.answers[before:]] == [f"/api/models/{REPO}/revision/{COMMIT}"]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_a_file_that_was_damaged_since_is_fetched_again_and_the_others_are_not(hub, tmp_path):
    folder = fetch(tmp_path)
    (folder / "tokenizer.json").write_bytes(TAKEN["tokenizer.json"].replace(b"1", b"2"))
    hub.answers.clear()
    assert fetch(tmp_path) == folder
    assert files(folder)["tokenizer.json"] == TAKEN["tokenizer.json"] and verify_manifest(folder) == []
    assert [answer.path.split("/")[-1] for answer in hub.answers[1:]] == ["tokenizer.json"]


def test_a_branch_that_moved_on_is_another_folder_and_both_stay(hub, tmp_path):
    first = fetch(tmp_path)
    hub.models[REPO][OTHER_COMMIT] = TAKEN | {"model.safetensors": WEIGHTS[::-1]}
    hub.revisions |= {"main": OTHER_COMMIT, "v1": COMMIT}
    second = fetch(tmp_path, revision="main")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()[::-1]

    def found(revision: str | None) -> Path | None:
        return find_fetched(REPO, revision, cache=tmp_path)

    assert (found(None), found("main"), found(COMMIT), found("v1")) == (second, second, first, None)
    assert fetch(tmp_path, revision="v1") == first
    assert (found(None), found("main"), found("v1")) == (first, second, first)  # the newest is the one fetched last
    assert read_revisions(REPO, cache=tmp_path) == (COMMIT, {"main": OTHER_COMMIT, "v1": COMMIT})


def test_revisions_that_cannot_be_read_are_none(tmp_path):
    file = tmp_path / "hub" / "some-org" / "tiny.json"
    file.parent.mkdir(parents=True)
    for text in ("", "[]", "{}", '{"newest": "../..", "revisions": {}}', '{"newest": 1, "revisions": {}}', "{" * 9**5):
        file.write_text(text)
        assert find_fetched(REPO, None, cache=tmp_path) is None


# broken connections


def test_a_connection_that_breaks_is_taken_up_where_it_stopped(hub, tmp_path):
    hub.cut_after["model.safetensors"] = 100_000
    assert files(fetch(tmp_path))["model.safetensors"] == WEIGHTS
    served = hub.served("model.safetensors")
    assert [answer.range for answer in served] == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert sum(answer.num_bytes for answer in served) == len(WEIGHTS)


def test_what_came_before_the_hub_went_away_is_kept_and_the_next_fetch_asks_for_the_rest_only(hub, tmp_path):
    hub.cut_after["model.safetensors"], hub.stop_after_cut = 100_000, True
    message = refused(tmp_path)
    assert f"{REPO}: no connection to {hub.url}, or it broke" in message
    assert f"kept in {partial_folder(tmp_path)}; rerun to resume" in message
    assert (partial_folder(tmp_path) / "model.safetensors").read_bytes() == WEIGHTS[:100_000]
    assert find_fetched(REPO, None, cache=tmp_path) is None
    hub.is_down, hub.cut_after = False, {}
    hub.answers.clear()
    assert files(fetch(tmp_path))["model.safetensors"] == WEIGHTS
    assert [answer.status for answer in hub.answers] == [200, 302, 206]  # the listing, a redirect, the rest
    assert (hub.answers[-1].range, hub.answers[-1].num_bytes) == ("bytes=100000-", len(WEIGHTS) - 100_000)


def test_a_server_without_range_sends_the_whole_file_again(hub, tmp_path):
    hub.cut_after["model.safetensors"], hub.stop_after_cut, hub.ignores_range = 100_000, True, True
    refused(tmp_path)
    hub.is_down, hub.cut_after = False, {}
    seen: list[int] = []
    assert (
        files(fetch(tmp_path, progress=lambda done, total: seen.append(total - done)))["model.safetensors"] == WEIGHTS
    )
    assert seen[-1] == 0


def test_no_connection_leaves_nothing_behind(hub, tmp_path):
    hub.is_down = True
    assert f"{REPO}: no connection to {hub.url}" in refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    message = refused(tmp_path)
    assert f"{REPO} needs 313 KiB more, but only 195 KiB are free" in message and "QLORA_LITE_HOME" in message
    assert hub.served("model.safetensors") == []


def test_a_disk_that_fills_up_on_the_way_keeps_what_came(hub, tmp_path, monkeypatch):
    hub.cut_after["model.safetensors"] = 100_000

    def full(seconds: float) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_module.time, "sleep", full)  # between the first part of the weights and the second
    message = refused(tmp_path)
    assert message.startswith(
        f"{partial_folder(tmp_path)}: cannot be written (No space left on device); free some space"
    )
    assert (partial_folder(tmp_path) / "model.safetensors").read_bytes() == WEIGHTS[:100_000]


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path):
    (tmp_path / "hub").write_bytes(b"a file")
    message = refused(tmp_path)
    assert str(tmp_path / "hub") in message and "cannot be written" in message and "QLORA_LITE_HOME" in message


def test_a_second_fetch_of_the_same_model_waits_for_the_first_and_uses_what_it_brought(hub, tmp_path):
    found: list[Path] = []
    waiting = Thread(target=lambda: found.append(fetch(tmp_path)))
    with making(partial_folder(tmp_path), stays=True):
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive() and not partial_folder(tmp_path).exists()
    waiting.join(timeout=20)
    assert found == [fetch(tmp_path)] and files(found[0]).keys() == {*TAKEN, "manifest.json"}


# what the hub refuses


@pytest.mark.parametrize(
    ("repo", "revision", "words"),
    [
        ("some-org/nothing", None, "some-org/nothing: no such model at http://127.0.0.1:"),
        (REPO, "v9", f"{REPO}: has no branch, tag or commit named v9"),
        (REPO, "9" * 40, f"{REPO}: has no branch, tag or commit named 999"),
    ],
)
def test_a_model_or_revision_that_the_hub_does_not_have_is_named(hub, tmp_path, repo, revision, words):
    assert words in refused(tmp_path, repo, revision)
    assert nothing_is_left(tmp_path)


def test_an_error_in_no_form_of_the_hubs_is_one_message_too(hub, tmp_path):
    hub.token, hub.error_body = "hf_secret", b"[1]"
    assert "RemoteProtocolError: status 401" in refused(tmp_path)


def test_a_gated_model_says_how_to_be_let_in(hub, tmp_path):
    hub.gated = True
    assert f"{REPO}: is gated. Accept its terms at {hub.url}/{REPO}, then set HF_TOKEN" in refused(tmp_path)
    assert nothing_is_left(tmp_path)


def test_a_token_is_sent_when_it_is_set_never_to_another_host_and_never_kept(hub, tmp_path, monkeypatch):
    hub.token = "hf_secret"
    assert "a private one. Check its name; for a private one, set HF_TOKEN" in refused(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    folder = fetch(tmp_path)
    large = [answer for answer in hub.answers if answer.path.startswith("/cdn/")]
    assert large and all(answer.token is None for answer in large)
    assert not any(b"hf_secret" in content for content in files(folder).values())
    monkeypatch.setenv("HF_TOKEN", "hf_sec ret")
    assert "HF_TOKEN: contains spaces" in (message := refused(tmp_path)) and "hf_sec" not in message


def test_a_token_that_is_only_stored_is_not_sent(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("hf_stored")
    fetch(tmp_path)
    assert all(answer.token is None for answer in hub.answers)


def test_an_address_that_is_none_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    assert "HF_ENDPOINT: expected an address such as https://huggingface.co" in refused(tmp_path)


def test_the_library_stays_offline_while_and_after_we_fetch(hub, tmp_path):
    from huggingface_hub import model_info
    from huggingface_hub.errors import OfflineModeIsEnabled

    fetch(tmp_path)
    with pytest.raises(OfflineModeIsEnabled):
        model_info(REPO)


# models that cannot be used


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"config.json": CONFIG, "pytorch_model.bin": b"pickle"}, r"has only pickled weights \(pytorch_model\.bin\).*refs/pr/NUMBER"),
        ({"README.md": b"", "tiny.Q4_0.gguf": b"GGUF"}, "has GGUF files. Download one"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "not a base model.*adapter_config.json"),
        ({}, "it has no files"),
        (TAKEN | {"config.json": b'{"model_type": "bert"}'}, f"^{REPO}/config.json: model_type 'bert' is not supported"),
        (TAKEN | {"config.json": b"[1]"}, f"^{REPO}/config.json: expected a JSON object"),
        (
            TAKEN | {"config.json": b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'},
            "quantized with gptq, which is not supported",
        ),
    ],
    ids=["pickle", "gguf", "adapter", "empty", "bert", "list", "quantized"],
)  # fmt: skip
def test_a_model_that_cannot_be_used_is_refused_before_its_weights_are_fetched(hub, tmp_path, model, words):
    hub.models[REPO][COMMIT] = model
    with pytest.raises(ModelError, match=words):
        fetch(tmp_path)
    assert {answer.path.split("/")[-1] for answer in hub.answers[1:]} <= {"config.json"}
    assert nothing_is_left(tmp_path)


# a hub that is not to be trusted


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_with_another_hash_is_not_believed_and_fetched_again_the_next_time(hub, tmp_path, name):
    hub.corrupt = {name}
    assert f"the hash of {name} differs from the hub's; the file was removed" in refused(tmp_path)
    assert find_fetched(REPO, None, cache=tmp_path) is None
    assert not (partial_folder(tmp_path) / name).exists()
    hub.corrupt = set()
    hub.answers.clear()
    fetch(tmp_path)
    fetched = {answer.path.split("/")[-1] for answer in hub.answers[1:]}
    assert fetched == (set(TAKEN) if name == "config.json" else {name})  # a wrong config stops before the others


def test_a_file_that_goes_on_longer_than_it_was_said_to_is_stopped(hub, tmp_path):
    hub.longer = {"model.safetensors"}
    assert "sends more than the listed 320,000 bytes" in refused(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/../../b.json", "a\\..\\b.json", "", "a//b", "./config.json", "a\x1b[2J.json", "a\0"],
)  # fmt: skip
def test_a_listed_name_that_could_lead_out_of_the_folder_is_refused(hub, tmp_path, name):
    hub.extra_siblings = [{"rfilename": name, "size": 1, "blobId": "0" * 40}]
    message = refused(tmp_path)
    assert "which could leave its folder; nothing was fetched" in message and message.isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "../../x.safetensors"}, {"a": "config.json"}, {"a": "missing.safetensors"}, {"a": 1}, {"a": [1]}, {}, [], None],
    ids=str,
)  # fmt: skip
def test_an_index_that_names_no_weights_of_the_listing_is_refused(hub, tmp_path, weight_map):
    hub.models[REPO][COMMIT] = TAKEN | {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    assert "model.safetensors.index.json names no weights, or missing ones" in refused(tmp_path)


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        ({"sha": "main"}, "sha: String should match"),
        ({"sha": "../../../../../../../../../../../../../x"}, "sha: String should match"),
        ({"sha": COMMIT + "\n"}, "sha: String should match"),
        ({"sha": None}, "sha: Input should be"),
        ({"siblings": None}, "siblings: Input should be"),
        ({"siblings": [{"rfilename": "config.json"}]}, "siblings.0.size: Field required"),
        ({"siblings": [{"rfilename": "config.json", "size": -1}]}, "siblings.0.size: Input should be greater"),
        ({"siblings": [{"rfilename": 1, "size": 1}]}, "siblings.0.rfilename: Input should be"),
        ({"siblings": [{"rfilename": "a", "size": 1, "lfs": {"sha256": "x"}}]}, "siblings.0.lfs.sha256"),
    ],
)
def test_an_answer_that_is_not_the_hubs_is_refused(hub, tmp_path, listing, words):
    hub.listing = listing
    message = refused(tmp_path)
    assert f"{hub.url}: the answer about {REPO} does not follow the hub's protocol" in message and words in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [b"", b"<html>Log in to this network</html>", b"[]", b"[" * 100_000, b"\xff"],
    ids=["empty", "html", "list", "deep", "bytes"],
)
def test_an_answer_that_is_no_json_object_is_refused(hub, tmp_path, text):
    hub.raw_listing = text
    message = refused(tmp_path)
    assert "does not follow the hub's protocol (all of it: " in message and message.isprintable()


def test_another_commit_than_the_one_asked_for_is_refused(hub, tmp_path):
    hub.listing = {"sha": OTHER_COMMIT}
    assert f"answered with commit {OTHER_COMMIT} to a request for {REPO}@{COMMIT}" in refused(tmp_path, revision=COMMIT)


def test_the_manifest_of_a_fetched_folder_verifies(hub, tmp_path):
    folder = fetch(tmp_path)
    assert commit_folder(REPO, COMMIT, cache=tmp_path) == folder
    assert verify_manifest(folder) == [] and read_manifest(folder) is not None
