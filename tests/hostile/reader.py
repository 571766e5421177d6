"""What a reader is to the fuzzer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True)
class Reader:
    """One reader of the program and how to write it a hostile input.

    `make(folder)` is called once a process and returns the valid seeds; `write(seed, folder, rng)` puts one into an empty folder,
    mutated (`rng` None: as it is); `parses(folder)` says whether the files are of the outer form (JSON, YAML, a Parquet footer, ...), so
    that what reads them is our own checks and not a parser's first complaint; `read(folder)` is what is tested.
    """

    name: str
    make: Callable[[Path], list[Any]]
    write: Callable[[Any, Path, Random | None], None]
    parses: Callable[[Path], bool]
    read: Callable[[Path], object]


def is_json(path: Path, kind: type = dict) -> bool:
    """Whether a file is a JSON document of this kind."""
    return isinstance(json.loads(path.read_text(encoding="utf-8")), kind)


def spread(names: list[str], rng: Random | None) -> str:
    """The file of a case that is mutated."""
    return names[0] if rng is None else rng.choice(names)
