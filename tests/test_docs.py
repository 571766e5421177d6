"""The documentation: README.md, the pages that ship in the package, and `qlora-lite docs`, which lists and prints them.

A page is held against the program: its commands, options and recipe keys must exist, its links must lead to files, and the page of recipe
keys is the rendering of the schema.
"""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from qlora_lite.cli import app, main
from qlora_lite.docs import READING_ORDER, list_pages, read_page
from qlora_lite.errors import UserError
from qlora_lite.recipe import list_recipes
from qlora_lite.recipe.keys_page import recipe_keys_page
from qlora_lite.recipe.schema import known_keys, section_types
from tests.conftest import REPOSITORY

PACKAGE_PAGES = REPOSITORY / "qlora_lite" / "docs"
MEASUREMENTS = REPOSITORY / "tools" / "results" / "README.md"
TEXTS = [REPOSITORY / "README.md", MEASUREMENTS, *sorted(PACKAGE_PAGES.glob("*.md"))]
README_BYTES = 12 * 1024
GROUPS = {"recipes": {"list", "show", "copy", "schema", "import"}}

# A field of a JSON document and a method, which look like recipe keys.
NO_KEYS = {"eval.num_in_training", "model.generate"}
FILE_ENDINGS = ("json", "jsonl", "yaml", "csv", "html")
# Subject, active verb, object: see the reasons in the style guide of the project. "What" may ask, but not stand for a noun.
BANNED = {
    "is no X": r"\b(is|are|was|were) no\b(?! (farther|more|longer)\b)",
    "so many": r"\bso many\b",
    "anew": r"\banew\b",
    "by itself": r"\bby (itself|themselves)\b",
    "is said": r"\b(is|are) said\b",
    "mend": r"\bmend(s|ed|ing)?\b",
    "what as a noun": r"\b[Ww]hat\b(?![^.|\n]*\?)",
}

each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose_of(text: str) -> str:
    """Without code, quotations and addresses; lines of a paragraph joined."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`]*`|\"[^\"\n]*\"|^>.*$|\]\([^)]*\)", " ", text, flags=re.M)
    return re.sub(r"(?<!\n)\n(?![\n|#-])", " ", text)


def code_of(text: str) -> Iterator[str]:
    """Every line of a code block, comments cut off, and every piece of code in a sentence."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.M | re.S)
    for block in blocks:
        yield from (line.split(" # ")[0].strip().removeprefix("$ ") for line in block.splitlines())
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S))


@cache
def options() -> dict[str, set[str]]:
    """Every verb (`recipes list` too) -> its options."""

    def flags(command) -> set[str]:
        return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {
            "--help"
        }

    found: dict[str, set[str]] = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", {})
        found[name] = flags(command)
        found |= {f"{name} {verb}": flags(each) for verb, each in inner.items()}
    return found


def commands_in(text: str) -> Iterator[tuple[str, str]]:
    """(verb, the rest) of every `qlora-lite VERB ...` in code, and of every `VERB --option`; `a|b` taken apart."""
    for code in code_of(text):
        for part in re.split(r" && | \| ", code.replace("\\|", "|")):
            match = re.search(r"(?:^|[ /])qlora-lite (\S+)(.*)", part) or re.search(r"^([a-z|]+)( .*--.*)", part)
            is_ours = match and ("qlora-lite" in part or set(match[1].split("|")) <= set(options()))
            if match and is_ours and match[1] not in ("VERB", "--help"):
                for verb in match[1].split("|"):
                    yield verb, match[2]


# --- the command -------------------------------------------------------------------------------------------------------------------------


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_docs_lists_every_page_with_its_title(capsys):
    code, out, err = run(capsys, "docs")
    assert code == 0 and err == ""
    listed = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert listed == {
        page.stem: text_of(page).split("\n", 1)[0].removeprefix("# ") for page in PACKAGE_PAGES.glob("*.md")
    }


def test_docs_as_json_is_one_document(capsys):
    code, out, _ = run(capsys, "docs", "--json")
    document = json.loads(out)
    assert code == 0 and document["schema_version"] == 1
    assert [page["name"] for page in document["pages"]] == [page.name for page in list_pages()]
    assert all(page["title"] for page in document["pages"])


@pytest.mark.parametrize("name", ["install", "install.md", "INSTALL"])
def test_a_page_is_printed_as_the_markdown_that_it_is(name, capsys):
    code, out, err = run(capsys, "docs", name)
    assert (code, out, err) == (0, text_of(PACKAGE_PAGES / "install.md"), "")


def test_a_page_as_json_has_its_text(capsys):
    code, out, _ = run(capsys, "docs", "install", "--json")
    assert code == 0
    assert json.loads(out) == {"schema_version": 1, "page": "install", "text": text_of(PACKAGE_PAGES / "install.md")}


def test_an_unknown_page_gets_the_nearest_names_and_exit_code_2(capsys):
    code, out, err = run(capsys, "docs", "trouble-shooting")
    assert (code, out) == (2, "")
    assert "did you mean troubleshooting" in err and "qlora-lite docs" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["../cli", "__init__", "", "x" * 5000, "\x1b[31m"])
def test_no_other_file_can_be_read_as_a_page(name):
    with pytest.raises(UserError, match="docs: unknown page") as error:
        read_page(name)
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 500


def test_docs_imports_no_torch():
    code = (
        "import sys\nfrom qlora_lite.cli import main\n"
        "try: main(['docs', 'install'])\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("columns", ["100", "0"])
def test_on_a_terminal_a_page_is_laid_out(columns):
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "qlora_lite", "docs", "glossary"]
    environment = os.environ | {"COLUMNS": columns, "TERM": "xterm"}
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, cwd=REPOSITORY, env=environment) as process:
        os.close(follower)
        shown = b""
        while chunk := _read(leader):
            shown += chunk
        assert process.wait(60) == 0
    os.close(leader)
    assert b"Glossary: ten words" in shown and b"# Glossary" not in shown and b"\x1b[" in shown


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


def test_the_reading_order_names_pages_that_exist():
    assert len(set(READING_ORDER)) == len(READING_ORDER)
    assert set(READING_ORDER) <= {page.name for page in list_pages()}


# --- the pages ---------------------------------------------------------------------------------------------------------------------------


def test_the_readme_is_a_front_page():
    assert len((REPOSITORY / "README.md").read_bytes()) <= README_BYTES


def test_the_readme_links_to_every_page():
    linked = set(re.findall(r"\]\(qlora_lite/docs/([\w-]+)\.md", text_of(REPOSITORY / "README.md")))
    assert linked == {page.name for page in list_pages()}


def test_the_page_of_recipe_keys_is_the_rendering_of_the_schema():
    advice = "python -m qlora_lite.recipe.keys_page > qlora_lite/docs/recipe-keys.md"
    assert text_of(PACKAGE_PAGES / "recipe-keys.md") == recipe_keys_page(), advice


def test_the_page_of_recipe_keys_has_every_key_once():
    assert sorted(re.findall(r"^\| `([\w.]+)` \|", recipe_keys_page(), flags=re.M)) == sorted(known_keys())


def test_the_glossary_has_ten_words():
    assert len(re.findall(r"^\| \*\*", text_of(PACKAGE_PAGES / "glossary.md"), flags=re.M)) == 10


@each_text
def test_a_page_begins_with_its_title(path):
    assert re.match(r"# \S.*\n\n\S", text_of(path))


@each_text
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_file() and there.is_relative_to(REPOSITORY), target
        assert not anchor or anchor in anchors_of(text_of(there)), target


def anchors_of(text: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_text
def test_every_file_that_a_page_names_exists(path):
    for name in re.findall(r"`((?:tests|tools)/[\w./-]+)", text_of(path)):
        assert (REPOSITORY / name.rstrip(".")).exists(), name


@each_text
def test_every_verb_and_option_exists(path):
    verbs = options()
    for verb, rest in commands_in(text_of(path)):
        assert verb in verbs, verb
        words = re.split(r"[ =\[\]|]+", rest)
        known = verbs[verb] | {flag for name, flags in verbs.items() if name.startswith(f"{verb} ") for flag in flags}
        for flag in (word for word in words if word.startswith("--")):
            assert flag in known, f"{verb} {flag}"
        if verb in GROUPS:
            for inner in words[1].replace("\\", "").split("|") if len(words) > 1 and words[1] else ():
                assert f"{verb} {inner}" in verbs, f"{verb} {inner}"


@each_text
def test_every_option_in_a_sentence_exists(path):
    """`--which merged` without its verb: an option of some verb, or of a program that is named beside it."""
    text, every = text_of(path), set().union(*options().values())
    beside = set(
        re.findall(r"--[\w-]+", "\n".join(line for line in text.splitlines() if "tools/" in line or "pip" in line))
    )
    for code in re.findall(r"`(--[^`\n]+)`", text):
        flag = re.match(r"--[\w-]+", code)[0]
        assert flag in every | beside or f"{flag} " in "".join(TOOL_OPTIONS), code


TOOL_OPTIONS = [
    f"{flag} "
    for tool in sorted((REPOSITORY / "tools").iterdir())
    if tool.is_file() and tool.suffix in ("", ".py", ".sh")
    for flag in re.findall(r"\"(--[a-z][\w-]+)\"", tool.read_text(encoding="utf-8"))
]


@each_text
def test_every_recipe_key_exists(path):
    keys, sections = set(known_keys()), "|".join(section_types())
    for code in code_of(text_of(path)):
        for key in re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z]\w*)", code):
            assert key in keys | NO_KEYS or key.endswith(tuple(f".{ending}" for ending in FILE_ENDINGS)), key


@each_text
def test_every_recipe_that_a_page_names_is_shipped(path):
    names = {recipe.name for recipe in list_recipes()}
    for name in re.findall(r"\b(smollm2-135m_[\w-]+)", text_of(path)):
        assert re.sub(r"-\d+$", "", name) in names, name


@each_text
def test_no_banned_phrase(path):
    prose = prose_of(text_of(path))
    for name, pattern in BANNED.items():
        found = re.search(rf".{{0,40}}(?:{pattern}).{{0,40}}", prose)
        assert found is None, f"{name}: {found[0]}"


def test_the_check_for_banned_phrases_finds_them():
    bad = (
        "It is no model.",
        "so many rows",
        "made anew",
        "by itself",
        "this is said",
        "mend it",
        "It says what fits.",
        "what it costs",
    )
    for sentence in bad:
        assert any(re.search(pattern, prose_of(sentence)) for pattern in BANNED.values()), sentence
    for sentence in (
        "What rank should I take?",
        "`what it is`",
        "It is recommended.",
        "no farther than, and is no farther from",
    ):
        assert not any(re.search(pattern, prose_of(sentence)) for pattern in BANNED.values()), sentence


def test_the_pages_are_part_of_the_wheel():
    """hatch takes every file below qlora_lite/ that git does not ignore; none of the pages is excluded."""
    pyproject = text_of(REPOSITORY / "pyproject.toml")
    assert re.search(r'targets\.wheel\]\ninclude = \["/qlora_lite"', pyproject)
    assert re.search(r'targets\.sdist\]\ninclude = \["/qlora_lite"', pyproject)
    assert {page.name for page in list_pages()} == {page.stem for page in PACKAGE_PAGES.glob("*.md")}
