"""Prove that merged files compute what the adapter model computes, on the user's held-out rows, in fp32 arithmetic.

Five models walk through the layers side by side, one decoder layer in memory at a time:

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

Left out: models other than those of `SUPPORTED` (others scale embeddings, cap logits or mix attention masks).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lite.errors import ProofFailed, UserError
from qlora_lite.merge.checkpoint import Checkpoint
from qlora_lite.merge.lora import LoraFactors
from qlora_lite.merge.memory import HostMemoryMeter
from qlora_lite.merge.write import merged_row_blocks, open_pair

if TYPE_CHECKING:
    from qlora_lite.data.template import Encoded

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
MAX_ARITHMETIC_RATIO = 0.01
# Two fp32 forwards that sum in another order differ by about 1e-6 a log-probability; differences up to this (RMS over
# all log-probabilities) are no evidence of a wrong merge.
_FP32_NOISE = 1e-5
_LOG_PROB_BYTES = 256 * 2**20  # log-probabilities held at once, all models together
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
    compute_dtype: str = "bf16",
    device: str = "cpu",
) -> Proof:
    """Compare the files of `merged_dir` with the adapter model; see the module's docstring for what and how.

    Memory: one decoder layer and one block of the head in fp32, and 5 hidden states of every token. Raises ProofFailed
    when the merge is wrong or not finite, UserError for a kind of model or rows that it cannot compare.
    """
    if not encoded_rows:
        raise UserError(f"{merged_dir}: a merge is proved on held-out rows, and there are none")
    with HostMemoryMeter() as meter, torch.no_grad(), _full_fp32():
        base, adapter = open_pair(base_dir, adapter_dir, compute_dtype=compute_dtype)
        walk = _Walk(base, adapter, Checkpoint(merged_dir), scale=scale, device=device)
        hidden = walk.embed([row.input_ids for row in encoded_rows])
        for index in range(walk.num_layers):
            walk.run_layer(index, hidden)
        final = walk.predictors(hidden, [row.predictors for row in encoded_rows])
        sums = walk.compare(final)
    num_label_tokens = sum(row.num_label_tokens for row in encoded_rows)
    return _judge(
        sums, merged_dir, num_rows=len(encoded_rows), num_tokens=num_label_tokens, peak_bytes=meter.peak_bytes
    )


class _Walk:
    """The models side by side. Hidden states are `{variant: [one [1, T, D] fp32 tensor a row]}`."""

    def __init__(
        self,
        base: Checkpoint,
        adapter: Mapping[str, LoraFactors],
        merged: Checkpoint,
        *,
        scale: float,
        device: str,
    ) -> None:
        self.base, self.adapter, self.merged, self.scale, self.device = base, adapter, merged, scale, device
        config = _plain_config(base)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.decoder = model.get_decoder()
        self.rotary = type(self.decoder.rotary_emb)(config).to(device)
        self.window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self.num_layers = len(self.decoder.layers)
        self.embedding = f"{self.names[id(model.get_input_embeddings())]}.weight"
        head = f"{self.names[id(model.get_output_embeddings())]}.weight"
        self.head = head if head in base else self.embedding  # tied
        dtypes = {merged.dtype(f"{module}.weight") for module in adapter if f"{module}.weight" in merged}
        self.stored_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        self.unseen = set(adapter)  # modules that no step of the walk has met
        missing = [name for name in base.names if name not in merged]
        if missing:
            raise ProofFailed(f"{merged.folder}: {len(missing)} tensors of the base are missing, first {missing[0]}")

    def embed(self, rows: Sequence[Sequence[int]]) -> dict[str, list[Tensor]]:
        longest = max(len(row) for row in rows)
        if self.window is not None and longest > self.window:
            raise UserError(
                f"the proof knows plain causal attention; a row of {longest} tokens leaves the sliding "
                f"window of {self.window}: give it shorter rows"
            )
        ids = [torch.tensor(row) for row in rows]
        from_base = [self.base.stored(self.embedding)[row].float().to(self.device)[None] for row in ids]
        from_files = [self.merged.stored(self.embedding)[row].float().to(self.device)[None] for row in ids]
        return {variant: list(from_base) for variant in ("base", "adapter", "merged", "nearest")} | {
            "stored": from_files
        }

    def run_layer(self, index: int, hidden: dict[str, list[Tensor]]) -> None:
        """Advance every model through one layer; the layer's weights exist only in here."""
        layer = self.decoder.layers[index]
        prefix = self.names[id(layer)]
        assert not list(layer.buffers()), f"{prefix}: buffers cannot be rebuilt from files"
        layer.to_empty(device=self.device).eval().requires_grad_(False)
        weights = {f"{prefix}.{name}": parameter for name, parameter in layer.named_parameters()}
        adapted = {name: self.adapter[name.removesuffix(".weight")] for name in weights if self._has_adapter(name)}
        self.unseen -= {name.removesuffix(".weight") for name in adapted}
        for name, weight in weights.items():
            _fill(weight, self.base.row_blocks(name))
        self._run(layer, prefix, hidden["base"])
        with self._low_rank_path(layer, prefix):
            self._run(layer, prefix, hidden["adapter"])
        for name, factors in adapted.items():
            _fill(weights[name], merged_row_blocks(self.base, name, factors, self.scale))
        self._run(layer, prefix, hidden["merged"])
        for name, weight in weights.items():
            self._check_stored(name, weight, exact=name not in adapted)
            if name in adapted:
                weight.copy_(weight.to(self.stored_dtype))
        self._run(layer, prefix, hidden["nearest"])
        for name, weight in weights.items():
            _fill(weight, self.merged.row_blocks(name))
        with self._fp16_range(layer, prefix):
            self._run(layer, prefix, hidden["stored"])
        layer.to("meta")

    def predictors(self, hidden: dict[str, list[Tensor]], predictors: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Normed hidden states [N, D] of the positions that predict a label: the one before each label."""
        norm = self.decoder.norm.to_empty(device=self.device)
        prefix = self.names[id(norm)]
        final = {}
        for variant, states in hidden.items():
            for name, weight in norm.named_parameters():
                source = self.merged if variant == "stored" else self.base
                _fill(weight, source.row_blocks(f"{prefix}.{name}"))
            rows = [state[0, list(positions)] for state, positions in zip(states, predictors, strict=True)]
            final[variant] = norm(torch.cat(rows))
        return final

    def compare(self, final: dict[str, Tensor]) -> dict[str, float]:
        """Squared distances between log-probabilities, summed over [N, V], and counts; a few positions at a time."""
        vocabulary = self.base.shape(self.head)[0]
        num = final["base"].shape[0]
        step = max(1, _LOG_PROB_BYTES // (4 * vocabulary * len(final)))
        pairs = {"effect": ("adapter", "base"), "arithmetic": ("merged", "adapter"), "storage": ("stored", "merged")}
        pairs |= {"nearest": ("nearest", "merged"), "total": ("stored", "adapter")}
        sums = dict.fromkeys([*pairs, "equal_greedy"], 0.0)
        for start in range(0, num, step):
            some = {variant: states[start : start + step] for variant, states in final.items()}
            logits = self._logits(some, vocabulary)
            for variant, values in logits.items():
                _require_finite(values, variant, "the head")
            log_probs = {variant: values.log_softmax(-1) for variant, values in logits.items()}
            del logits
            for key, (left, right) in pairs.items():
                sums[key] += (log_probs[left] - log_probs[right]).square_().sum(dtype=torch.float64).item()
            same = log_probs["stored"].argmax(-1) == log_probs["adapter"].argmax(-1)
            sums["equal_greedy"] += float(same.sum())
        if self.unseen:
            raise ProofFailed(
                f"the proof met no layer for {len(self.unseen)} adapter modules, first {min(self.unseen)}"
            )
        return sums | {"values": float(num * vocabulary), "positions": float(num)}

    def _logits(self, hidden: dict[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
        """[n, V] of every model, the head's rows (tokens) read block by block."""
        count = next(iter(hidden.values())).shape[0]
        logits = {variant: torch.empty(count, vocabulary, device=self.device) for variant in hidden}
        factors = self.adapter.get(self.head.removesuffix(".weight")) if self.head != self.embedding else None
        if factors is not None:
            self.unseen.discard(self.head.removesuffix(".weight"))
        merged = (
            self.base.row_blocks(self.head)
            if factors is None
            else merged_row_blocks(self.base, self.head, factors, self.scale)
        )
        start = 0
        for plain, kept, stored in zip(
            self.base.row_blocks(self.head), merged, self._aligned_stored(self.head), strict=True
        ):
            self._compare_weights(self.head, stored, kept, exact=factors is None)
            stop = start + plain.shape[0]
            rounded = kept if factors is None else kept.to(self.stored_dtype).float()
            of = {"base": plain, "adapter": plain, "merged": kept, "nearest": rounded, "stored": stored}
            for variant, states in hidden.items():
                logits[variant][:, start:stop] = states @ of[variant].to(self.device).T
            start = stop
        if factors is not None:
            logits["adapter"] += _low_rank(hidden["adapter"], factors, self.scale)
        return logits

    def _run(self, layer: nn.Module, prefix: str, states: list[Tensor]) -> None:
        for i, state in enumerate(states):
            position_ids = torch.arange(state.shape[1], device=self.device)[None]
            rotary = self.rotary(state, position_ids)
            out = layer(state, attention_mask=None, position_ids=position_ids, position_embeddings=rotary)
            states[i] = out[0] if isinstance(out, tuple) else out
            _require_finite(states[i], "a", prefix)

    def _has_adapter(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.adapter

    @contextlib.contextmanager
    def _low_rank_path(self, layer: nn.Module, prefix: str) -> Iterator[None]:
        """Add B (A x) beside each adapted module of `layer`."""
        with contextlib.ExitStack() as hooks:
            for name, module in layer.named_modules():
                factors = self.adapter.get(f"{prefix}.{name}")
                if factors is not None:

                    def add(_: nn.Module, args: Any, out: Tensor, factors: LoraFactors = factors) -> Tensor:
                        return out + _low_rank(args[0], factors, self.scale)

                    hooks.callback(module.register_forward_hook(add).remove)
            yield

    @contextlib.contextmanager
    def _fp16_range(self, layer: nn.Module, prefix: str) -> Iterator[None]:
        """For a model stored in fp16: refuse one whose activations would overflow when it runs in fp16."""
        with contextlib.ExitStack() as hooks:
            for name, module in layer.named_modules() if self.stored_dtype == torch.float16 else ():

                def check(_: nn.Module, args: Any, out: Any, name: str = name) -> None:
                    value = out[0] if isinstance(out, tuple) else out
                    largest = float(value.abs().max())
                    if not largest <= _FP16_MAX:
                        where = f"{prefix}.{name}".rstrip(".")
                        raise ProofFailed(
                            f"{where}: reaches {largest:.3g} on the held-out rows, and fp16 ends at {_FP16_MAX:.0f}; "
                            "try --set merge.dtype=bf16"
                        )

                hooks.callback(module.register_forward_hook(check).remove)
            yield

    def _check_stored(self, name: str, merged: Tensor, *, exact: bool) -> None:
        start = 0
        merged = merged.reshape(merged.shape[0], -1)
        for stored in self._aligned_stored(name):
            stop = start + stored.shape[0]
            self._compare_weights(name, stored, merged[start:stop].cpu(), exact=exact)
            start = stop

    def _aligned_stored(self, name: str) -> Iterator[Tensor]:
        """fp32 blocks of a merged tensor, cut as the base's blocks are."""
        if self.merged.shape(name) != self.base.shape(name):
            raise ProofFailed(
                f"{name}: {list(self.merged.shape(name))} in {self.merged.folder}, {list(self.base.shape(name))} in the base"
            )
        yield from self.merged.row_blocks(name)

    def _compare_weights(self, name: str, stored: Tensor, merged: Tensor, *, exact: bool) -> None:
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
        count = int(wrong.sum())
        if count:
            raise ProofFailed(
                f"{name}: {count} of {wrong.numel()} values in {self.merged.folder} are not the merge of base and adapter"
            )


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


def _plain_config(base: Checkpoint) -> Any:
    """The model's config without quantization; UserError for a kind of model that the walk does not know."""
    kind = base.config.get("model_type")
    if kind not in SUPPORTED:
        raise UserError(f"{base.folder}: a merge can be proved for {', '.join(SUPPORTED)}; this model is {kind!r}")
    values = {key: value for key, value in base.config.items() if key not in ("quantization_config", "model_type")}
    return AutoConfig.for_model(kind, **values)


def _fill(weight: Tensor, blocks: Iterator[Tensor]) -> None:
    rows = weight.view(weight.shape[0], -1)
    start = 0
    for block in blocks:
        rows[start : start + block.shape[0]] = block.to(weight.device)
        start += block.shape[0]
    assert start == rows.shape[0]


def _low_rank(x: Tensor, factors: LoraFactors, scale: float) -> Tensor:
    a_RI, b_OR = (factor.to(x.device, torch.float32) for factor in (factors.a_RI, factors.b_OR))
    return (x @ a_RI.T) @ b_OR.T * (scale * factors.scaling)


def _require_finite(values: Tensor, variant: str, where: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ProofFailed(f"{where}: {variant} model's values are not finite on the held-out rows")


@contextlib.contextmanager
def _full_fp32() -> Iterator[None]:
    """fp32 products without TF32 or bf16 inside, whatever training set; put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
