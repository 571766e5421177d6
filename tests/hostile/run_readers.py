"""Readers of what training leaves: adapters, manifests, the JSON of a run, and the hub's list of revisions."""

import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

from qlora_lite import show
from qlora_lite.base.artefact import verify_artefact
from qlora_lite.errors import ModelError
from qlora_lite.files.manifest import read_manifest, seal, verify_manifest, weights_sha256, write_manifest
from qlora_lite.merging.lora import read_adapter
from qlora_lite.model.adapter import load_adapter, save_adapter
from qlora_lite.model.factors import copy_factors
from qlora_lite.model.int8_factors import INT8_FILE, to_int8
from qlora_lite.recipe import load_recipe
from qlora_lite.recipe.hub_names import find_fetched
from qlora_lite.runs.folder import RunDir
from qlora_lite.show.run_files import read_run
from tests.hostile.model_readers import files_of, write_files, write_safetensors
from tests.hostile.mutations import mutate_bytes, mutate_json
from tests.hostile.reader import Reader, is_json
from tests.show.run_files import write_run
from tests.tiny_model import tiny_adapted, tiny_base

_CONFIG, _FACTORS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER_KEYS = (
    *("megatron_config", "megatron_core", "auto_mapping", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
    *("loftq_config", "runtime_config", "layer_replication", "target_parameters", "modules_to_save", "corda_config"),
)
_ADAPTER_VALUES = (
    *("LORA", "IA3", "PROMPT_TUNING", "lora_only", "pissa", "eva", "all-linear", "(.*a)+(.*b)+$", "[", "q_proj"),
    *({"(a+)+$": 8}, {"layers.0": 0}, {"q_proj": "8"}, {"": -1}, ["lm_head"], ["q_proj", 3], {"embed_tokens": [1, 2**62]}, {"a": [-1]}),
    *({"megatron_core": "evil"}, {"parent_library": "evil", "base_model_class": "x"}, 0, -8, 2**40, 1e-9, [0, 1], "os"),
)  # fmt: skip


def _adapter_seeds(folder: Path) -> list[dict[str, bytes]]:
    seeds = []
    for r in (4, 8):
        out = folder / f"adapter-{r}"
        save_adapter(tiny_adapted(r=r), out, base_name="tiny")
        seeds.append(files_of(out))
    return seeds


def _write_adapter(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    out = folder / "adapter"
    out.mkdir()
    write_files(seed, out)
    if rng is None:
        return
    document = json.loads(seed[_CONFIG])
    if rng.random() < 0.4:
        document[rng.choice(_ADAPTER_KEYS)] = rng.choice(_ADAPTER_VALUES)
    data = mutate_json(document, rng, values=_ADAPTER_VALUES).encode("utf-8", "surrogatepass")
    (out / _CONFIG).write_bytes(mutate_bytes(data, rng) if rng.random() < 0.1 else data)


def _write_factors(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    out = folder / "adapter"
    out.mkdir()
    write_safetensors({**seed, "model.safetensors": seed[_FACTORS]}, out, rng)
    (out / "model.safetensors").replace(out / _FACTORS)


def _int8_seeds(folder: Path) -> list[dict[str, bytes]]:
    found = []
    for seed in _adapter_seeds(folder)[:1]:
        data = save(to_int8(load(seed[_FACTORS])))
        found.append({_CONFIG: seed[_CONFIG], INT8_FILE: data})
    return found


def _write_int8(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    _write_factors({**seed, _FACTORS: seed[INT8_FILE]}, folder, rng)
    (folder / "adapter" / _FACTORS).replace(folder / "adapter" / INT8_FILE)


def _is_int8(folder: Path) -> bool:
    return _has_head(folder / "adapter" / INT8_FILE)


def _write_either(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    write = _write_adapter if rng is None or rng.random() < 0.5 else _write_factors
    write(seed, folder, rng)


def _is_factors(folder: Path) -> bool:
    return _has_head(folder / "adapter" / _FACTORS)


def _has_head(path: Path) -> bool:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return length <= len(data) - 8 and isinstance(json.loads(data[8 : 8 + length]), dict)


def _read_for_merge(folder: Path) -> object:
    adapter = read_adapter(folder / "adapter")
    for name in adapter.rows:
        assert adapter.shape_of(name, (320, 64))[0] < 10**8, "a huge table of tokens"
    return adapter


def _start_from(folder: Path) -> object:
    """The recipe's check of lora.init_from, then its factors put into a new adapter of the same shape."""
    sets = ["lora.r=4", "lora.lora_alpha=8", f"lora.init_from={folder / 'adapter'}"]
    load_recipe("smollm2-135m_country-qa", overrides=sets, files_must_exist=False)
    return copy_factors(_SHARED.setdefault("adapted", tiny_adapted(r=4)), folder / "adapter")


_SHARED: dict[str, Any] = {}


def _manifest_seeds(folder: Path) -> list[dict[str, bytes]]:
    out = folder / "with-manifest"
    out.mkdir()
    (out / "model.safetensors").write_bytes(save({"a": torch.ones(2)}))
    (out / "config.json").write_text("{}", encoding="utf-8")
    write_manifest(out, {"step": 3, "source": "tiny"})
    return [files_of(out)]


def _write_manifest(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    write_files(seed, folder)
    if rng is None:
        return
    outside = [f"{'../' * depth}outside/secret.safetensors" for depth in (1, 2)] + [
        str(folder.parent / "outside" / "secret.safetensors")
    ]
    document = json.loads(seed["manifest.json"])
    if rng.random() < 0.4:
        document["files"][rng.choice([*outside, "pipe", ".", ""])] = document["files"]["config.json"]
    text = mutate_json(document, rng, values=[*outside, {"bytes": "x"}, {"sha256": 1}])
    if rng.random() < 0.7:  # whoever writes a hostile manifest can seal it
        with suppress(ValueError, RecursionError, AttributeError):
            text = seal(json.loads(text))
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))


def _read_manifest(folder: Path) -> object:
    manifest = read_manifest(folder)
    if manifest is None or verify_manifest(folder):
        raise ModelError("the manifest is missing, damaged or not that of these files")  # as verify_artefact says it
    return weights_sha256(manifest), verify_artefact(folder)


_DOCUMENTS = (
    "plan.json",
    "env.json",
    "eval.json",
    "memory.json",
    "merge.json",
    "train.json",
    "steps.jsonl",
    "predictions.jsonl",
)


def _run_seeds(folder: Path) -> list[dict[str, bytes]]:
    return [files_of(write_run(folder / "run"))]


def _write_run(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    write_files(seed, folder)
    for name in _DOCUMENTS if rng is not None else ():
        assert rng is not None
        if rng.random() > 0.4:
            continue
        if name.endswith(".jsonl"):
            lines = [json.loads(line) for line in seed[name].splitlines()][:5]
            data = "\n".join(mutate_json(line, rng) for line in lines).encode("utf-8", "surrogatepass")
        else:
            data = mutate_json(json.loads(seed[name]), rng).encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(mutate_bytes(data, rng) if rng.random() < 0.1 else data)


def _read_run(folder: Path) -> object:
    run = RunDir.open(folder)
    read_run(run.path)
    show.render_report(run.path)
    return [run.read_json(name) for name in _DOCUMENTS[:6]], run.read_steps(), run.read_predictions()


_REVISIONS = {"schema_version": 1, "newest": "a" * 40, "revisions": {"main": "a" * 40, "v1": "a" * 40}}


def _revisions(folder: Path) -> Path:
    return folder / "cache" / "hub" / "org" / "name.json"


def _write_revisions(seed: dict[str, Any], folder: Path, rng: Random | None) -> None:
    path = _revisions(folder)
    path.parent.mkdir(parents=True)
    (path.parent / f"name@{'a' * 40}").mkdir()
    text = json.dumps(seed) if rng is None else mutate_json(seed, rng, values=["../../../outside", "a" * 40, "main"])
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _find_revisions(folder: Path) -> object:
    cache = folder / "cache"
    for revision in (None, "main", "v1", "a" * 40, "../x"):
        found = find_fetched("org/name", revision, cache=cache)
        assert found is None or found.parent == cache / "hub" / "org", f"{found} is outside the cache"
    return None


READERS = (
    Reader("adapter_config", _adapter_seeds, _write_adapter, lambda folder: is_json(folder / "adapter" / _CONFIG), _read_for_merge),
    Reader("adapter_factors", _adapter_seeds, _write_factors, _is_factors, _read_for_merge),
    Reader("adapter_int8", _int8_seeds, _write_int8, _is_int8, _read_for_merge),
    Reader(
        "adapter_on_model", _adapter_seeds, _write_adapter, lambda folder: is_json(folder / "adapter" / _CONFIG),
        lambda folder: load_adapter(tiny_base().model, folder / "adapter"),
    ),
    Reader("init_from", lambda folder: _adapter_seeds(folder)[:1], _write_either, _is_factors, _start_from),
    Reader("manifest", _manifest_seeds, _write_manifest, lambda folder: is_json(folder / "manifest.json"), _read_manifest),
    Reader("run_json", _run_seeds, _write_run, lambda folder: all(is_json(folder / name) for name in _DOCUMENTS[:6]), _read_run),
    Reader("hub_revisions", lambda _: [_REVISIONS], _write_revisions, lambda folder: is_json(_revisions(folder)), _find_revisions),
)  # fmt: skip
