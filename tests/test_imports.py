"""The import rule, and what no file of the package may do, read from the source without running it.

A room (a folder, or a loose module) imports only rooms above it in ROOMS: so there is no circle, and nothing reaches upward. Only runs, api
and commands import `plan`; only these, `recipe` and `plan` (and the package's front page) know a Recipe; only `show` knows rich, and knows
no stage. `commands.doctor` must work where a library is missing, so it imports none of them when it is imported.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qlora_lite"
ROOMS = (
    # small things that everything may use
    "errors",
    "limits",
    "units",
    "import_guard",
    "standard_streams",
    "device",
    "foreign",
    "files",
    "memory",
    # the stages, in the order of the data
    "recipe",
    "base",
    "model",
    "data",
    "training",
    "evaluation",
    "merging",
    "plan",
    # what people see, and what puts the stages in order
    "show",
    "runs",
    "api",
    "commands",
    "docs",
    "cli",
    "__main__",
)
FRONT_PAGE = ""  # qlora_lite/__init__.py
MAY_SEE_RECIPE = ("recipe", "plan", "runs", "api", "commands", FRONT_PAGE)
MAY_IMPORT_PLAN = ("plan", "runs", "api", "commands", FRONT_PAGE)
SHOW_IMPORTS = ("show", "errors", "units", "memory")
CLI_IMPORTS = ("commands", "docs", "recipe", "show", "errors", "standard_streams", "device")
NO_TORCH = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle",
    "os.system", "os.popen", "eval", "exec",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}  # when given as True, or as anything but False

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`qlora_lite/base/bnb.py` -> `model.bnb`; the package's own `__init__` -> ``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports_of(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    """Every imported name, absolute, with `from a import b` given as `a.b`; also imports inside functions."""
    package = ["qlora_lite", *module.split(".")] if module else ["qlora_lite"]
    package = package if is_package else package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def import_problems(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What breaks the import rule in a module of this name."""
    here, problems = module.split(".")[0], []
    for name in imports_of(ast.parse(source), module, is_package=is_package):
        top, *rest = name.split(".")
        if top == "rich" and here != "show":
            problems.append(f"{module} imports rich; only show does")
        if top in NO_TORCH and here in ("recipe", "docs", "errors", "units", "cli"):
            problems.append(f"{module} imports {name}; recipe errors and --help must come without {top}")
        if top == "bitsandbytes" and module != "base.bnb":
            problems.append(f"{module} imports bitsandbytes; use base.bnb, which closes two traps")
        if top in FORBIDDEN_MODULES:
            problems.append(f"{module} imports {name}; nothing is unpickled")
        if top != "qlora_lite" or not rest:
            continue
        there = rest[0]
        if there == "plan" and here not in MAY_IMPORT_PLAN:
            problems.append(f"{module} imports {name}; only runs, api and commands import plan")
        if here != FRONT_PAGE and there in ROOMS and ROOMS.index(there) > ROOMS.index(here):
            problems.append(f"{module} imports {name}; {there} comes after {here}")
        if here == "show" and there not in SHOW_IMPORTS:
            problems.append(f"{module} imports {name}; show takes plain values")
        if here == "cli" and there not in CLI_IMPORTS:
            problems.append(f"{module} imports {name}; the command line calls commands")
    if here not in MAY_SEE_RECIPE and mentions(ast.parse(source), "Recipe"):
        problems.append(f"{module} mentions Recipe; it takes plain values")
    return problems


def mentions(tree: ast.AST, name: str) -> bool:
    return any(
        name in (getattr(node, "id", None), getattr(node, "attr", None))
        or (isinstance(node, ast.alias) and node.name == name)
        for node in ast.walk(tree)
    )


def danger_problems(source: str) -> list[str]:
    """Calls and arguments that load code from data, or hand text to a shell."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) in FORBIDDEN_CALLS:
            problems.append(f"line {node.lineno}: {ast.unparse(node.func)}")
        for keyword in node.keywords:
            if keyword.arg in FORBIDDEN_KEYWORDS and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                problems.append(f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "qlora_lite")
def test_a_module_imports_only_what_comes_before_it(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert import_problems(source, module_of(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "qlora_lite")
def test_nothing_is_unpickled_and_no_foreign_code_is_run(path: Path) -> None:
    assert danger_problems(path.read_text(encoding="utf-8")) == []


def test_every_room_has_its_place_in_the_order() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | modules == set(ROOMS)
    assert len(modules) <= 11


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.examples", "from qlora_lite.training.loop import train"),
        ("data.examples", "from ..training import loop"),
        ("data.examples", "from qlora_lite import training"),
        ("training.loop", "def f():\n    import qlora_lite.plan.search"),
        ("training.loop", "import rich.table"),
        ("training.loop", "from qlora_lite.recipe import Recipe"),
        ("training.loop", "def f(recipe: schema.Recipe): ..."),
        ("merging.write", "import bitsandbytes as bnb"),
        ("recipe.load", "import torch"),
        ("units", "from qlora_lite.model import base"),
        ("cli", "from qlora_lite.training import loop"),
        ("base.source", "import pickle"),
    ],
)
def test_the_import_rule_sees_a_breach(module: str, source: str) -> None:
    assert import_problems(source, module) != []


@pytest.mark.parametrize(
    "source",
    ["torch.load(path)", "yaml.load(text, Loader=L)", "run(x, shell=True)", "f(trust_remote_code=flag)", "eval(text)"],
)
def test_the_danger_rule_sees_a_breach(source: str) -> None:
    assert danger_problems(source) != []


def test_allowed_neighbours_are_not_breaches() -> None:
    assert import_problems("from qlora_lite.base.bnb import bitsandbytes\nfrom . import head", "model.load") == []
    assert danger_problems("yaml.safe_load(text)\nrun(x, shell=False)\nmodel.eval()") == []


@pytest.mark.parametrize(
    "statement",
    [
        "from qlora_lite.cli import main; main(['--help'])",
        "import qlora_lite, qlora_lite.recipe",
        "import qlora_lite.commands.doctor",
    ],
)
def test_help_and_recipes_do_not_import_torch(statement: str) -> None:
    code = (
        "import sys\n"
        f"try:\n    {statement}\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"heavy = sorted({NO_TORCH!r} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stderr
