"""Operations on adapters: analyze (rank), shorten, add (mix), and serve several on one loaded base (Blend). No screen output.

`truncate` and `mix` write a run and an adapter into one folder: adapter_config.json and adapter_model.safetensors, readable by plain
peft, and the recipe.yaml and env.json of the original run, so that `ask`, `eval`, `merge` and `rank` accept it like any run.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from qlora_lite.errors import ModelError, RunError, UserError
from qlora_lite.files.library_names import ADAPTER_CONFIG_FILE, B_FACTOR, PREFIX
from qlora_lite.files.manifest import folder_weights_sha256
from qlora_lite.merging.advice import KindOfModule, advice, by_kind
from qlora_lite.merging.checkpoint import read_json
from qlora_lite.merging.lora import Adapter, read_adapter
from qlora_lite.merging.mix import Part, mix_adapters, write_adapter
from qlora_lite.merging.spectrum import (
    Overlap,
    Spectrum,
    lost_share,
    overlaps,
    ranks_of_budget,
    ranks_of_equal,
    spectra,
    truncated_adapter,
)
from qlora_lite.plan import Plan
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.loading import LoadedModel, load_model
from qlora_lite.runs.verify import refuse_damaged

_OF_A_RUN = ("recipe.yaml", "env.json")  # records that make an adapter folder a run


@dataclass(frozen=True)
class Source:
    """The folder of an adapter, and the run that made it; None for a folder from peft."""

    folder: Path
    run: RunDir | None

    def read(self) -> Adapter:
        return read_adapter(self.folder)

    @property
    def base_sha256(self) -> str | None:
        return None if self.run is None else self.run.read_json("env.json").get("base_sha256")

    @property
    def texts(self) -> dict[str, str]:
        """The records that an adapter derived from this one copies."""
        if self.run is None:
            return {}
        return {name: (self.run.path / name).read_text(encoding="utf-8") for name in _OF_A_RUN}


def open_source(path: Path | str) -> Source:
    """Open the adapter of a run, or of a folder in PEFT's format; verified if it has a manifest. Raises RunError."""
    path = Path(path)
    if RunDir(path.parent).has_begun and RunDir(path.parent).trained == path:
        path = path.parent  # RUN/adapter belongs to the run, which names the base
    if not RunDir(path).has_begun:
        if not (path / ADAPTER_CONFIG_FILE).is_file():
            raise RunError(f"{path}: neither a run nor an adapter in PEFT's format: adapter_config.json is missing")
        if (path / "manifest.json").exists():
            refuse_damaged(path)
        return Source(path, None)
    run = RunDir.open(path)
    if run.trained is None:
        raise RunError(f"{path}: training is not finished, so there is no adapter yet. Continue it with --resume")
    if run.trained == run.weights:
        raise RunError(f"{path}: method full trains all weights, so there is no adapter")
    refuse_damaged(run.trained)
    return Source(run.trained, run)


@dataclass(frozen=True)
class RankReport:
    """The spectrum of an adapter's change: rank.json of a run."""

    modules: tuple[Spectrum, ...]
    kinds: tuple[KindOfModule, ...]
    advice: str
    num_parameters: int
    uses_dora: bool
    overlap: tuple[Overlap, ...]  # with another adapter, at several numbers of directions

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self) | {"modules": [_as_json(spectrum) for spectrum in self.modules]}


def rank_report(source: Source, other: Source | None = None) -> RankReport:
    """Analyze an adapter: spectra by module and kind, advice, overlap with another adapter. Raises ModelError."""
    if other is not None:
        _refuse_different_bases([source, other], "their directions cannot be compared")
    adapter = source.read()
    if not adapter.factors:
        raise ModelError(
            f"{source.folder}: only whole modules were trained, no factors, so there are no directions to analyze"
        )
    modules = spectra(adapter)
    kinds = by_kind(modules)
    return RankReport(
        modules=tuple(modules),
        kinds=tuple(kinds),
        advice=advice(kinds),
        num_parameters=_num_parameters(modules, {spectrum.module: spectrum.r for spectrum in modules}),
        uses_dora=any(factors.magnitude_O is not None for factors in adapter.factors.values()),
        overlap=() if other is None else tuple(overlaps(adapter, other.read())),
    )


@dataclass(frozen=True)
class BeforeAfter:
    """A number of the adapter and of the shorter one."""

    before: int
    after: int


@dataclass(frozen=True)
class ShorterAdapter:
    """An adapter written by `truncate`."""

    out: Path
    ranks: dict[str, int]  # by module
    lost_share: float  # of the change
    dtype: str
    adapter_bytes: BeforeAfter
    num_parameters: BeforeAfter

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def truncate(
    source: Source, out: Path, *, rank: int | None = None, num_parameters: int | None = None, dtype: str = "fp32"
) -> ShorterAdapter:
    """Write the best approximation of the adapter with `rank` per module, or with `num_parameters` in total.

    `dtype` is the type of the factors on disk: fp32, bf16 or int8. Raises RunError, ModelError, UserError.
    """
    if (rank is None) == (num_parameters is None) or (rank or num_parameters or 0) < 1:
        raise UserError("rank: give either --to R or --parameters N, above 0")
    adapter = source.read()
    _refuse_more_than_factors(adapter, source.folder)
    modules = spectra(adapter)
    trained = max(spectrum.r for spectrum in modules)
    if rank is not None and rank > trained:
        raise UserError(f"--to {rank}: the adapter's rank is {trained} and cannot be raised. Use at most {trained}")
    ranks = ranks_of_equal(modules, rank) if rank is not None else ranks_of_budget(modules, num_parameters or 0)
    if not any(ranks.values()):
        smallest = min(sum(spectrum.shape) for spectrum in modules)
        raise UserError(
            f"--parameters {num_parameters}: too few for one direction of any module; the smallest needs {smallest}"
        )
    made_of = {"adapter_sha256": folder_weights_sha256(source.folder), "ranks": ranks}
    shortened = truncated_adapter(adapter, ranks)
    write_adapter(shortened, out, base_name=_base_name(source), made_of=made_of, dtype=dtype, texts=source.texts)
    whole = {spectrum.module: spectrum.r for spectrum in modules}
    return ShorterAdapter(
        out=out,
        ranks=ranks,
        lost_share=lost_share(modules, ranks),
        dtype=dtype,
        adapter_bytes=BeforeAfter(factor_bytes(source.folder), factor_bytes(out)),
        num_parameters=BeforeAfter(_num_parameters(modules, whole), _num_parameters(modules, ranks)),
    )


@dataclass(frozen=True)
class Asked:
    """A part of a mix, such as `runs/a:0.7,down_proj=0.2`: an adapter, its weight, and weights of single modules."""

    path: Path
    weight: float
    weights: dict[str, float]


def parse_part(text: str) -> Asked:
    """Parse `RUN_DIR:WEIGHT[,MODULE=WEIGHT...]`. Raises UserError that shows the expected form."""
    path, colon, rest = text.rpartition(":")
    try:
        first, *modules = rest.split(",")
        weights = {name: float(value) for name, _, value in (module.partition("=") for module in modules)}
        if not (colon and path) or "" in weights:
            raise ValueError
        return Asked(Path(path), float(first), weights)
    except ValueError as error:
        raise UserError(
            f"{text!r}: expected RUN_DIR:WEIGHT, such as runs/a:0.7, or, with weights of single modules, runs/a:0.7,down_proj=0.2"
        ) from error


def parts_of(asked: Sequence[Asked]) -> tuple[list[Part], list[Source]]:
    """-> (parts, sources) of a mix; all adapters must have one base. Raises RunError."""
    sources = [open_source(part.path) for part in asked]
    _refuse_different_bases(sources, "their changes cannot be added")
    names = [str(part.path) for part in asked]
    parts = [Part(n, s.read(), a.weight, a.weights) for n, s, a in zip(names, sources, asked, strict=True)]
    return parts, sources


def _refuse_different_bases(sources: Sequence[Source], consequence: str) -> None:
    """Raise RunError if the runs recorded different bases."""
    bases = {source.base_sha256: source.run.path for source in sources if source.run is not None and source.base_sha256}
    if len(bases) > 1:
        raise RunError(f"{' and '.join(map(str, bases.values()))}: were trained on different bases, so {consequence}")


@dataclass(frozen=True)
class MixedAdapter:
    """An adapter written by `mix`."""

    out: Path
    r: int
    lost_share: float
    dtype: str
    adapter_bytes: int
    num_modules: int
    parts: tuple[Asked, ...]

    def to_json_dict(self) -> dict[str, Any]:
        parts = [{"path": str(part.path), "weight": part.weight, "weights": part.weights} for part in self.parts]
        return asdict(self) | {"out": str(self.out), "parts": parts}


def mix(asked: Sequence[Asked], out: Path, *, rank: int | None = None, dtype: str = "fp32") -> MixedAdapter:
    """Write the weighted sum of adapters as one adapter: exact, or the best of rank `rank`; factors in `dtype` (fp32, bf16 or int8).

    Raises RunError, ModelError, UserError.
    """
    if rank is not None and rank < 1:
        raise UserError(f"--rank: expected a whole number above 0, got {rank}")
    parts, sources = parts_of(asked)
    mixed = mix_adapters(parts, rank=rank)
    first = next((source for source in sources if source.run is not None), sources[0])
    made_of = [
        {"adapter_sha256": folder_weights_sha256(source.folder), "weight": part.weight, "weights": part.weights}
        for part, source in zip(asked, sources, strict=True)
    ]
    write_adapter(
        mixed.adapter, out, base_name=_base_name(first), made_of={"mix": made_of}, dtype=dtype, texts=first.texts
    )
    return MixedAdapter(
        out=out,
        r=mixed.r,
        lost_share=mixed.lost_share,
        dtype=dtype,
        adapter_bytes=factor_bytes(out),
        num_modules=len(mixed.adapter.factors),
        parts=tuple(asked),
    )


def factor_bytes(folder: Path) -> int:
    """Return the size of an adapter's tensors on disk."""
    return sum(path.stat().st_size for path in folder.glob("adapter_model*.safetensors"))


class Blend:
    """One loaded base with the factors of several adapters side by side, whose weights can be changed instantly.

    In: a plan and adapters by name. `use(weights)` makes `loaded` the base plus the weighted sum of changes: A_1; A_2; ... stay in place,
    and the columns of [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] are rewritten. So several adapters are served, mixed or swept over a scale without
    reloading. Factors have the plan's training type. Raises ModelError for adapters that cannot be mixed.
    """

    def __init__(self, plan: Plan, adapters: Mapping[str, Adapter]) -> None:
        self.names = tuple(adapters)
        side_by_side = mix_adapters([Part(name, adapter, 1.0, {}) for name, adapter in adapters.items()]).adapter
        with tempfile.TemporaryDirectory(prefix="qlora-lite-") as folder:
            path = write_adapter(side_by_side, Path(folder) / "blend", base_name="", made_of={})
            self.loaded: LoadedModel = load_model(plan, adapter=path)
        self._columns = {
            module: [
                (name, adapter.factors[module].a_RI.shape[0])
                for name, adapter in adapters.items()
                if module in adapter.factors
            ]
            for module in side_by_side.factors
        }
        self._b = {module: factors.b_OR for module, factors in side_by_side.factors.items()}

    @torch.no_grad()
    def use(self, weights: Mapping[str, float]) -> LoadedModel:
        """Return the base plus `weights[name]` times each adapter's change; unnamed adapters have weight 0."""
        unknown = weights.keys() - set(self.names)
        if unknown:
            raise UserError(f"{min(unknown)}: unknown adapter; loaded are {', '.join(self.names)}")
        assert isinstance(self.loaded.model, PeftModel)
        state = get_peft_model_state_dict(self.loaded.model, save_embedding_layers=False)
        for module, columns in self._columns.items():
            scale_R = torch.cat([torch.full((r,), float(weights.get(name, 0.0))) for name, r in columns])
            state[f"{PREFIX}{module}{B_FACTOR}weight"].copy_(self._b[module] * scale_R)
        return self.loaded


def _as_json(spectrum: Spectrum) -> dict[str, Any]:
    ranks = {f"{share:.0%}": spectrum.energy_rank(share) for share in (0.5, 0.9, 0.99)}
    return {
        "module": spectrum.module,
        "kind": spectrum.kind,
        "layer": spectrum.layer,
        "shape": list(spectrum.shape),
        "r": spectrum.r,
        "norm": spectrum.norm,
        "effective_rank": spectrum.effective_rank,
        "energy_ranks": ranks,
        "singular_values": list(spectrum.singular_values),
    }


def _num_parameters(modules: Sequence[Spectrum], ranks: Mapping[str, int]) -> int:
    return sum(ranks[spectrum.module] * sum(spectrum.shape) for spectrum in modules)


def _base_name(source: Source) -> str:
    return str(read_json(source.folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path") or "")


def _refuse_more_than_factors(adapter: Adapter, folder: Path) -> None:
    names = sorted({*adapter.whole, *adapter.rows})
    if names:
        raise RunError(
            f"{folder}: {names[0]} was trained besides the factors, and a shortened adapter would lose it. Merge the run instead"
        )
