"""Hub names of models, and the cache folders of fetched ones. Text and files only: needs no connection and no torch.

    in    ORG/NAME, and a branch, tag or commit
    out   CACHE/hub/ORG/NAME@COMMIT/   a fetched model, whole or absent
          CACHE/hub/ORG/NAME.json      the commit of each revision at its last fetch, and the commit fetched last:
                                       {"schema_version": 1, "newest": COMMIT, "revisions": {"main": COMMIT}}

Surprising: branches are recorded beside the folders, not in them, because the files of a fetched folder must not change
(the quantized base is named after them), and a second fetch of `main` may resolve to a commit that is already there.
"""

import json
import re
from pathlib import Path

from qlora_lite.errors import UserError
from qlora_lite.recipe import wording

DEFAULT_REVISION = "main"
_LONGEST_NAME, _LONGEST_REVISION = 96, 200
_FILE_ENDINGS = (".gguf", ".json", ".safetensors", ".git")


def is_hub_name(text: str) -> bool:
    """Whether `text` is an `ORG/NAME` that the hub allows; never true for a path that leaves its folder."""
    has_form = re.fullmatch(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", text, re.ASCII) is not None
    too_long = len(text) > _LONGEST_NAME
    return has_form and not too_long and not re.search(r"\.\.|--", text) and not text.lower().endswith(_FILE_ENDINGS)


def is_revision(text: str) -> bool:
    """Whether `text` is a branch, tag, commit or `refs/pr/3` that git allows and that is safe in a path and a shell."""
    has_form = re.fullmatch(r"\w([\w./+-]*\w)?", text, re.ASCII) is not None
    return has_form and len(text) <= _LONGEST_REVISION and not re.search(r"\.\.|//", text)


def is_commit(text: str) -> bool:
    """Whether `text` is a full commit hash, which identifies one immutable state of the files."""
    return re.fullmatch(r"[0-9a-f]{40}", text) is not None


def parse_hub_name(text: str) -> tuple[str, str | None]:
    """Parse `ORG/NAME@REVISION` -> (`ORG/NAME`, REVISION or None). Raises UserError for anything else."""
    repo, at, revision = text.partition("@")
    if not is_hub_name(repo):
        raise UserError(
            f"{wording.printable(text)}: expected a hub model name, ORG/NAME or ORG/NAME@REVISION, "
            "such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    if at and not is_revision(revision):
        raise UserError(
            f"{wording.printable(text)}: expected a branch, tag or commit after the @, got {wording.quoted(revision)}"
        )
    return repo, revision or None


def commit_folder(repo: str, commit: str, *, cache: Path) -> Path:
    """Return the cache folder of this commit of the model."""
    assert is_hub_name(repo) and is_commit(commit)
    return cache / "hub" / f"{repo}@{commit}"


def commit_of(folder: Path) -> str | None:
    """Return the commit in the name of a fetched folder; None for any other folder."""
    commit = folder.name.rpartition("@")[2]
    return commit if is_commit(commit) else None


def revisions_file(repo: str, *, cache: Path) -> Path:
    """Return the path of the file that records the commit of each revision."""
    assert is_hub_name(repo)
    return cache / "hub" / f"{repo}.json"


def read_revisions(repo: str, *, cache: Path) -> tuple[str | None, dict[str, str]]:
    """-> (the commit fetched last, the commit of each fetched revision); (None, {}) when the file is missing or damaged."""
    try:
        record = json.loads(revisions_file(repo, cache=cache).read_text(encoding="utf-8"))
        newest, revisions = record["newest"], dict(record["revisions"])
        is_valid = all(is_commit(commit) for commit in (newest, *revisions.values()))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None, {}
    return (newest, revisions) if is_valid else (None, {})


def find_fetched(repo: str, revision: str | None, *, cache: Path) -> Path | None:
    """Return the fetched folder of `revision` (None: the commit fetched last), or None when it was not fetched."""
    newest, revisions = read_revisions(repo, cache=cache)
    commit = newest if revision is None else revision if is_commit(revision) else revisions.get(revision)
    folder = commit_folder(repo, commit, cache=cache) if commit else None
    return folder if folder is not None and folder.is_dir() else None


def fetch_command(repo: str, revision: str | None) -> str:
    """Return the command that downloads this revision."""
    return f"qlora-lite fetch {repo}" + (f"@{revision}" if revision else "")
