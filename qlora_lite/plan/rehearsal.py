"""The memory of a training step, rehearsed: training's own code runs on the meta device, inside a ledger.

In: a transformers config and settings. Out: `Rehearsal`: bytes by part at the peak of each phase. No weights, no arithmetic.

    weights           frozen weights (with full: trained ones), buffers           workspace   temporaries of the update, and internal
    quant_constants   scales and tables of quantized weights                                  allocations of operators
    adapter           trained tensors beside the base                             runtime     allocations of the device's libraries
    gradients, optimizer   of the trained tensors                                 logits      the head's chunk
    activations       made by the forward pass and kept                           recompute   made by the backward pass

Layers repeat, so a deep model is rehearsed at two depths, two and three layers, or one and two periods of its layer pattern (plus the
remainder), and every part of every phase is extrapolated on a line: exact, because each period adds the same storages. If a recipe
names modules of single layers, every layer is rehearsed.
On meta, attention would be decomposed; `attention_on` substitutes the operator of the planned device.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import lcm
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_lite.base.quantization import Quantization
from qlora_lite.data.batches import Batch
from qlora_lite.device.card import COMMON_CARD, Card
from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import A_FACTOR, B_FACTOR, is_of_adapter
from qlora_lite.foreign import foreign, is_of_our_code
from qlora_lite.memory.ledger import (
    HOST_CONSTANTS,
    HOST_INPUTS,
    HOST_WEIGHTS,
    ON_HOST,
    PAGED,
    PHASES,
    Ledger,
    count_as_after,
    counted_as,
)
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.dora import Dora
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.head import CHUNK
from qlora_lite.model.meta import meta_model
from qlora_lite.model.new_tokens import make_room
from qlora_lite.model.policy import PLAIN, LayerInputs, Policy, kept_inputs, most_kept
from qlora_lite.model.resident import residents
from qlora_lite.model.trained import make_trainable
from qlora_lite.model.tree_attention import NO_PARENT
from qlora_lite.model.tuned_linear import TunedLinear
from qlora_lite.plan.workspace import workspace_of
from qlora_lite.training.footprint import Footprint, apply_footprint
from qlora_lite.training.optimizer import make_optimizer
from qlora_lite.training.step import Observer, forward_backward, update

PARTS = ("weights", "quant_constants", "adapter", "gradients", "optimizer", "activations", "recompute", "logits",
         "workspace", "runtime")  # fmt: skip
NF4 = Quantization("nf4")
_STREAMED = {HOST_WEIGHTS: "weights", HOST_CONSTANTS: "quant_constants"}  # part on the host -> part on the device
_EMBEDDING = "embedding"  # allocations after the gradient of the embeddings, when weights are trained
_STRETCHES = {**PHASES, _EMBEDDING: "end of backward"}
_UPDATE = next(name for name, phase in PHASES.items() if phase == "update")
Phases = dict[str, dict[str, int]]  # bytes by part at the peak of each phase


@dataclass(frozen=True)
class Settings:
    """The settings that memory depends on."""

    method: str = "qlora"  # qlora, lora or full
    quantization: Quantization = NF4  # of qlora
    card: Card = COMMON_CARD
    compute: torch.dtype = torch.bfloat16
    factors: torch.dtype = torch.bfloat16
    r: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()  # data.special_tokens: embedding rows to train, or to add
    optimizer: str = "paged_adamw_8bit"
    checkpoint_every: int = 1  # n: every n-th layer is checkpointed; 0: none
    head_chunk: int = CHUNK
    policy: Policy = PLAIN  # where parts of the model wait; not plain: every layer is checkpointed
    num_threads: int = 1  # of the CPU, where attention allocates a block of scores per thread
    runtime_bytes: int | None = None  # allocator memory of the device's libraries; None: the card's default


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a step: `num_examples` of `length` tokens in one packed sequence, `label_share` of all tokens labelled.

    The first `trunk` tokens are shared by all examples and packed once.
    """

    length: int
    num_examples: int = 1
    label_share: float = 0.1
    is_first: bool = False  # otherwise gradients of earlier micro-batches are in memory
    trunk: int = 0

    def __post_init__(self) -> None:
        assert self.num_examples >= 1 and 0 <= self.trunk < self.length, self

    def shortened(self, length: int) -> "MicroBatch":
        """Return the micro-batch with examples of at most `length` tokens, trunk and branches cut by the same factor."""
        if length >= self.length:
            return self
        return replace(self, length=length, trunk=self.trunk * length // self.length)

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed sequence."""
        return self.trunk + self.num_examples * (self.length - self.trunk)


@dataclass(frozen=True)
class Rehearsal:
    """Bytes by part at the peak of each stretch of a step."""

    stretches: Phases  # the end of backward is separate: it grows differently with the length
    num_weights: int
    num_trained: int
    num_in_factors: int  # trained weights that grow with the rank
    host_parts: dict[str, int]  # bytes in host memory, by part, at its highest sum

    @cached_property
    def phases(self) -> Phases:
        """Parts by phase (forward, head, backward, update, and evaluate if planned), at the highest stretch of each."""
        phases: Phases = {}
        for stretch, parts in self.stretches.items():
            phase = "backward" if stretch == _STRETCHES[_EMBEDDING] else stretch
            if phase not in phases or sum(parts.values()) > sum(phases[phase].values()):
                phases[phase] = parts
        return phases

    @property
    def phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """All PARTS at the highest peak; they sum to `peak_bytes`."""
        return {part: self.phases[self.phase].get(part, 0) for part in PARTS}

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """The peak in host memory."""
        return sum(self.host_parts.values())

    @property
    def homes_bytes(self) -> int:
        """The peak in host memory without paged optimizer state, which is there only when the card is full."""
        return self.host_bytes - self.host_parts.get(PAGED, 0)


class Stage:
    """A place to rehearse any number of steps of one model with one choice of settings.

    `bodies` returns the model of a config and settings, perhaps shared with other stages. Raises ModelError for an invalid config, also
    when its model fails to run: configs come from other people, and transformers checks many values only then.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        settings: Settings,
        bodies: "Callable[[PreTrainedConfig, Settings], Body] | None" = None,
    ) -> None:
        self._config = config
        self._settings = settings
        depth, period = config.num_hidden_layers, lcm(layer_period(config), settings.checkpoint_every or 1)
        streams = settings.policy.resident_layers is not None  # two streamed layers are in memory at once
        counts = ((2, 3) if streams else (1, 2)) if period > 1 else ((3, 4) if streams else (2, 3))
        shallow, deep = (count * period + depth % period for count in counts)
        is_uniform = not names_layers(settings)
        self._times = (depth - shallow) // period if depth > deep and is_uniform else 0
        self._period = period
        depths = (shallow, deep) if self._times else (depth,)
        configs = [with_depth(config, layers) for layers in depths]
        if self._times and not settings.policy.is_plain:  # what is not linear in the depth is counted
            settings = replace(settings, policy=_linear(settings.policy))
        self._scenes = [Scene(shallow, settings, (bodies or Body)(shallow, settings)) for shallow in configs]

    def rehearse(self, batch: MicroBatch) -> Rehearsal:
        """Rehearse one optimizer step whose largest micro-batch is `batch`."""
        with running(self._config):
            rehearsals = [scene.rehearse(batch) for scene in self._scenes]
        if not self._times:
            return rehearsals[0]
        low, high = rehearsals
        of_layer = {
            part: (high.host_parts.get(part, 0) - low.host_parts.get(part, 0)) // self._period for part in _STREAMED
        }
        return self._counted(_continued(low, high, times=self._times), batch, of_layer)

    def _bytes_of_states(self, num_tokens: int) -> int:
        """Bytes of the hidden states of some tokens."""
        num_bytes = num_tokens * self._config.hidden_size * self._settings.compute.itemsize
        round_to = self._settings.card.round_to
        return -(-num_bytes // round_to) * round_to

    def _counted(self, rehearsal: Rehearsal, batch: MicroBatch, of_layer: Mapping[str, int]) -> Rehearsal:
        """Apply what is not linear in the depth: the fewest layer inputs, and the number of resident layers."""
        policy, depth = self._settings.policy, self._config.num_hidden_layers
        host, stretches = dict(rehearsal.host_parts), {name: dict(parts) for name, parts in rehearsal.stretches.items()}
        if policy.keeps_fewest:
            kept, most = kept_inputs(depth), most_kept(depth)
            num_bytes = self._bytes_of_states(batch.num_tokens)
            if policy.inputs_home == "host":
                host[HOST_INPUTS] -= (depth - most.num_inputs) * num_bytes
            else:
                # At the end of the forward pass the last layer's input is in memory too.
                stretches["forward"]["activations"] -= (depth - len(kept) - ((depth - 1) not in kept)) * num_bytes
                stretches["head"]["activations"] -= (depth - len(kept)) * num_bytes
                stretches["backward"]["activations"] -= (depth - most.num_inputs + most.num_recomputed) * num_bytes
                stretches["backward"]["recompute"] += most.num_recomputed * num_bytes
        for part, num_bytes in of_layer.items() if policy.resident_layers else ():
            resident = min(policy.resident_layers or 0, depth) * num_bytes
            host[part] = host.get(part, 0) - resident
            for parts in stretches.values():
                parts[_STREAMED[part]] = parts.get(_STREAMED[part], 0) + resident
        return replace(rehearsal, stretches=stretches, host_parts={part: size for part, size in host.items() if size})

    def rehearse_shallow(self, batch: MicroBatch) -> Rehearsal:
        """Rehearse with few layers only, for differences that are independent of the depth."""
        with running(self._config):
            return self._scenes[0].rehearse(batch)

    def rehearse_phases(self, act: "Callable[[Scene], Phases]") -> Phases:
        """Rehearse `act`, a function of a scene, and return its phases at full depth."""
        with running(self._config):
            phases = [scene.act(act) for scene in self._scenes]
        if not self._times:
            return phases[0]
        whole = _phases_continued(*phases, times=self._times)
        for part, device_part in _STREAMED.items() if self._settings.policy.resident_layers else ():
            low, high = (scene.host_bytes(part) for scene in self._scenes)
            resident = min(self._settings.policy.resident_layers or 0, self._config.num_hidden_layers)
            for parts in whole.values():
                parts[device_part] = parts.get(device_part, 0) + resident * (high - low) // self._period
        return whole


def names_layers(settings: Settings) -> bool:
    """Whether settings name layers by number: then trained modules differ between layers, and a few layers do not represent all."""
    targets = settings.target_modules
    names = (*settings.modules_to_save, *((targets,) if isinstance(targets, str) else targets))
    return settings.method != "full" and any(part.isdigit() for name in names for part in name.split("."))


def running(config: PreTrainedConfig) -> AbstractContextManager[None]:
    """Context manager: convert any error of a model of `config` to ModelError. Errors of our own code pass unchanged."""
    name = Path(config.name_or_path).name or str(config.model_type)
    return foreign(
        lambda said: ModelError(f"{name}: config.json: a model with these values does not run ({said})"),
        passes=is_of_our_code,
    )


class Body:
    """A model on meta with its trained parameters, shared by all settings with equal `of_body`.

    Reports gradients to `ledger`, which belongs to the current scene.
    """

    def __init__(self, config: PreTrainedConfig, settings: Settings) -> None:
        self.model = _model(config, settings)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.num_in_factors = sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if A_FACTOR in name or B_FACTOR in name
        )
        self.ledger: Ledger | None = None
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._hold_gradient)
        decoder = causal_lm(self.model).get_decoder()
        decoder.register_forward_hook(lambda module, args, out: count_as_after(out.last_hidden_state, "recompute"))
        embedding = causal_lm(self.model).get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: count_as_after(out, _EMBEDDING))

    def _hold_gradient(self, parameter: torch.Tensor) -> None:
        assert self.ledger is not None and parameter.grad is not None
        self.ledger.hold("gradients", parameter.grad)


def of_body(settings: Settings) -> Settings:
    """Return the settings that determine a model; those that only change a step have their defaults."""
    default = Settings()
    return replace(
        settings,
        card=default.card,
        optimizer=default.optimizer,
        checkpoint_every=default.checkpoint_every,
        policy=default.policy,
        head_chunk=default.head_chunk,
        num_threads=default.num_threads,
        runtime_bytes=default.runtime_bytes,
    )


class Scene:
    """Like `Stage`, but rehearses every layer of the model."""

    def __init__(self, config: PreTrainedConfig, settings: Settings, body: Body | None = None) -> None:
        self._settings = settings
        self._body = body or Body(config, settings)
        self.model = self._body.model
        self.ledger = ledger = Ledger(
            card=settings.card,
            workspace=workspace_of(settings.card, num_threads=settings.num_threads),
        )
        runtime = settings.card.runtime_bytes if settings.runtime_bytes is None else settings.runtime_bytes
        self._runtime = torch.empty(runtime, dtype=torch.uint8, device="meta")
        ledger.hold("runtime", self._runtime)
        self._set_up()
        with ledger, counted_as("optimizer"):
            self._optimizer = make_optimizer(
                self.model.named_parameters(), name=settings.optimizer, learning_rate=1e-4, weight_decay=0.0
            )
        self._added_by_update: dict[str, int] | None = None

    def rehearse(self, micro_batch: MicroBatch) -> Rehearsal:
        """See `Stage`."""
        ledger, batch = self.ledger, meta_batch(micro_batch)
        self._set_up()
        ledger.forget_peaks()
        ledger.hold("activations", batch.input_ids_1T, batch.position_ids_1T, batch.predictor_N, batch.target_N)
        if not micro_batch.is_first:
            for parameter in self._body.trained:
                parameter.grad = torch.empty(parameter.shape, dtype=parameter.grad_dtype, device="meta")
                ledger.hold("gradients", parameter.grad)
        with ledger, counted_as("activations"), attention_on(ledger.card):
            self._step(batch)
        self._optimizer.zero_grad(set_to_none=True)
        totals = {name: sum(parts.values()) for name, parts in ledger.peaks.items()}
        backward = [totals.pop(name) for name in ("recompute", _EMBEDDING) if name in totals]
        if backward:  # none if only the head is trained
            totals["recompute"] = max(backward)
        self.peak_totals = totals
        return Rehearsal(
            stretches=_stretches(ledger),
            num_weights=_num_weights(causal_lm(self.model)),
            num_trained=sum(parameter.numel() for parameter in self._body.trained),
            num_in_factors=self._body.num_in_factors,
            host_parts=dict(ledger.host_peak),
        )

    def act(self, function: "Callable[[Scene], Phases]") -> Phases:
        """Call `function` with this scene, whose model is set up for its settings."""
        self._set_up()
        return function(self)

    def host_bytes(self, category: str) -> int:
        """Bytes held in host memory."""
        return self.ledger.live[category]

    def _set_up(self) -> None:
        """Let the model, which other scenes share and whose parts they may have moved, run by this scene's settings."""
        self._body.ledger = self.ledger
        apply_footprint(self.model, Footprint(0, self._settings.checkpoint_every, policy=self._settings.policy))
        for category, tensors in residents(self.model).items():
            self.ledger.hold(category, *tensors)

    def _step(self, batch: Batch) -> None:
        """Run a step. The bytes that the update adds are independent of the batch, so it runs only the first time."""
        ledger, chunk = self.ledger, self._settings.head_chunk
        if self._added_by_update is not None:
            forward_backward(self.model.train(), [batch], head_chunk=chunk)
            held = {part: size for part, size in ledger.live.items() if part not in ON_HOST}
            ledger.peaks[_UPDATE] = _sum(held, self._added_by_update)
            return
        observer = _BeforeUpdate(ledger)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        update(
            self.model.train(), self._optimizer, [batch], scaler=scaler, max_grad_norm=1.0, observer=observer,
            head_chunk=chunk,
        )  # fmt: skip
        self._added_by_update = _sum(ledger.peaks[_UPDATE], {part: -size for part, size in observer.held.items()})


class _BeforeUpdate(Observer):
    """Records the bytes by part at the end of the last backward pass."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.held: dict[str, int] = {}

    @contextmanager
    def around_last(self) -> Iterator[None]:
        yield
        self.held = {part: size for part, size in self._ledger.live.items() if part not in ON_HOST}


def _sum(these: Mapping[str, int], those: Mapping[str, int]) -> dict[str, int]:
    """Add part by part, and drop empty parts."""
    total = {part: these.get(part, 0) + those.get(part, 0) for part in these.keys() | those.keys()}
    return {part: size for part, size in total.items() if size}


def _stretches(ledger: Ledger) -> Phases:
    stretches = {_STRETCHES[name]: dict(parts) for name, parts in ledger.peaks.items() if name in _STRETCHES}
    for parts in stretches.values():
        if _EMBEDDING in parts:
            parts["recompute"] = parts.get("recompute", 0) + parts.pop(_EMBEDDING)
    return stretches


def layer_period(config: PreTrainedConfig) -> int:
    """Return the period of the layer pattern, in layers: 1 for most models, 6 for Gemma 3."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "no_rope_layers", None) or [None]
    return next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))


def with_depth(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Return the config of the model's first `num_layers` layers."""
    shallow, depth = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(shallow).items():
        if isinstance(value, list) and len(value) == depth:  # one entry a layer
            setattr(shallow, name, value[:num_layers])
    shallow.num_hidden_layers = num_layers
    return shallow


def _continued(low: Rehearsal, high: Rehearsal, *, times: int) -> Rehearsal:
    """Return `low` plus `times` the difference to `high`, in every number."""

    def line(first: int, second: int) -> int:
        return first + times * (second - first)

    return Rehearsal(
        _phases_continued(low.stretches, high.stretches, times=times),
        num_weights=line(low.num_weights, high.num_weights),
        num_trained=line(low.num_trained, high.num_trained),
        num_in_factors=line(low.num_in_factors, high.num_in_factors),
        host_parts={
            part: line(low.host_parts.get(part, 0), high.host_parts.get(part, 0))
            for part in low.host_parts.keys() | high.host_parts.keys()
        },
    )


def _linear(policy: Policy) -> Policy:
    """Return the policy with which memory is linear in the depth: every input kept, every layer streamed if any is."""
    inputs: LayerInputs = "host" if policy.inputs_home == "host" else "device"
    resident = None if policy.resident_layers is None else 0
    linear = replace(policy, layer_inputs=inputs, resident_layers=resident)
    return (
        replace(linear, chunk_tokens=sys.maxsize) if linear.is_plain else linear
    )  # whole, but not torch's checkpointing


def _phases_continued(low: Phases, high: Phases, *, times: int) -> Phases:
    return {
        phase: {
            part: low[phase].get(part, 0) + times * (high[phase].get(part, 0) - low[phase].get(part, 0))
            for part in high[phase].keys() | low[phase].keys()
        }
        for phase in high
    }


def _model(config: PreTrainedConfig, settings: Settings) -> PreTrainedModel | PeftModel:
    quantization = settings.quantization if settings.method == "qlora" else None
    base = meta_model(copy.deepcopy(config), quantization=quantization, compute=settings.compute)
    model: PreTrainedModel | PeftModel = base
    if settings.method == "full":
        make_trainable(base)
    else:
        with torch.device("meta"):  # peft would fill factors on the CPU and move them
            model = attach_adapter(
                base,
                Lora(
                    settings.r,
                    2 * settings.r,
                    lora_dropout=settings.lora_dropout,
                    target_modules=settings.target_modules,
                    modules_to_save=settings.modules_to_save,
                ),
                new_token_ids=make_room(base, settings.token_ids) if settings.token_ids else (),
                factor_dtype=settings.factors,
            )
        if settings.use_dora:
            _add_magnitudes(model)
    return model


def _add_magnitudes(model: PeftModel) -> None:
    """Add DoRA on meta, where peft 0.21 cannot create its layers (it moves quantized weights)."""
    for layer in list(model.modules()):
        if isinstance(layer, TunedLinear):
            layer.dora, holder = Dora(layer), torch.nn.Module()
            holder.weight = layer.dora.first_magnitudes()
            layer.lora_magnitude_vector = torch.nn.ModuleDict({"default": holder})


def _num_weights(model: PreTrainedModel) -> int:
    """Count the base's weights: tied ones once, packed ones as their unpacked number."""
    frozen = {name: p for name, p in model.named_parameters() if not is_of_adapter(name)}
    stored = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)}
    return sum(
        stored[id(p)].in_features * stored[id(p)].out_features if id(p) in stored else p.numel()
        for p in frozen.values()
    )


def num_labels(micro_batch: MicroBatch) -> int:
    """Return the label tokens of each example: at least one; the first token and shared tokens carry none."""
    most = micro_batch.length - max(1, micro_batch.trunk)
    return min(max(1, round(micro_batch.label_share * micro_batch.length)), most)


def meta_batch(micro_batch: MicroBatch) -> Batch:
    """Return a batch on meta with the shapes of `pack_batch`."""
    num_examples, trunk = micro_batch.num_examples, micro_batch.trunk
    labels = num_examples * num_labels(micro_batch)
    branches = (micro_batch.length - trunk,) * num_examples

    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    return Batch(
        input_ids_1T=ids(1, micro_batch.num_tokens),
        position_ids_1T=ids(1, micro_batch.num_tokens),
        lengths=(trunk, *branches) if trunk else branches,
        parents=(NO_PARENT, *(0 for _ in branches)) if trunk else tuple(NO_PARENT for _ in branches),
        predictor_N=ids(labels),
        target_N=ids(labels),
        rows=tuple(range(num_examples)),
    )


@contextmanager
def attention_on(card: Card) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` of meta tensors runs the operator that torch chooses on `card`, not a decomposition."""
    kernel: Callable[..., Any] = _attention_on_cpu if card.is_cpu else partial(_attention_on_card, card)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", kernel, "AutogradMeta")
        if not card.is_cpu:
            library.impl("dropout", _dropout_on_card, "AutogradMeta")
        yield


def _dropout_on_card(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """Dropout with a card's boolean mask; the CPU, like meta, multiplies by noise of the input's type."""
    dropped: torch.Tensor = torch.ops.aten.native_dropout(x, p, train)[0] if train and 0 < p < 1 else x
    return dropped


def _attention_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The CPU's kernel adds the mask to the scores, so it first converts a boolean mask to the inputs' type."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: torch.Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


def _attention_on_card(
    card: Card, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """A card's kernel. Callers repeat grouped keys if it needs that; otherwise this falls back to plain products, like torch."""
    trains = query.requires_grad and torch.is_grad_enabled()
    kernel = card.attention_kernel(
        query.dtype, query.shape[-1], value.shape[-1], has_mask=attn_mask is not None, trains=trains
    )
    if kernel == "flash":
        padded = (_filled_up(tensor, 8) for tensor in (query, key, value))
        flash: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            *padded, dropout_p, is_causal, scale=scale if scale is not None else query.shape[-1] ** -0.5
        )[0]
        return flash[..., : value.shape[-1]]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        bias = _filled_up(bias, 8)[..., : key.shape[2]]  # the kernel reads 8 values at a time
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    alignment = 4 if query.dtype == torch.float32 else 8
    is_efficient = kernel == "efficient" and query.shape[1] == key.shape[1]
    if not is_efficient or query.shape[-1] % alignment or value.shape[-1] % alignment:
        plain: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, bias, dropout_p, is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )[0]
        return plain
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    output: torch.Tensor = operator(query, key, value, bias, trains, dropout_p, is_causal, scale=scale)[0]
    return output


def _filled_up(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
