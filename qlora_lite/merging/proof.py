"""Prove that merged files compute the same as the adapter model, on the user's held-out rows, in fp32 arithmetic.

Five models run one after the other, one weight in memory at a time (streamed.py):

    base      dequantized weights W
    adapter   W and a separate low-rank path:  y = W x + scale * scaling * B (A x)      <- as in training
    merged    W + scale * scaling * B @ A, kept in fp32
    nearest   merged, rounded to the nearest value of the storage dtype
    stored    read back from the merged folder's files

The comparison is of log-probabilities [N, V] at the N label positions, by Frobenius norm, relative to the adapter's effect:

    effect           = |adapter - base|
    arithmetic_ratio = |merged - adapter| / effect     above 1% the merge is wrong: ProofFailed
    storage_ratio    = |stored - merged|  / effect     added by 16-bit storage
    nearest_ratio    = |nearest - merged| / effect     would be added by nearest rounding
    ratio            = |stored - adapter| / effect     the total for the user

In addition, every stored weight must be a neighbour of its merged value on the grid of the storage dtype, so files without a module
fail, however small its effect on these rows. W has the values of training, rounded to the compute dtype; a live `Linear4bit` in fp32
would not round them (bitsandbytes dequantizes to the dtype of the input).
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
PROOF_TOKENS = 2500  # total tokens of a proof's held-out rows by default, approximately
# Two fp32 forward passes with another order of sums differ by about 1e-6 per log-probability; differences up to this
# (RMS over all log-probabilities) are not evidence of a wrong merge.
_FP32_NOISE = 1e-5
LOG_PROB_BYTES = 256 * 2**20  # log-probabilities in memory at once, of all models
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Proof:
    """Norms are over log-probabilities in nats; ratios are shares of `adapter_effect` (0.0 where that is 0)."""

    adapter_effect: float
    arithmetic_ratio: float
    storage_ratio: float
    nearest_ratio: float
    ratio: float
    equal_greedy_share: float  # share of label positions where stored and adapter model prefer the same token
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
    """Compare the files of `merged_dir` with the adapter model, as described in the module's docstring.

    Memory: one weight and one block of the head in fp32, and the activations of 4,096 tokens in one layer. Raises ProofFailed when the
    merge is wrong or not finite, UserError without rows.
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
    """The five models: their values of each weight, and their last hidden states."""

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
        layers = {*self.decoder.modules, *([] if self.head == embedding else [self.decoder.head])}
        unseen = {*adapter.factors, *(name.rpartition(".")[0] for name in (*adapter.whole, *adapter.rows))} - layers
        if unseen:
            raise ProofFailed(f"the model has no layer for {len(unseen)} adapter modules, first {min(unseen)}")
        missing = [name for name in base.names if name not in merged]
        if missing:
            raise ProofFailed(f"{merged.folder}: {len(missing)} tensors of the base are missing, first {missing[0]}")

    def distances(self, rows: "Sequence[Encoded]") -> dict[str, float]:
        """Squared distances between the models' log-probabilities at the labels of `rows`, and counts; see `compare`."""
        return self.compare({variant: self.predictors(variant, rows) for variant in VARIANTS})

    @property
    def vocabulary(self) -> int:
        """Number of the head's rows (tokens), including new ones."""
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
        """Squared distances between log-probabilities, summed over [N, V], and counts; computed a few positions at a time."""
        vocabulary = self.vocabulary
        num = final["base"].shape[0]
        step = max(1, LOG_PROB_BYTES // (4 * vocabulary * len(final)))
        pairs = {"effect": ("adapter", "base"), "arithmetic": ("merged", "adapter"), "storage": ("stored", "merged")}
        pairs |= {"nearest": ("nearest", "merged"), "total": ("stored", "adapter")}
        sums = dict.fromkeys([*pairs, "equal_greedy"], 0.0)
        for start in range(0, num, step):
            hidden = {variant: states[start : start + step] for variant, states in final.items()}
            logits = self.logits(hidden, vocabulary)
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
        """Logits [n, V] of every model; the head's rows (tokens) are read block by block."""
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
        """Yield the values of a weight in one of the models; for "merged", also check the weight in the merged files."""
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
        """Rows of an unquantized embedding in one of the models."""
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
        rows = self._mean_row(name).repeat(len(indices), 1)
        rows[is_old] = self.base.rows(name, indices[is_old])
        return rows

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.adapter.shape_of(name, self.base.shape(name))

    def _mean_row(self, name: str) -> Tensor:
        """The row of a new token before training (model/new_tokens.py), [1, width]."""
        total = sum(block.sum(0, dtype=torch.float64) for block in self.base.row_blocks(name))
        assert isinstance(total, Tensor)
        return (total / self.base.shape(name)[0]).float()[None]

    def _tuned(self, name: str) -> Iterator[Tensor]:
        return tuned_row_blocks(self.base, self.adapter, name, self.scale)

    @contextlib.contextmanager
    def _low_rank_path(self) -> Iterator[None]:
        """Inside, add B (A x) to the output of each adapted module."""
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
        """DoRA's scale of each row of W + B A, [out]; None for plain LoRA."""
        factors, norms, start = self.adapter.factors[module], [], 0
        if factors.magnitude_O is None:
            return None
        for block in self.base.row_blocks(f"{module}.weight"):
            norms.append(tuned_norms(block, factors, start=start))
            start += block.shape[0]
        return (factors.magnitude_O.float() / torch.cat(norms)).to(self.device)

    @contextlib.contextmanager
    def _fp16_range(self) -> Iterator[None]:
        """Inside, raise ProofFailed when activations of a model stored in fp16 would overflow in fp16."""
        with contextlib.ExitStack() as hooks:
            for name, module in self.decoder.model.named_modules():

                def check(_: nn.Module, args: Any, out: Any, name: str = name) -> None:
                    value = out[0] if isinstance(out, tuple) else out
                    largest = float(value.abs().max()) if isinstance(value, Tensor) else 0.0
                    if not largest <= _FP16_MAX:
                        raise ProofFailed(
                            f"{name}: reaches {largest:.3g} on the held-out rows, above fp16's limit of {_FP16_MAX:.0f}; "
                            "try --set merge.dtype=bf16"
                        )

                hooks.callback(module.register_forward_hook(check).remove)
            yield

    def _aligned_stored(self, name: str) -> Iterator[Tensor]:
        """Yield fp32 blocks of a merged tensor, cut like the base's blocks; new rows come last, in one block."""
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
        """Check that every stored value is one of the two neighbours of its merged value (the same value for a copied tensor)."""
        if exact:
            wrong = stored != merged.to(self.merged.dtype(name)).float()
        else:
            step, smallest = {
                torch.bfloat16: (2**-7, 2**-133),
                torch.float16: (2**-10, 2**-24),
                torch.float32: (1e-6, 0.0),
            }[self.merged.dtype(name)]
            slack = 1e-6 * float(merged.abs().max())  # for another order of sums, with another GPU or thread count
            wrong = ~((stored - merged).abs() <= merged.abs() * step + (smallest + slack))
        if bool(wrong.any()):
            raise ProofFailed(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} values in {self.merged.folder} are not the merge of base and adapter"
            )


@dataclass(frozen=True)
class _Variant:
    """The weights of one model, for the streamed decoder."""

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
        relative = (
            f"{share('arithmetic'):.1%} of the adapter's effect" if effect else "though the adapter has no effect"
        )
        raise ProofFailed(
            f"{merged_dir}: the merged model is not the adapter model. On {num_tokens} label tokens of {num_rows} held-out "
            f"rows their log-probabilities differ by {math.sqrt(sums['arithmetic']):.3g} ({relative}; at most 1% is allowed)"
        )
    warnings = []
    if effect <= noise / MAX_ARITHMETIC_RATIO:
        warnings.append(
            f"the adapter changes almost nothing on these {num_rows} rows (log-probabilities by {effect:.2g} in total), "
            "so the ratios mean little"
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
    """The model's config without quantization, its head tied as in the files."""
    config = load_config(base.folder)
    config.tie_word_embeddings = base.config.get("tie_word_embeddings", config.tie_word_embeddings)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _adapted(plain: Tensor, x: Tensor, factors: LoraFactors, share_O: Tensor | None, scale: float) -> Tensor:
    """The adapted output of a layer, from its product `plain` = W x; `share_O` is DoRA's row scale."""
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
    """Inside, compute fp32 products without TF32 or bf16; restore the settings afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with exact_sums():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
