"""The whole program once, in a process of its own, with everything around it that could make it leak: several tests look at what it did.

    no network     every connection forbidden from inside (guarded.py); where this machine allows it in a network namespace without
                   routes, and under strace, which also sees what native code asks of the kernel
    libraries      told that they may go online (HF_HUB_OFFLINE=0), as some people's environments do
    secrets        every variable that usually holds one holds SECRET
    hostile text   terminal escapes, markup and HTML in every row, question, path and name

It is run once for all tests: a minute on one core.
"""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY
from tests.tiny_model import tiny_source
from tests.tiny_run import write_recipe

SECRET = "s3cr3t-m4rk3r"
_TOKENS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "WANDB_API_KEY", "TRACKIO_WRITE_TOKEN",
    "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "SOME_PASSWORD",
)  # fmt: skip
_ADDRESSES = (
    "HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL",
    "WANDB_BASE_URL",
)  # fmt: skip
ONLINE = {
    "HF_HUB_OFFLINE": "0",
    "TRANSFORMERS_OFFLINE": "0",
    "HF_DATASETS_OFFLINE": "0",
    "HF_HUB_DISABLE_TELEMETRY": "0",
}

# One of these stands in every question, passage, answer and id; none may act. `check` shows the first three, the report the first four.
HOSTILE = (
    "\x1b[31m\x1b[2J\u202egnp.exe\u2066",
    "[red]r[/red][/none][link=http://evil]l[/link]",
    "</title></style><script>x</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b]0;owned\x07",
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31m\x9d0;owned\x9c",
    "' onmouseover='x",
    "<svg onload=x><a href=javascript:x>",
    "{title}{0}%s%n \r\x08\x7f",
)
# A name that a folder can have: all kinds at once, a slash excepted; é once as one letter and once as two.
HOSTILE_NAME = "a \x1b[31m\x9b2J\u202e [red] [link=x] <img src=x onerror=y> \"q\" 'q' $(touch owned) é e\u0301"


@dataclass(frozen=True)
class WholeRun:
    """What happened. `connections`, `processes` and `pickles` are what Python was asked for; `system_calls` is None without strace."""

    folder: Path
    run_dir: Path
    pages: tuple[Path, ...]
    codes: dict[str, int]
    output: bytes
    connections: tuple[str, ...]
    processes: tuple[str, ...]
    pickles: tuple[str, ...]
    in_namespace: bool
    system_calls: tuple[str, ...] | None

    @property
    def files(self) -> list[Path]:
        """All that was written: the run, the pages, the cache and the home."""
        return [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]


@functools.cache
def whole_run() -> WholeRun:
    root = Path(tempfile.mkdtemp(prefix="qlora-lite-whole-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    given, made = root / "given", root / "made"  # what it reads, and all that it may write
    made.mkdir()
    recipe, question = _hostile_recipe(given), f"Which city{HOSTILE[0]} is {HOSTILE[1]} Zimbabwe's{HOSTILE[2]} capital?"
    (passage := given / "passage.txt").write_text(
        "Harare is the capital of Zimbabwe." + "".join(HOSTILE), encoding="utf-8"
    )
    run_dir, plan_page = made / HOSTILE_NAME, made / f"plan {HOSTILE_NAME}.html"
    commands = [
        ["recipes", "list"],
        ["docs", "install"],
        ["doctor"],
        ["check", str(recipe)],
        ["plan", str(recipe), "--html", str(plan_page)],
        ["train", str(recipe), "--run-dir", str(run_dir)],
        ["eval", str(run_dir)],
        ["merge", str(run_dir)],
        ["ask", str(run_dir), question, "--context", str(passage), "--which", "all"],
        ["report", str(run_dir)],
        ["rank", str(run_dir)],
        ["mix", f"{run_dir}:0.7", f"{run_dir}:0.3", "--out", str(made / f"mixed {HOSTILE_NAME}")],
        ["verify", str(run_dir)],
    ]
    commands = [command for command in commands if command[0] in known_verbs()]
    log, calls, listed = root / "log", root / "calls", root / "commands.json"
    listed.write_text(json.dumps(commands), encoding="utf-8")
    around, in_namespace, is_traced = _around(calls)
    done = subprocess.run(
        [*around, sys.executable, str(Path(__file__).with_name("guarded.py")), str(log), str(listed)],
        env=_environment(made),
        cwd=made,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
        umask=0o022,
    )
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    words = [line.split(" ") for line in lines]

    def noted(kind: str) -> tuple[str, ...]:
        return tuple(line for line in lines if line.startswith(f"{kind} "))

    return WholeRun(
        folder=made,
        run_dir=run_dir,
        pages=(plan_page, run_dir / "report.html"),
        codes={line[1]: int(line[2]) for line in words if line[0] == "exit"} | {"process": done.returncode},
        output=done.stdout,
        connections=noted("network"),
        processes=noted("process"),
        pickles=noted("pickle"),
        in_namespace=in_namespace,
        system_calls=tuple(calls.read_text(errors="replace").splitlines()) if is_traced else None,
    )


def known_verbs() -> set[str]:
    """The verbs of the command line as it is."""
    from qlora_lite.cli import app

    verbs = {str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands}
    return verbs | {
        str(group.name or (group.typer_instance and group.typer_instance.info.name)) for group in app.registered_groups
    }


def namespace() -> list[str]:
    """The command that runs another one without routes, [] where this machine does not allow it."""
    return _if_it_works(["unshare", "--user", "--map-root-user", "--net"])


def tracer(calls: Path) -> list[str]:
    """The command that writes every system call about the network to `calls`, [] without strace."""
    return _if_it_works(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "signal=none", "-e", "trace=network", "-o", str(calls)]
    )


def opens_a_connection(system_call: str) -> bool:
    """A line of strace that makes a socket which is not one between processes of this machine."""
    return " socket(" in system_call and "(AF_UNIX," not in system_call


def _around(calls: Path) -> tuple[list[str], bool, bool]:
    without_routes, traced = namespace(), tracer(calls)
    return [*without_routes, *traced], bool(without_routes), bool(traced)


def _if_it_works(command: list[str]) -> list[str]:
    try:
        done = subprocess.run([*command, "true"], capture_output=True, timeout=60)
    except OSError:
        return []
    return command if done.returncode == 0 else []


def _environment(made: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if "offline" not in name.lower()}
    ours |= {
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(made / "home"),
        "QLORA_LITE_HOME": str(made / "cache"),
        "PYTHONWARNINGS": "default",
    }
    ours |= dict.fromkeys(_TOKENS, f"hf_{SECRET}") | dict.fromkeys(_ADDRESSES, f"https://{SECRET}:{SECRET}@127.0.0.1:9")
    (made / "home").mkdir()
    return ours | ONLINE


def _hostile_recipe(folder: Path) -> Path:
    """The tiny recipe with hostile text in every row and in the names of recipe and model; with the trackers that are installed."""
    model = folder / f"model {HOSTILE_NAME}"
    shutil.copytree(tiny_source(), model)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
    ):  # what libraries may quote in a warning
        known = json.loads((model / name).read_text(encoding="utf-8"))
        hostile = {f"key {text}": text for text in HOSTILE} | {"architectures": [f"Llama{HOSTILE[0]}"]}
        (model / name).write_text(json.dumps(known | hostile), encoding="utf-8")
    plain = write_recipe(folder / f"recipes {HOSTILE_NAME}", trackers=["tensorboard"], max_steps=2)
    for name in ("train.json", "test.json"):
        _make_hostile(plain.with_name(name))
    lines = plain.read_text(encoding="utf-8").splitlines()
    hostile = plain.with_name(f"tiny {HOSTILE_NAME}.yaml")
    hostile.write_text("\n".join([f"model: {json.dumps({'base': str(model)})}", *lines[1:]]), encoding="utf-8")
    plain.unlink()
    return hostile


def _make_hostile(squad: Path) -> None:
    document: dict[str, Any] = json.loads(squad.read_text(encoding="utf-8"))
    paragraphs = [paragraph for article in document["data"] for paragraph in article["paragraphs"]]
    for index, paragraph in enumerate(paragraphs):
        text = HOSTILE[index % len(HOSTILE)]
        (row,) = paragraph["qas"]
        row["question"] += text
        row["id"] = f"{text} {index}"
        if index % 2:  # an answer that is nothing but hostile text, also to be scored
            row["answers"] = [{"text": text, "answer_start": len(paragraph["context"])}]
        paragraph["context"] += text
    squad.write_text(json.dumps(document), encoding="utf-8")
