"""What the hub calls a model, and where a fetched one lies. Text and files only: nothing here needs a connection or torch.

    in    ORG/NAME, and a branch, tag or commit
    out   CACHE/hub/ORG/NAME@COMMIT/   a fetched model: whole, or not there
          CACHE/hub/ORG/NAME.json      the commit that each revision was when it was last fetched, and the newest of all:
                                       {"schema_version": 1, "newest": COMMIT, "revisions": {"main": COMMIT}}

Surprising: branches are remembered beside the folders and not in them, because no file of a fetched folder may change
(the quantized base is named after its files), and a second fetch of `main` may find a commit that is there already.
"""

import json
import os
import re
from pathlib import Path

from qlora_lite.errors import UserError
from qlora_lite.recipe import wording

DEFAULT_REVISION = "main"
_LONGEST_NAME, _LONGEST_REVISION = 96, 200
_FILE_ENDINGS = (".gguf", ".json", ".safetensors", ".git")


def default_cache() -> Path:
    """`$QLORA_LITE_HOME`, or `~/.cache/qlora_lite`. Raises UserError where nobody knows what `~` is."""
    asked = os.environ.get("QLORA_LITE_HOME")
    path = os.path.expanduser(asked or "~/.cache/qlora_lite")  # leaves ~ as it is where there is no home
    if path.startswith("~") and not os.path.exists(path):
        unknown = "HOME is not set, and the system knows no home folder of this user"
        raise UserError(f"{asked or path}: {unknown}. Set QLORA_LITE_HOME to a folder for the cache")
    return Path(path)


def is_hub_name(text: str) -> bool:
    """`ORG/NAME` as the hub allows it; never a path that leads out of a folder."""
    looks_so = re.fullmatch(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", text, re.ASCII) is not None
    too_long = len(text) > _LONGEST_NAME
    return looks_so and not too_long and not re.search(r"\.\.|--", text) and not text.lower().endswith(_FILE_ENDINGS)


def is_revision(text: str) -> bool:
    """A branch, tag, commit or `refs/pr/3`, as git allows it and without anything that a path or a shell would read otherwise."""
    looks_so = re.fullmatch(r"\w([\w./+-]*\w)?", text, re.ASCII) is not None
    return looks_so and len(text) <= _LONGEST_REVISION and not re.search(r"\.\.|//", text)


def is_commit(text: str) -> bool:
    """A whole commit hash, which names one state of the files for ever."""
    return re.fullmatch(r"[0-9a-f]{40}", text) is not None


def parse_hub_name(text: str) -> tuple[str, str | None]:
    """`ORG/NAME@REVISION` -> (`ORG/NAME`, REVISION or None). Raises UserError for anything else."""
    repo, at, revision = text.partition("@")
    if not is_hub_name(repo):
        raise UserError(
            f"{wording.printable(text)}: expected a model's name on the hub, ORG/NAME or ORG/NAME@REVISION, "
            "such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    if at and not is_revision(revision):
        raise UserError(
            f"{wording.printable(text)}: expected a branch, tag or commit behind the @, got {wording.quoted(revision)}"
        )
    return repo, revision or None


def commit_folder(repo: str, commit: str, *, cache: Path) -> Path:
    """Where this state of the model lies once it is fetched."""
    assert is_hub_name(repo) and is_commit(commit)
    return cache / "hub" / f"{repo}@{commit}"


def commit_of(folder: Path) -> str | None:
    """The commit of a fetched folder, from its name; None for any other folder."""
    commit = folder.name.rpartition("@")[2]
    return commit if is_commit(commit) else None


def revisions_file(repo: str, *, cache: Path) -> Path:
    """Where it is kept which commit a revision was."""
    assert is_hub_name(repo)
    return cache / "hub" / f"{repo}.json"


def read_revisions(repo: str, *, cache: Path) -> tuple[str | None, dict[str, str]]:
    """-> (the commit fetched last, the commit of each revision fetched so far); nothing where the file is missing or damaged."""
    try:
        kept = json.loads(revisions_file(repo, cache=cache).read_text(encoding="utf-8"))
        newest, revisions = kept["newest"], dict(kept["revisions"])
        is_sound = all(is_commit(commit) for commit in (newest, *revisions.values()))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None, {}
    return (newest, revisions) if is_sound else (None, {})


def find_fetched(repo: str, revision: str | None, *, cache: Path) -> Path | None:
    """The fetched folder of a revision (None: of the newest fetched), or None where it was not fetched."""
    newest, revisions = read_revisions(repo, cache=cache)
    commit = newest if revision is None else revision if is_commit(revision) else revisions.get(revision)
    folder = commit_folder(repo, commit, cache=cache) if commit else None
    return folder if folder is not None and folder.is_dir() else None


def fetch_command(repo: str, revision: str | None) -> str:
    """The command that brings it."""
    return f"qlora-lite fetch {repo}" + (f"@{revision}" if revision else "")
