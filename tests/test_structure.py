"""The building: every folder's index is true, files that comments and docstrings cite exist, and functions stay readable."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "qlora_lite"
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES} - {PACKAGE})
CITED = re.compile(r"(?<![\w./-])((?:[\w-]+/)*[\w-]+\.py)\b(?!\()")
MOST_PARAMETERS, MOST_LINES = 8, 60
# The signature belongs to somebody else: a library calls it.
GIVEN = {"qlora_lite/model/attention.py:packed_attention", "qlora_lite/plan/rehearsal.py:_attention_on_card"}


def shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("folder", FOLDERS, ids=shown)
def test_a_folders_index_names_each_of_its_files_and_no_other(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    named = set(re.findall(r"(?<![\w/])([a-z_0-9]+\.py)\b", text))
    assert named == {path.name for path in folder.glob("*.py")} - {"__init__.py"}


def cited_files(path: Path) -> set[str]:
    """Names of Python files in comments and docstrings."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    texts += [line.partition("#")[2] for line in source.splitlines() if "#" in line]
    return {name for text in texts for name in CITED.findall(text)}


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_files_that_comments_and_docstrings_cite_exist(path: Path) -> None:
    """A path from the repository's root or the package's, or a file of the same folder."""
    places = (REPOSITORY, PACKAGE, path.parent)
    elsewhere = ("torch/", "backends/", "transformers/", "peft/")  # of libraries
    missing = [
        name
        for name in sorted(cited_files(path))
        if not name.startswith(elsewhere) and not any((place / name).is_file() for place in places)
    ]
    assert missing == []


def functions(path: Path) -> list[tuple[str, int, int]]:
    """-> (name, parameters without self, lines) of every function."""
    rows = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert node.end_lineno is not None
            rows.append(
                (
                    node.name,
                    len([name for name in names if name not in ("self", "cls")]),
                    node.end_lineno - node.lineno + 1,
                )
            )
    return rows


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "cli.py"], ids=shown)
def test_no_function_is_too_wide_or_too_long(path: Path) -> None:
    for name, num_parameters, num_lines in functions(path):
        where = f"{shown(path)}:{name}"
        assert num_parameters <= MOST_PARAMETERS or where in GIVEN, f"{where} takes {num_parameters} parameters"
        assert num_lines <= MOST_LINES, f"{where} has {num_lines} lines"


def test_every_question_of_the_page_for_contributors_contains_the_name_of_its_file() -> None:
    text = (PACKAGE / "docs" / "finding-your-way.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (Where [^|]*\?) \| `([^`]+)` \|$", text, flags=re.MULTILINE)
    assert len(rows) >= 10
    for question, name in rows:
        assert (REPOSITORY / name).is_file() and Path(name).stem in question.lower(), (question, name)


PHRASES = re.compile(
    r"\bso many\b|\banew\b|\bby (?:itself|themselves)\b|\b(?:is|are) said\b|\bmend(?:s|ed|ing)?\b|\b(?:is|was) no (?!more|longer|farther)"
)


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_messages_comments_and_docstrings_are_plain_english(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    translated = [f"{number}: {line.strip()}" for number, line in enumerate(lines, start=1) if PHRASES.search(line)]
    assert [line for line in translated if "there is no" not in line] == []
