"""From base and adapter files to a 16-bit model folder, with a proof that it computes the same: gives `MergeResult`.

checkpoint.py      read a base: NF4, int8 or 16-bit files -> fp32 row blocks
lora.py            read a PEFT adapter: its factors, whole modules and rows
write.py           the merge
rounding.py        fp32 -> 16 bits without systematic loss
proof.py           adapter model against merged files, on held-out rows
streamed.py        a decoder with one weight in memory at a time
spectrum.py        singular values of an adapter's change, and truncation
advice.py          a recommended rank from spectra or from scores
mix.py             weighted sums of adapters
adapter_proof.py   the share of an adapter's effect that another form of it loses
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lite.base.generation_settings import add_stop_tokens
from qlora_lite.files.manifest import folder_weights_sha256, read_manifest, verify_manifest, write_manifest
from qlora_lite.files.staging import staged_folder
from qlora_lite.merging.proof import Proof, prove_merge
from qlora_lite.merging.write import MergeOptions, WriteResult, write_merged

if TYPE_CHECKING:
    from qlora_lite.data.template import Encoded

__all__ = ["MergeOptions", "MergeResult", "Proof", "WriteResult", "merge", "prove_merge"]


@dataclass(frozen=True)
class MergeResult:
    """The options and the errors of a merge. Ratios are shares of the adapter's effect; None without a proof."""

    out: Path
    dtype: str
    rounding: str
    seed: int
    scale: float
    num_merged: int
    total_bytes: int
    adapter_effect: float | None
    arithmetic_ratio: float | None
    storage_ratio: float | None
    nearest_ratio: float | None
    ratio: float | None
    equal_greedy_share: float | None
    num_rows: int
    num_label_tokens: int
    peak_host_bytes: int | None
    proof_peak_host_bytes: int | None
    warnings: tuple[str, ...]

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out), "warnings": list(self.warnings)}


def merge(
    base_dir: Path | str,
    adapter_dir: Path | str,
    out_dir: Path | str,
    encoded_rows: "Sequence[Encoded] | None",
    *,
    options: MergeOptions = MergeOptions(),
    device: str = "cpu",
    stop_tokens: Sequence[int] = (),
) -> MergeResult:
    """Merge, prove the written files on `encoded_rows`, and only then rename them to `out_dir`.

    `out_dir` must be missing or empty, or hold the result of the same call, which is then returned. A few dozen held-out rows suffice;
    None skips the proof, with a warning. `device` runs the proof. Plain `generate` of the
    merged model stops at `stop_tokens` too. Raises ProofFailed for a wrong merge, ModelError for a base and an adapter that do not fit,
    UserError for options; an error leaves no folder.
    """
    of_values = {key: value for key, value in asdict(options).items() if key != "max_shard_bytes"}
    made_of = {"base": Path(base_dir).name, "adapter_sha256": folder_weights_sha256(adapter_dir), **of_values}
    made_of |= {"stop_tokens": list(stop_tokens)} if stop_tokens else {}
    done = _done_before(Path(out_dir), made_of)
    if done is not None:
        return done
    with staged_folder(out_dir) as folder:
        written = write_merged(base_dir, adapter_dir, folder, options)
        if stop_tokens:
            add_stop_tokens(folder, stop_tokens, base=Path(base_dir))
        proof = None
        if encoded_rows is not None:
            proof = prove_merge(
                base_dir,
                adapter_dir,
                folder,
                encoded_rows,
                scale=options.scale,
                compute_dtype=options.compute_dtype,
                device=device,
            )
        result = _result(Path(out_dir), options, written, proof)
        kept = {key: value for key, value in result.to_json_dict().items() if key != "out"}
        write_manifest(folder, {"made_of": made_of, "result": kept})
    return result


def _result(out: Path, options: MergeOptions, written: WriteResult, proof: Proof | None) -> MergeResult:
    return MergeResult(
        out=out,
        dtype=options.dtype,
        rounding=options.rounding,
        seed=options.seed,
        scale=options.scale,
        num_merged=written.num_merged,
        total_bytes=written.total_bytes,
        adapter_effect=proof.adapter_effect if proof else None,
        arithmetic_ratio=proof.arithmetic_ratio if proof else None,
        storage_ratio=proof.storage_ratio if proof else None,
        nearest_ratio=proof.nearest_ratio if proof else None,
        ratio=proof.ratio if proof else None,
        equal_greedy_share=proof.equal_greedy_share if proof else None,
        num_rows=proof.num_rows if proof else 0,
        num_label_tokens=proof.num_label_tokens if proof else 0,
        peak_host_bytes=written.peak_host_bytes,
        proof_peak_host_bytes=proof.peak_host_bytes if proof else None,
        warnings=written.warnings + _proof_warnings(proof, dtype=options.dtype, rounding=options.rounding),
    )


def _done_before(out: Path, made_of: dict[str, Any]) -> MergeResult | None:
    """The result of an earlier call for the same merge into `out`, if its files are complete and unchanged."""
    manifest = read_manifest(out) or {}
    if manifest.get("made_of") != made_of or verify_manifest(out):
        return None
    result = manifest["result"]
    return MergeResult(out=out, **result | {"warnings": tuple(result["warnings"])})


def _proof_warnings(proof: Proof | None, *, dtype: str, rounding: str) -> tuple[str, ...]:
    if proof is None:
        return ("the merge was not proved: no held-out rows were given",)
    if rounding == "nearest" and dtype != "fp32":
        lost = f"rounding to the nearest {dtype} changed the model by {proof.storage_ratio:.1%} of the adapter's effect"
        return (*proof.warnings, f"{lost}; merge.rounding: stochastic usually changes it less")
    return proof.warnings
