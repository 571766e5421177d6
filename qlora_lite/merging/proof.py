"""Prove that merged files compute what the adapter model computes, on the user's held-out rows, in fp32 arithmetic.

Five models are run one after the other, one weight in memory at a time (streamed.py):

    base      dequantized weights W
    adapter   W and a separate low-rank path:  y = W x + scale * scaling * B (A x)      <- what training computed
    merged    W + scale * scaling * B @ A, kept in fp32
    nearest   merged, rounded to the nearest value of the storage dtype
    stored    read back from the merged folder's files

Compared are log-probabilities [N, V] at the N label positions, by Frobenius norm, relative to the adapter's effect:

    effect           = |adapter - base|
    arithmetic_ratio = |merged - adapter| / effect     above 1% the merge is wrong: ProofFailed
    storage_ratio    = |stored - merged|  / effect     what 16-bit storing adds
    nearest_ratio    = |nearest - merged| / effect     what nearest rounding would have added
    ratio            = |stored - adapter| / effect     the user's number

Beside that every stored weight must be a neighbour of its merged value on the grid of the storage dtype, so files that
lack a module fail, however little it does on these rows. W is what training saw: rounded to its compute dtype, which a
live `Linear4bit` asked to compute in fp32 would not do (bitsandbytes dequantizes to the dtype of the input).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qlora_lite.base.source import load_config
from qlora_lite.device.numerics import exact_sums
from qlora_lite.errors import ModelError, ProofFailed, UserError
from qlora_lite.memory.anonymous import HostMemoryMeter
from qlora_lite.merging.checkpoint import Checkpoint, row_ranges, rows_and_width
from qlora_lite.merging.lora import Adapter, LoraFactors, tuned_norms
from qlora_lite.merging.streamed import StreamedDecoder
from qlora_lite.merging.write import open_pair, tuned_row_blocks
from qlora_lite.model.head import finish_logits

if TYPE_CHECKING:
    from qlora_lite.data.template import Encoded

VARIANTS = ("base", "adapter", "merged", "nearest", "stored")
MAX_ARITHMETIC_RATIO = 0.01
PROOF_TOKENS = 2500  # held-out rows of a proof by default: as many as have together about so many tokens
# Two fp32 forwards that sum in another order differ by about 1e-6 a log-probability; differences up to this (RMS over
# all log-probabilities) are no evidence of a wrong merge.
_FP32_NOISE = 1e-5
LOG_PROB_BYTES = 256 * 2**20  # log-probabilities held at once, all models together
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Proof:
    """Norms are over log-probabilities in nats; ratios are shares of `adapter_effect` (0.0 where that is 0)."""

    adapter_effect: float
    arithmetic_ratio: float
    storage_ratio: float
    nearest_ratio: float
    ratio: float
    equal_greedy_share: float  # label positions where stored and adapter model prefer the same token
    num_rows: int
    num_label_tokens: int
    peak_host_bytes: int | None  # anonymous memory above the start; None outside Linux
    warnings: tuple[str, ...]


def prove_merge(
    base_dir: Path | str,
    adapter_dir: Path | str,
    merged_dir: Path | str,
    encoded_rows: "Sequence[Encoded]",
    *,
    scale: float = 1.0,
    compute_dtype: str | None = "bf16",
    device: str = "cpu",
) -> Proof:
    """Compare the files of `merged_dir` with the adapter model; see the module's docstring for what and how.

    Memory: one weight and one block of the head in fp32, and what 4,096 tokens need in one layer. Raises ProofFailed when
    the merge is wrong or not finite, UserError where there are no rows.
    """
    if not encoded_rows:
        raise UserError(f"{merged_dir}: a merge is proved on held-out rows, and there are none")
    with HostMemoryMeter() as meter, torch.no_grad(), full_fp32():
        base, adapter = open_pair(base_dir, adapter_dir, compute_dtype=compute_dtype)
        models = Models(base, adapter, Checkpoint(merged_dir), config=plain_config(base), scale=scale, device=device)
        sums = models.distances(encoded_rows)
    num_label_tokens = sum(row.num_label_tokens for row in encoded_rows)
    return _judge(
        sums, merged_dir, num_rows=len(encoded_rows), num_tokens=num_label_tokens, peak_bytes=meter.peak_bytes
    )


class Models:
    """The five models: what each reads for a weight, and its last hidden states."""

    def __init__(
        self,
        base: Checkpoint,
        adapter: Adapter,
        merged: Checkpoint,
        *,
        config: PreTrainedConfig,
        scale: float,
        device: str,
    ) -> None:
        self.base, self.adapter, self.merged, self.scale, self.device = base, adapter, merged, scale, device
        for name in adapter.rows:
            config.vocab_size = adapter.shape_of(name, base.shape(name))[0]
        self.decoder = StreamedDecoder(config, device=device)
        embedding, head = f"{self.decoder.embedding}.weight", f"{self.decoder.head}.weight"
        self.head = head if head in base else embedding  # tied
        dtypes = {merged.dtype(name) for name in merged.names if adapter.changes(name)}
        self.stored_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        lacking = sorted(self.decoder.weights - set(base.names))
        if lacking:
            kind = base.config.get("model_type")
            raise ModelError(f"{base.folder}: {len(lacking)} weights of a {kind} model are missing, first {lacking[0]}")
        met = {*self.decoder.modules, *([] if self.head == embedding else [self.decoder.head])}
        unseen = {*adapter.factors, *(name.rpartition(".")[0] for name in (*adapter.whole, *adapter.rows))} - met
        if unseen:
            raise ProofFailed(f"the proof met no layer for {len(unseen)} adapter modules, first {min(unseen)}")
        missing = [name for name in base.names if name not in merged]
        if missing:
            raise ProofFailed(f"{merged.folder}: {len(missing)} tensors of the base are missing, first {missing[0]}")

    def distances(self, rows: "Sequence[Encoded]") -> dict[str, float]:
        """Squared distances between the models' log-probabilities at the labels of `rows`, and counts; see `compare`."""
        return self.compare({variant: self.predictors(variant, rows) for variant in VARIANTS})

    @property
    def vocabulary(self) -> int:
        """Tokens that the head knows, new ones included."""
        return self._shape(self.head)[0]

    def predictors(self, variant: str, rows: "Sequence[Encoded]") -> Tensor:
        """Last hidden states [N, D] of one model at the positions that predict a label: the one before each label."""
        with contextlib.ExitStack() as hooks:
            if variant == "adapter":
                hooks.enter_context(self._low_rank_path())
            if variant == "stored" and self.stored_dtype == torch.float16:
                hooks.enter_context(self._fp16_range())
            states = self.decoder.last_hidden_states([row.input_ids for row in rows], _Variant(self, variant))
        final = torch.cat([state[list(row.predictors)] for state, row in zip(states, rows, strict=True)])
        require_finite(final, variant, "the last hidden states")
        return final

    def compare(self, final: dict[str, Tensor]) -> dict[str, float]:
        """Squared distances between log-probabilities, summed over [N, V], and counts; a few positions at a time."""
        vocabulary = self.vocabulary
        num = final["base"].shape[0]
        step = max(1, LOG_PROB_BYTES // (4 * vocabulary * len(final)))
        pairs = {"effect": ("adapter", "base"), "arithmetic": ("merged", "adapter"), "storage": ("stored", "merged")}
        pairs |= {"nearest": ("nearest", "merged"), "total": ("stored", "adapter")}
        sums = dict.fromkeys([*pairs, "equal_greedy"], 0.0)
        for start in range(0, num, step):
            some = {variant: states[start : start + step] for variant, states in final.items()}
            logits = self.logits(some, vocabulary)
            for variant, values in logits.items():
                require_finite(values, variant, "the head")
            log_probs = {variant: values.log_softmax(-1) for variant, values in logits.items()}
            del logits
            for key, (left, right) in pairs.items():
                sums[key] += (log_probs[left] - log_probs[right]).square_().sum(dtype=torch.float64).item()
            same = log_probs["stored"].argmax(-1) == log_probs["adapter"].argmax(-1)
            sums["equal_greedy"] += float(same.sum())
        return sums | {"values": float(num * vocabulary), "positions": float(num)}

    def logits(self, hidden: dict[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
        """[n, V] of every model, the head's rows (tokens) read block by block."""
        count = next(iter(hidden.values())).shape[0]
        logits = {variant: torch.empty(count, vocabulary, device=self.device) for variant in hidden}
        start = 0
        for blocks in zip(*(self.row_blocks(self.head, variant) for variant in hidden), strict=True):
            stop = start + blocks[0].shape[0]
            for variant, block in zip(hidden, blocks, strict=True):
                logits[variant][:, start:stop] = hidden[variant] @ block.to(self.device).T
            start = stop
        factors = self.adapter.of_weight(self.head)
        if factors is not None and "adapter" in hidden:
            share_O = self._length_shares(self.decoder.head)
            logits["adapter"] = _adapted(logits["adapter"], hidden["adapter"], factors, share_O, self.scale)
        config = self.decoder.model.config
        return {variant: finish_logits(values, config) for variant, values in logits.items()}

    def row_blocks(self, name: str, variant: str) -> Iterator[Tensor]:
        """The values that one of the models has for a weight. Every weight of the merged files is checked on the way."""
        if variant == "stored":
            yield from self._aligned_stored(name)
        elif variant == "base":
            yield from self.base.row_blocks(name)
            if self._shape(name) != self.base.shape(name):
                yield self._mean_row(name).expand(self._shape(name)[0] - self.base.shape(name)[0], -1)
        elif variant == "adapter" and self.adapter.of_weight(name) is not None:
            yield from self.base.row_blocks(name)
        elif variant == "merged":
            for block, stored in zip(self._tuned(name), self._aligned_stored(name), strict=True):
                self.compare_weights(name, stored, block, exact=not self.adapter.changes(name))
                yield block
        elif variant == "nearest" and self.adapter.changes(name):
            yield from (block.to(self.stored_dtype).float() for block in self._tuned(name))
        else:
            yield from self._tuned(name)

    def rows(self, name: str, indices: Tensor, variant: str) -> Tensor:
        """Some rows of an embedding that is not quantized."""
        from_base, from_files = self._base_rows(name, indices), self.merged.rows(name, indices)
        tuned, whole, rows = from_base, self.adapter.whole.get(name), self.adapter.rows.get(name)
        if whole is not None:
            tuned = from_base.lerp(whole[indices].float(), self.scale)
        elif rows is not None:
            is_same_IN = indices[:, None] == rows.ids_N
            values_ID = rows.values_ND.float()[is_same_IN.int().argmax(1)]
            share_I = torch.where(indices < self.base.shape(name)[0], self.scale, 1.0)
            tuned = torch.where(is_same_IN.any(1)[:, None], from_base.lerp(values_ID, share_I[:, None]), from_base)
        is_changed = self.adapter.changes(name)
        if variant == "merged":
            self.compare_weights(name, from_files, tuned, exact=not is_changed)
        if variant == "nearest" and is_changed:
            return tuned.to(self.stored_dtype).float()
        return {"base": from_base, "stored": from_files}.get(variant, tuned)

    def _base_rows(self, name: str, indices: Tensor) -> Tensor:
        is_old = indices < self.base.shape(name)[0]
        if bool(is_old.all()):
            return self.base.rows(name, indices)
        found = self._mean_row(name).repeat(len(indices), 1)
        found[is_old] = self.base.rows(name, indices[is_old])
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.adapter.shape_of(name, self.base.shape(name))

    def _mean_row(self, name: str) -> Tensor:
        """What a new token's row is before training (model/new_tokens.py), [1, width]."""
        total = sum(block.sum(0, dtype=torch.float64) for block in self.base.row_blocks(name))
        assert isinstance(total, Tensor)
        return (total / self.base.shape(name)[0]).float()[None]

    def _tuned(self, name: str) -> Iterator[Tensor]:
        return tuned_row_blocks(self.base, self.adapter, name, self.scale)

    @contextlib.contextmanager
    def _low_rank_path(self) -> Iterator[None]:
        """Add B (A x) beside each adapted module."""
        with contextlib.ExitStack() as hooks:
            for name, module in self.decoder.modules.items():
                if name in self.adapter.factors:
                    factors, share_O = self.adapter.factors[name], self._length_shares(name)

                    def add(
                        module: nn.Module,
                        args: Any,
                        out: Tensor,
                        factors: LoraFactors = factors,
                        share_O: Tensor | None = share_O,
                    ) -> Tensor:
                        bias: Any = 0 if module.bias is None else module.bias
                        return _adapted(out - bias, args[0], factors, share_O, self.scale) + bias

                    hooks.callback(module.register_forward_hook(add).remove)
            yield

    def _length_shares(self, module: str) -> Tensor | None:
        """DoRA: by how much each row of W + B A is stretched, [out]; None for plain LoRA."""
        factors, norms, start = self.adapter.factors[module], [], 0
        if factors.magnitude_O is None:
            return None
        for block in self.base.row_blocks(f"{module}.weight"):
            norms.append(tuned_norms(block, factors, start=start))
            start += block.shape[0]
        return (factors.magnitude_O.float() / torch.cat(norms)).to(self.device)

    @contextlib.contextmanager
    def _fp16_range(self) -> Iterator[None]:
        """For a model stored in fp16: refuse one whose activations would overflow when it runs in fp16."""
        with contextlib.ExitStack() as hooks:
            for name, module in self.decoder.model.named_modules():

                def check(_: nn.Module, args: Any, out: Any, name: str = name) -> None:
                    value = out[0] if isinstance(out, tuple) else out
                    largest = float(value.abs().max()) if isinstance(value, Tensor) else 0.0
                    if not largest <= _FP16_MAX:
                        raise ProofFailed(
                            f"{name}: reaches {largest:.3g} on the held-out rows, and fp16 ends at {_FP16_MAX:.0f}; "
                            "try --set merge.dtype=bf16"
                        )

                hooks.callback(module.register_forward_hook(check).remove)
            yield

    def _aligned_stored(self, name: str) -> Iterator[Tensor]:
        """fp32 blocks of a merged tensor, cut as the base's blocks are; new rows come last, in one block."""
        if self.merged.shape(name) != self._shape(name):
            raise ProofFailed(
                f"{name}: {list(self.merged.shape(name))} in {self.merged.folder}, {list(self._shape(name))} after the adapter"
            )
        num_rows, width = rows_and_width(self._shape(name))
        num_old, _ = rows_and_width(self.base.shape(name))
        stored = self.merged.stored(name).reshape(num_rows, width)
        for start, stop in row_ranges(num_old, width):
            yield stored[start:stop].float()
        if num_rows > num_old:
            yield stored[num_old:].float()

    def compare_weights(self, name: str, stored: Tensor, merged: Tensor, *, exact: bool) -> None:
        """Every stored value is one of the two neighbours of its merged value (the very value for a copied tensor)."""
        if exact:
            wrong = stored != merged.to(self.merged.dtype(name)).float()
        else:
            step, smallest = {
                torch.bfloat16: (2**-7, 2**-133),
                torch.float16: (2**-10, 2**-24),
                torch.float32: (1e-6, 0.0),
            }[self.merged.dtype(name)]
            slack = 1e-6 * float(merged.abs().max())  # sums of other orders, where the GPU or thread count differs
            wrong = ~((stored - merged).abs() <= merged.abs() * step + (smallest + slack))
        if bool(wrong.any()):
            raise ProofFailed(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} values in {self.merged.folder} are not the merge of base and adapter"
            )


@dataclass(frozen=True)
class _Variant:
    """One model's weights, as the streamed decoder asks for them."""

    models: Models
    name: str

    def row_blocks(self, name: str) -> Iterator[Tensor]:
        return self.models.row_blocks(name, self.name)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        return self.models.rows(name, indices, self.name)


def _judge(
    sums: dict[str, float], merged_dir: Path | str, *, num_rows: int, num_tokens: int, peak_bytes: int | None
) -> Proof:
    effect = math.sqrt(sums["effect"])
    noise = _FP32_NOISE * math.sqrt(sums["values"])

    def share(key: str) -> float:
        return math.sqrt(sums[key]) / effect if effect else 0.0

    if math.sqrt(sums["arithmetic"]) > max(MAX_ARITHMETIC_RATIO * effect, noise):
        what = f"{share('arithmetic'):.1%} of the adapter's effect" if effect else "though the adapter does nothing"
        raise ProofFailed(
            f"{merged_dir}: the merged model is not the adapter model. On {num_tokens} label tokens of {num_rows} held-out "
            f"rows their log-probabilities differ by {math.sqrt(sums['arithmetic']):.3g} ({what}; at most 1% is allowed)"
        )
    warnings = []
    if effect <= noise / MAX_ARITHMETIC_RATIO:
        warnings.append(
            f"the adapter changes almost nothing on these {num_rows} rows (log-probabilities by {effect:.2g} in all), "
            "so the ratios say little"
        )
    return Proof(
        adapter_effect=effect,
        arithmetic_ratio=share("arithmetic"),
        storage_ratio=share("storage"),
        nearest_ratio=share("nearest"),
        ratio=share("total"),
        equal_greedy_share=sums["equal_greedy"] / sums["positions"],
        num_rows=num_rows,
        num_label_tokens=num_tokens,
        peak_host_bytes=peak_bytes,
        warnings=tuple(warnings),
    )


def plain_config(base: Checkpoint) -> PreTrainedConfig:
    """The model's config without quantization, its head tied or not as the files have it."""
    config = load_config(base.folder)
    config.tie_word_embeddings = base.config.get("tie_word_embeddings", config.tie_word_embeddings)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _adapted(plain: Tensor, x: Tensor, factors: LoraFactors, share_O: Tensor | None, scale: float) -> Tensor:
    """What the adapter makes of a layer's product `plain` = W x; `share_O` is DoRA's."""
    if share_O is None:
        return plain + _low_rank(x, factors, scale)
    return plain + scale * (share_O * (plain + _low_rank(x, factors, 1.0)) - plain)


def _low_rank(x: Tensor, factors: LoraFactors, scale: float) -> Tensor:
    a_RI, b_OR = (factor.to(x.device, torch.float32) for factor in (factors.a_RI, factors.b_OR))
    return (x @ a_RI.T) @ b_OR.T * (scale * factors.scaling)


def require_finite(values: Tensor, variant: str, where: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ProofFailed(f"{where}: {variant} model's values are not finite on the held-out rows")


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """fp32 products without TF32 or bf16 inside, whatever training set; put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with exact_sums():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
