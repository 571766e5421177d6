"""Download of models from the hub. The only file that connects to the hub; all others read the downloaded files.

    look_up       ORG/NAME, revision -> Listing: one commit, with sizes and hashes of its files
    fetch_files   Listing -> CACHE/hub/ORG/NAME@COMMIT/ with a manifest, every hash checked, in place by one rename

Until the rename the files are in CACHE/hub/ORG/.NAME@COMMIT.partial/, which survives a broken connection: the next fetch requests
only the missing bytes (HTTP Range). Downloads config.json, the safetensors that the index names (or the only one), the tokenizer,
the licence and the model card: no pickles, no code, no second copies of the weights.

Surprising:
- Addresses and errors of the protocol come from huggingface_hub, the connection is our own: hf_hub_download discards a broken
  download (2.4), and the library is kept offline in this process. A token is sent only if HF_TOKEN is set, and only to this host.
- The server is not trusted. A file gets a name from our own list, at most its listed size, and is kept only if its hash is the
  listed one: SHA-256 for large files, git's own hash for the others.
- Messages and stored files contain no credentials: HF_ENDPOINT must have none, and those of a proxy are cut from error messages.
- config.json is fetched first: an unusable model is refused before its weights are fetched.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub import hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import hf_raise_for_status
from pydantic import BaseModel, Field, ValidationError

from qlora_lite.base.quantization import stored_quantization
from qlora_lite.base.shipped import without_credentials
from qlora_lite.base.source import read_config, read_json
from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import CONFIG_FILE, INDEX_FILE, PICKLES, WEIGHTS_FILE
from qlora_lite.files.made_once import making
from qlora_lite.files.manifest import hex_digest, sha256_manifest, sha256_of_file, verify_manifest, write_manifest
from qlora_lite.files.staging import free_bytes, publish_folder, write_text_durably
from qlora_lite.recipe.hub_names import (
    DEFAULT_REVISION,
    commit_folder,
    fetch_command,
    is_commit,
    read_revisions,
    revisions_file,
)
from qlora_lite.units import format_bytes

TIMEOUT_S = 30.0  # for connecting, and for the next bytes
MOST_LISTING_BYTES = 2**26  # of a listing, which is held in memory; one of 10,000 files has some 3 MB
ATTEMPTS, RETRY_S = 4, 1.0  # attempts without new bytes before giving up; the wait between attempts

_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_TAKEN_TOO = re.compile(
    r"(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|merges\.txt|vocab\.txt|(tokenizer|spiece|sentencepiece)\.model|chat_template\.jinja"
    r"|(LICEN[SC]E|NOTICE|README|USE_POLICY)(\.txt|\.md)?"
)
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")

Progress = Callable[[int, int], None]


class _LargeFile(BaseModel):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Sibling(BaseModel):
    rfilename: str
    size: Annotated[int, Field(ge=0)]
    blobId: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    lfs: _LargeFile | None = None


class _Answer(BaseModel):
    """The part we use of `GET /api/models/ORG/NAME/revision/REVISION?blobs=true`."""

    sha: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    siblings: list[_Sibling]


@dataclass(frozen=True)
class HubFile:
    """The hub's description of a file: `sha256` for large files, git's blob hash `git_sha1` for the others."""

    num_bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Listing:
    """One commit of a model, and all its files by name; `revision` is the requested one (None: the default branch)."""

    repo: str
    revision: str | None
    commit: str
    files: Mapping[str, HubFile]


@dataclass(frozen=True)
class Hub:
    """An open connection to `endpoint`."""

    endpoint: str
    client: httpx2.Client


@contextmanager
def open_hub() -> Iterator[Hub]:
    """Connect to `$HF_ENDPOINT` or huggingface.co, with the token in `$HF_TOKEN` if set. Raises ModelError."""
    endpoint, token = _endpoint(), os.environ.get("HF_TOKEN", "").strip()
    headers = {"User-Agent": f"qlora-lite/{version('qlora-lite')}", "Accept-Encoding": "identity"}
    if token:
        if not re.fullmatch(r"[!-~]+", token):
            raise ModelError("HF_TOKEN: contains spaces or characters that no token has; copy it again")
        if endpoint.startswith("http://") and urlsplit(endpoint).hostname not in _THIS_MACHINE:
            raise ModelError(
                f"HF_TOKEN: would be sent unencrypted to {endpoint}. Give HF_ENDPOINT an https:// address, or unset HF_TOKEN"
            )
        headers["Authorization"] = f"Bearer {token}"  # httpx2 drops it when a redirect leads to another host
    try:
        client = httpx2.Client(headers=headers, timeout=TIMEOUT_S, follow_redirects=True)
    except (ValueError, ImportError, httpx2.InvalidURL) as error:
        reason = without_credentials(str(error))
        raise ModelError(f"HTTPS_PROXY, HTTP_PROXY or ALL_PROXY names an unusable proxy ({reason})") from error
    with client:
        yield Hub(endpoint, client)


def _endpoint() -> str:
    """Return `$HF_ENDPOINT`, which is shown and stored in manifests and must be an address without credentials."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
    if re.search(r"[@?#]", endpoint):
        raise ModelError(
            "HF_ENDPOINT: contains a user, a password or a query, but it is shown and stored. Give only the address, and the "
            "token in HF_TOKEN"
        )
    try:
        parts = urlsplit(endpoint)
    except ValueError:  # half an IPv6 address
        parts = urlsplit("")
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ModelError(f"HF_ENDPOINT: expected an address such as https://huggingface.co, got {endpoint!r}")
    return endpoint


def look_up(hub: Hub, repo: str, revision: str | None) -> Listing:
    """Ask the hub for the current commit of `revision`, and for the sizes and hashes of its files.

    Raises ModelError when model, revision or connection is missing, when a token is needed, when the answer does not follow
    the hub's protocol, and when the model has no safetensors weights.
    """
    url = f"{hub.endpoint}/api/models/{repo}/revision/{quote(revision or DEFAULT_REVISION, safe='')}"
    with _clear_errors(hub, repo, revision), hub.client.stream("GET", url, params={"blobs": True}) as response:
        _raise_for_status(response)
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > MOST_LISTING_BYTES:
                raise ModelError(f"{hub.endpoint}: endless answer about {repo} (above {len(content):,} bytes)")
    try:
        answer = _Answer.model_validate_json(bytes(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise ModelError(
            f"{hub.endpoint}: the answer about {repo} does not follow the hub's protocol ({where}: {first['msg']})"
        ) from error
    if revision is not None and is_commit(revision) and answer.sha != revision:
        raise ModelError(f"{hub.endpoint}: answered with commit {answer.sha} to a request for {repo}@{revision}")
    for sibling in answer.siblings:
        _refuse_odd_name(repo, sibling.rfilename)
    files = {
        file.rfilename: HubFile(file.size, file.lfs.sha256 if file.lfs else None, None if file.lfs else file.blobId)
        for file in answer.siblings
    }
    listing = Listing(repo, revision, answer.sha, files)
    _refuse_without_weights(listing)
    return listing


def fetch_files(hub: Hub, listing: Listing, *, cache: Path, progress: Progress | None = None) -> Path:
    """Download the missing files of `listing`'s commit and return its folder; verifies a folder that already exists.

    `progress(done, total)` counts bytes. Raises ModelError for an unusable model, a broken connection (the partial download
    is kept), a full disk, or a file that differs from the listing.
    """
    folder = commit_folder(listing.repo, listing.commit, cache=cache)
    partial = folder.with_name(f".{folder.name}.partial")
    # Two processes that fetch the same model would write the same files: the second one waits, then finds the folder.
    with _clear_errors(hub, listing.repo, listing.revision, partial), making(partial, stays=True):
        partial.parent.mkdir(parents=True, exist_ok=True)
        if folder.is_dir() and verify_manifest(folder):  # damaged: fetch only the wrong files again
            folder.replace(partial)
            _remove(partial, _wrong_files(listing, partial, _hashes(sha256_manifest(partial))))
        if not folder.is_dir():
            partial.mkdir(exist_ok=True)
            _download(hub, listing, partial, progress)
            facts = {"repo": listing.repo, "commit": listing.commit, "endpoint": hub.endpoint}
            _refuse_wrong(listing, partial, _hashes(write_manifest(partial, facts)["files"]))
            publish_folder(partial, folder)
        _remember(listing, cache=cache)
    return folder


def _refuse_odd_name(repo: str, name: str) -> None:
    parts = name.split("/")
    if "\\" in name or not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise ModelError(f"{repo}: lists a file named {name!a}, which could leave its folder; nothing was fetched")


@contextmanager
def _clear_errors(hub: Hub, repo: str, revision: str | None, partial: Path | None = None) -> Iterator[None]:
    """Convert errors of the hub, the network and the disk to one ModelError with advice."""
    try:
        yield
    except HfHubHTTPError as error:
        raise ModelError(_refusal(error, hub.endpoint, repo, revision) + _partial_note(partial)) from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = without_credentials(f"{type(error).__name__}: {error}")
        problem = f"no connection to {hub.endpoint}, or it broke ({reason})"
        raise ModelError(f"{repo}: {problem}{_partial_note(partial)}") from error
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error}); free some space there, or set QLORA_LITE_HOME to another place"
        raise ModelError(f"{error.filename or partial}: {problem}{_partial_note(partial)}") from error


def _raise_for_status(response: httpx2.Response) -> None:
    """Raise the library's errors, also for an error body that the library cannot parse."""
    try:
        hf_raise_for_status(response)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise httpx2.RemoteProtocolError(f"status {response.status_code}, not in the hub's format") from error


def _partial_note(partial: Path | None) -> str:
    """Return the end of such a message; removes an empty partial folder."""
    if partial is None:
        return ""
    with suppress(OSError):
        partial.rmdir()  # fails on a folder with files
    return f"; partial download kept in {partial}; rerun to resume" if partial.is_dir() else ""


def _refusal(error: HfHubHTTPError, endpoint: str, repo: str, revision: str | None) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return (
            f"{repo}: is gated. Accept its terms at {endpoint}/{repo}, then set HF_TOKEN to a token of that account "
            "(sent, never stored)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo}: has no branch, tag or commit named {revision or DEFAULT_REVISION}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo}: no such model at {endpoint}, or a private one. Check its name; for a private one, set HF_TOKEN"
    if status in (401, 403):
        return f"{repo}: {endpoint} denies access (status {status}). Check HF_TOKEN and its permissions"
    if status == 429:
        return f"{repo}: {endpoint} reports too many requests from this machine (status 429). Wait a few minutes"
    return f"{repo}: {endpoint} answered with status {status} to {error.response.request.url.path}. Try again later"


def _download(hub: Hub, listing: Listing, partial: Path, progress: Progress | None) -> None:
    """Download all needed files into `partial`, resuming partial ones, and remove any others."""
    small_files = [CONFIG_FILE, *([INDEX_FILE] if INDEX_FILE in listing.files else [])]
    _refuse_full_disk(listing, partial, small_files)
    for name in small_files:
        _bring(hub, listing, partial, name)
        _refuse_wrong(listing, partial, {name: sha256_of_file(partial / name)})
    _refuse_unusable(listing, partial)
    names = _taken(listing, partial)
    _remove(partial, [path.name for path in partial.iterdir() if path.name not in names])
    _refuse_full_disk(listing, partial, names)
    total = sum(listing.files[name].num_bytes for name in names)
    done = sum(path.stat().st_size for path in partial.iterdir())

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    for name in names:
        _bring(hub, listing, partial, name, count)


def _refuse_without_weights(listing: Listing) -> None:
    files = [name for name in listing.files if "/" not in name]
    if CONFIG_FILE in files and (WEIGHTS_FILE in files or INDEX_FILE in files):
        return
    where = f"{listing.repo}@{listing.commit[:12]}"
    pickles = [name for name in files if name.endswith((*PICKLES, ".pkl", ".pickle"))]
    if pickles and not any(name.endswith(".safetensors") for name in files):
        raise ModelError(
            f"{where}: has only pickled weights ({pickles[0]}), which can run code when read. Ask for a safetensors "
            f"conversion; if a pull request has one: {fetch_command(listing.repo, 'refs/pr/NUMBER')}"
        )
    if any(name.endswith(".gguf") for name in files):
        raise ModelError(f"{where}: has GGUF files. Download one and give its path as model.base")
    raise ModelError(
        f"{where}: not a base model in transformers' format ({CONFIG_FILE} with {WEIGHTS_FILE} or {INDEX_FILE}); it has "
        f"{', '.join(sorted(files)[:8]) or 'no files'}"
    )


def _refuse_unusable(listing: Listing, partial: Path) -> None:
    """Check config.json as training will, before 15 GB are downloaded in vain."""
    try:
        stored_quantization(read_config(partial), partial / CONFIG_FILE)
    except ModelError as error:
        shutil.rmtree(partial)
        reason = str(error).replace(str(partial), listing.repo)
        raise ModelError(f"{reason}. No weights were fetched") from error


def _taken(listing: Listing, partial: Path) -> list[str]:
    """Return the files to fetch, the weights last: the shards of the index, or the only file."""
    if INDEX_FILE in listing.files:
        weight_map = read_json(partial / INDEX_FILE).get("weight_map")
        shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
        missing = [
            name for name in shards if not (isinstance(name, str) and _SHARD.fullmatch(name) and name in listing.files)
        ]
        if missing or not shards:
            raise ModelError(f"{listing.repo}: {INDEX_FILE} names no weights, or missing ones: {missing[:1]}")
        weights = [INDEX_FILE, *sorted(set(shards))]
    else:
        weights = [WEIGHTS_FILE]
    return [CONFIG_FILE, *sorted(name for name in listing.files if _TAKEN_TOO.fullmatch(name)), *weights]


def _refuse_full_disk(listing: Listing, partial: Path, names: Iterable[str]) -> None:
    missing = sum(listing.files[name].num_bytes for name in names)
    missing -= sum(path.stat().st_size for path in partial.iterdir())
    free = free_bytes(partial)
    if missing > free:
        raise ModelError(
            f"{partial.parent}: {listing.repo} needs {format_bytes(missing)} more, but only {format_bytes(free)} are free. "
            "Free some space there, or set QLORA_LITE_HOME to a folder on a larger disk"
        )


def _bring(
    hub: Hub, listing: Listing, partial: Path, name: str, count: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Download one file, resuming an earlier attempt; retries as long as attempts bring new bytes."""
    path, num_bytes = partial / name, listing.files[name].num_bytes
    url = hf_hub_url(listing.repo, name, revision=listing.commit, endpoint=hub.endpoint)
    if _size(path) > num_bytes:
        path.unlink()
    failures = 0
    while not path.is_file() or _size(path) < num_bytes:
        before = _size(path)
        try:
            _append(hub, url, path, num_bytes=num_bytes, count=count)
        except httpx2.TransportError:
            failures = 0 if _size(path) > before else failures + 1
            if failures == ATTEMPTS:
                raise
            time.sleep(RETRY_S)


def _append(hub: Hub, url: str, path: Path, *, num_bytes: int, count: Callable[[int], None]) -> None:
    """Append the missing bytes of `path`, up to `num_bytes`. Raises httpx2.TransportError if the connection ends early."""
    have = _size(path)
    with hub.client.stream("GET", url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
        _raise_for_status(response)
        if have and response.status_code != httpx2.codes.PARTIAL_CONTENT:  # the server sends the complete file instead
            path.unlink()
            count(-have)
            have = 0
        with path.open("ab") as file:
            for chunk in response.iter_bytes():
                have += len(chunk)
                if have > num_bytes:
                    raise ModelError(f"{url}: sends more than the listed {num_bytes:,} bytes")
                file.write(chunk)
                count(len(chunk))
    if have < num_bytes:
        raise httpx2.RemoteProtocolError(f"{path.name} ended after {have:,} of {num_bytes:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _refuse_wrong(listing: Listing, folder: Path, hashes: Mapping[str, str]) -> None:
    wrong = _wrong_files(listing, folder, hashes)
    if wrong:
        _remove(folder, wrong)
        more = f" with {len(wrong) - 1} others" if wrong[1:] else ""
        raise ModelError(
            f"{listing.repo}: the hash of {wrong[0]} differs from the hub's; the file was removed{more}. "
            "Run the same command again"
        )


def _wrong_files(listing: Listing, folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Return the names in `hashes` (name -> SHA-256 of the local file) that differ from the hub's listing."""
    return [name for name, sha256 in hashes.items() if not _is_right(folder / name, sha256, listing.files.get(name))]


def _is_right(path: Path, sha256: str, listed: HubFile | None) -> bool:
    if listed is None or path.stat().st_size != listed.num_bytes:
        return False
    if listed.sha256 is not None:
        return sha256 == listed.sha256
    return listed.git_sha1 is None or _git_sha1(path) == listed.git_sha1


def _hashes(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The files of a manifest -> SHA-256 by name."""
    return {name: entry["sha256"] for name, entry in files.items()}


def _git_sha1(path: Path) -> str:
    """Return git's blob hash of a file: SHA-1 over a short header and the bytes (Pro Git, 10.2 Git Objects)."""
    header = f"blob {path.stat().st_size}\0".encode()
    with path.open("rb") as file:
        return hex_digest(file, hashlib.sha1(header, usedforsecurity=False))


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink()


def _remember(listing: Listing, *, cache: Path) -> None:
    """Record this commit as the one fetched last, and as today's commit of its revision."""
    _, revisions = read_revisions(listing.repo, cache=cache)
    revision = listing.revision or DEFAULT_REVISION
    if not is_commit(revision):
        revisions[revision] = listing.commit
    record = {"schema_version": 1, "newest": listing.commit, "revisions": revisions}
    write_text_durably(revisions_file(listing.repo, cache=cache), json.dumps(record, indent=2) + "\n")
