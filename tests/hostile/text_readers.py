"""Readers of what people write: recipes, `--set`, and rows in every kind of file."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jinja2  # noqa: F401  (imported before the fuzzer forks)
import pyarrow
import pyarrow.parquet
import yaml
from datasets import Dataset

from qlora_lite.recipe import load_recipe
from qlora_lite.recipe.schema import known_keys
from tests.conftest import REPOSITORY
from tests.data.conftest import CONTEXT, question, squad
from tests.data.tiny_tokenizer import make_tokenizer
from tests.hostile.mutations import mutate_bytes, mutate_json, mutate_text
from tests.hostile.reader import Reader, is_json, spread
from tests.reading import inspect_rows

_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
_ROWS: list[dict[str, Any]] = [
    {"prompt": 'Wo, "da"?\nHier?', "completion": "Überall 🐪"},
    {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"text": "Once upon a time."},
    {"id": "q1", "context": CONTEXT, "question": "Where?", "answers": {"text": ["Cairo"], "answer_start": [30]}},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Hello", "weight": 1},
        ]
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "x", "tools": "[]"},
]  # fmt: skip
_SQUAD = squad(question("a", "Which town?", "Cairo"), question("b", "Which river?", "Nile"), question("c", "Who?"))
_RECIPE = """\
# A recipe.
method: qlora
model: {base: smollm2-135m, quantization: nf4, double_quant: true, dtype: auto}
lora:
  r: 16
  lora_alpha: 32
  target_modules: [q_proj, v_proj]
data: {train: rows.jsonl, eval: null, format: auto, max_seq_length: 512}
train:
  epochs: 1
  learning_rate: 2e-4
  schedule: cosine   # a comment
  trackers: []
memory: {budget: 24GiB, gradient_checkpointing: auto}
merge: {dtype: bf16, proof: auto}
"""


def _recipes(_: Path) -> list[str]:
    mixed = "data:\n  train:\n    - {path: rows.jsonl, weight: 2}\n    - {path: rows.jsonl, weight: 0.5}\n"
    shipped = (REPOSITORY / "recipes" / "smollm2-135m_country-qa.yaml").read_text(encoding="utf-8")
    for file in ("country_qa/train.json", "country_qa/test.json"):
        shipped = shipped.replace(file, "rows.jsonl")
    return [_RECIPE, mixed, shipped]


def _write_recipe(seed: str, folder: Path, rng: Random | None) -> None:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    text = seed if rng is None else mutate_text(seed, rng, words=[*known_keys(), "auto", "rows.jsonl", "../", "24GiB"])
    data = text.encode("utf-8", "surrogatepass")
    (folder / "recipe.yaml").write_bytes(mutate_bytes(data, rng) if rng and rng.random() < 0.3 else data)


def _is_recipe(folder: Path) -> bool:
    top = yaml.compose((folder / "recipe.yaml").read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return isinstance(top, yaml.MappingNode)


def _write_set(seed: list[str], folder: Path, rng: Random | None) -> None:
    if rng is not None:
        keys = list(known_keys())
        seed = [f"{rng.choice(keys)}{override[override.index('=') :]}" for override in seed if rng.random() < 0.7]
        seed = [mutate_text(override, rng, words=keys) for override in seed or ["lora.r=1"]]
    (folder / "sets.json").write_text(json.dumps(seed), encoding="utf-8")


def _sets(folder: Path) -> list[str]:
    return json.loads((folder / "sets.json").read_text(encoding="utf-8"))


def _sets_known_key(folder: Path) -> bool:
    return any(override.partition("=")[0].strip() in known_keys() and "=" in override for override in _sets(folder))


_SETS = ["lora.r=8", "lora.target_modules=[q_proj, v_proj]", "train.learning_rate=2e-4", "memory.budget=24GiB", "lora.r=4",
         "data.train=[{path: rows.jsonl, weight: 2}]", "merge.proof=auto", "train.early_stop=null"]  # fmt: skip


def _inspect(name: str) -> Callable[[Path], object]:
    tokenizer: list[Any] = []

    def read(folder: Path) -> object:
        if not tokenizer:
            tokenizer.append(make_tokenizer())
        path = folder / name
        return inspect_rows(
            path, tokenizer[0], num_rows=None, no_answer_text="none", max_seq_length=None, max_bad_share=0.9
        )

    return read


def _row_seeds(_: Path) -> list[list[dict[str, Any]]]:
    return [[row] * 3 for row in _ROWS]


def _write_json(seed: Any, folder: Path, rng: Random | None) -> None:
    text = json.dumps(seed, ensure_ascii=False) if rng is None else mutate_json(seed, rng)
    data = text.encode("utf-8", "surrogatepass")
    (folder / "rows.json").write_bytes(mutate_bytes(data, rng) if rng and rng.random() < 0.25 else data)


def _write_jsonl(seed: Any, folder: Path, rng: Random | None) -> None:
    lines = [
        mutate_json(row, rng) if rng and rng.random() < 0.6 else json.dumps(row, ensure_ascii=False) for row in seed
    ]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    (folder / "rows.jsonl").write_bytes(mutate_bytes(data, rng) if rng and rng.random() < 0.25 else data)


def _begins_as_json(folder: Path) -> bool:
    return isinstance(json.loads((folder / "rows.jsonl").read_bytes().splitlines()[0]), dict)


def _csv_seeds(_: Path) -> list[str]:
    seeds = []
    for row in _ROWS:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(row))
        writer.writeheader()
        cell = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
        writer.writerows([cell, cell])
        seeds.append(out.getvalue())
    return seeds


def _write_csv(seed: str, folder: Path, rng: Random | None) -> None:
    text = seed if rng is None else mutate_text(seed, rng, words=['"', ",", "\n", '""', "\r\n", ",,,,", "[", "]"])
    data = text.encode("utf-8", "surrogatepass")
    (folder / "rows.csv").write_bytes(mutate_bytes(data, rng) if rng and rng.random() < 0.25 else data)


def _is_csv(folder: Path) -> bool:
    with (folder / "rows.csv").open(encoding="utf-8", newline="") as file:
        return len(list(csv.reader(file, strict=True))) > 1


def _parquet_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for number, row in enumerate(_ROWS):
        for compression in ("none", "snappy"):
            path = folder / f"{number}.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([_for_arrow(row)] * 5), path, compression=compression)
            seeds.append(path.read_bytes())
    return seeds


def _for_arrow(row: dict[str, Any]) -> dict[str, Any]:
    """A column of it has one type: text, or lists of objects."""
    messages = [message for message in row.get("messages", ()) if isinstance(message["content"], str)]
    return row | ({"messages": messages} if messages else {})


def _other_tables(rng: Random) -> pyarrow.Table:
    """Rows of types that no JSON has, under the names of columns that are read."""
    columns = rng.choice((["text"], ["prompt", "completion"], ["messages"], ["context", "question", "answers"]))
    arrays = [
        pyarrow.array([2**52, -1], type=pyarrow.timestamp("s")),
        pyarrow.array([2**62, None], type=pyarrow.timestamp("ns", tz="Nowhere/Else")),
        pyarrow.array([b"\xff\xfe", b"a"]),
        pyarrow.array([2**31 - 1, -(2**31)], type=pyarrow.date32()),
        pyarrow.array([[["a"]], []]),
        pyarrow.array([{"a": 1}, {"b": None}]),
        pyarrow.array(["x", "x"]).dictionary_encode(),
        pyarrow.array([10**6, 1], type=pyarrow.duration("s")),
        pyarrow.array([[("a", 1)], []], type=pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        pyarrow.array([float("nan"), 1.0]),
        pyarrow.nulls(2),
        pyarrow.array(["a" * 1_000_001, "b"]),
    ]
    return pyarrow.table({name: rng.choice(arrays) for name in columns})


def _write_parquet(seed: bytes, folder: Path, rng: Random | None) -> None:
    path = folder / "rows.parquet"
    if rng is None:
        path.write_bytes(seed)
    elif rng.random() < 0.4:
        pyarrow.parquet.write_table(_other_tables(rng), path)
        if rng.random() < 0.3:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    else:
        path.write_bytes(mutate_bytes(seed, rng))


def _is_parquet(folder: Path) -> bool:
    return pyarrow.parquet.ParquetFile(folder / "rows.parquet").metadata.num_columns > 0


def _saved_seeds(folder: Path) -> list[dict[str, bytes]]:
    seeds = []
    for number, row in enumerate(_ROWS):
        path = folder / f"saved-{number}"
        Dataset.from_list([_for_arrow(row)] * 3).save_to_disk(path)
        seeds.append({file.name: file.read_bytes() for file in sorted(path.iterdir())})
    return seeds


def _write_saved(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    out = folder / "saved"
    out.mkdir()
    for name, data in seed.items():
        (out / name).write_bytes(data)
    name = spread([*sorted(seed), "state.json"], rng)
    if rng is None:
        return
    if name.endswith(".json"):
        names = ["../../outside/secret.arrow", "/etc/passwd", "state.json"]
        kinds = "Value List Translation Image Audio Json Sequence ClassLabel int32 numpy torch".split()
        (out / name).write_text(mutate_json(json.loads(seed[name]), rng, values=names + kinds), encoding="utf-8")
    else:
        (out / name).write_bytes(mutate_bytes(seed[name], rng))


def _is_saved(folder: Path) -> bool:
    return all(is_json(folder / "saved" / name) for name in ("state.json", "dataset_info.json"))


READERS = (
    Reader("recipe", _recipes, _write_recipe, _is_recipe, lambda folder: load_recipe(folder / "recipe.yaml")),
    Reader(
        "set",
        lambda _: [[override] for override in _SETS[:5]] + [_SETS[:1], _SETS[6:]],
        _write_set,
        _sets_known_key,
        lambda folder: load_recipe("smollm2-135m_country-qa", overrides=_sets(folder)),
    ),
    Reader("json", _row_seeds, _write_json, lambda folder: is_json(folder / "rows.json", list), _inspect("rows.json")),
    Reader("jsonl", _row_seeds, _write_jsonl, _begins_as_json, _inspect("rows.jsonl")),
    Reader("csv", _csv_seeds, _write_csv, _is_csv, _inspect("rows.csv")),
    Reader("parquet", _parquet_seeds, _write_parquet, _is_parquet, _inspect("rows.parquet")),
    Reader("saved", _saved_seeds, _write_saved, _is_saved, _inspect("saved")),
    Reader("squad", lambda _: [_SQUAD], _write_json, lambda folder: is_json(folder / "rows.json"), _inspect("rows.json")),
)  # fmt: skip
