"""Count bytes by category, storage by storage, while tensor code runs: on meta tensors (nothing is computed) or on real ones.

    with Ledger(card=card) as ledger:         # a card's allocator rounds to 512 bytes; the CPU's to 1
        ledger.hold("weights", *model.parameters())
        loss = model(x)                       # new storages count as activations until they are freed
        with counted_as("workspace"):         # and as workspace here
            optimizer.step()
    ledger.peaks["workspace"]                 # parts of the highest sum while new storages counted as workspace

`counted_as`, `count_as` and `count_as_after` address every open book: a ledger, or another object that follows the current category
(memory/measuring.py reads the allocator at these calls).

A dispatch mode sees the results of every operator. A storage counts once, however many views it has, and leaves with the last reference
of Python and autograd. Memory that an operator allocates and frees internally is invisible here; `workspace`, a function of the operator
and its arguments, returns its bytes. The cost is about ten microseconds per operator.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_lite.device.accelerator import card_at
from qlora_lite.device.card import CPU, Card
from qlora_lite.memory.meta_operators import result_of

# Category of new storages -> phase of a step.
PHASES = {"activations": "forward", "logits": "head", "recompute": "backward", "workspace": "update"}
# Categories of host memory, a pool of its own beside the device's.
PAGED = "paged"  # optimizer state in managed memory
HOST_INPUTS, HOST_KEYS_VALUES = "host_layer_inputs", "host_keys_values"
HOST_WEIGHTS, HOST_CONSTANTS = "host_weights", "host_quant_constants"
ON_HOST = frozenset((PAGED, HOST_INPUTS, HOST_KEYS_VALUES, HOST_WEIGHTS, HOST_CONSTANTS))
ON_DISK = "on_disk"  # frozen tensors that stay in files: in neither pool
_ADD = torch.ops.aten.add.Tensor
_ENGINE = _engine_run_backward.__code__  # the caller of an operator that no Python function calls
Workspace = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]
Answer = Callable[[Any], float]


class Book(Protocol):
    """An object that follows the category of new storages."""

    current: str


@dataclass(frozen=True)
class Moment:
    """The most bytes held between the previous mark and this one."""

    phase: str  # the category of new storages at the mark
    name: str
    num_bytes: int


class Ledger(TorchDispatchMode):
    """Bytes by category, now and at the peaks: one peak for each category of new storages.

    Meta tensors stand for tensors on `card`; an allocation there takes a multiple of its `round_to` bytes. Code that reads the value of
    a meta tensor (`.item()`, `if`) gets `answer(operator)`, for the operator that ran before.
    """

    def __init__(self, *, card: Card = CPU, workspace: Workspace | None = None) -> None:
        super().__init__()
        _holders_of_one()  # cache it before anything is computed
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        self.host_peak: dict[str, int] = {}  # parts of the host pool at its highest sum
        self.current = "activations"
        self.card = card
        self.moments: list[Moment] = []
        self.answer: Answer = lambda operator: 1.0
        self._last: Any = None
        self._total = self._on_host = self._since_mark = 0
        self._highest: dict[str, int] = {}  # by category
        self._round_to = card.round_to
        self._workspace = workspace
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}  # by the storage's address

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own hook: nothing is compiled under a ledger, and the guard against it costs 3 microseconds per operator."""
        return False

    @property
    def total_bytes(self) -> int:
        """Bytes held now."""
        return self._total

    def __enter__(self) -> "Ledger":
        _open.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _open.remove(self)

    def hold(self, category: str, *tensors: torch.Tensor) -> None:
        """Count the storages of `tensors` as `category`, new or known."""
        for tensor in tensors:
            self._enter(tensor.untyped_storage(), category)

    def forget_peaks(self) -> None:
        """Restart the peaks."""
        self.peaks.clear()
        self.host_peak = {name: size for name, size in self.live.items() if size and name in ON_HOST}
        self._highest.clear()

    def mark(self, name: str) -> None:
        """Record the most bytes held since the last mark."""
        self.moments.append(Moment(self.current, name, self._since_mark))
        self._since_mark = self._total

    @property
    def peak(self) -> dict[str, int]:
        """The parts of the highest peak; they sum to `peak_bytes`."""
        return max(self.peaks.values(), key=lambda parts: sum(parts.values()), default={})

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.answer(self._last)
        self._last = func
        is_sum = func is _ADD and _is_called_by_autograd() and is_added_in_place(args[0])
        out = args[0].add_(args[1]) if is_sum else result_of(func, args, kwargs)
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._enter(storage, self.current)
        if self._workspace is not None:
            self._note_peak(self._workspace(func, args, kwargs, out))
        return out

    def _enter(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata
        if key in self._known:
            reference, before, size = self._known[key]
            self._known[key] = (reference, category, size)
            self._add(before, -size)
            self._add(category, size)
            return
        size = -(-storage.nbytes() // self._round_to) * self._round_to
        self._known[key] = (weakref.ref(storage, lambda _: self._leave(key)), category, size)
        self._add(category, size)
        if category not in ON_HOST:
            self._note_peak(0)

    def _leave(self, key: int) -> None:
        _, category, size = self._known.pop(key)
        self._add(category, -size)

    def _add(self, category: str, size: int) -> None:
        self.live[category] += size
        if category not in ON_HOST:
            self._total += size if category != ON_DISK else 0
            return
        self._on_host += size
        if self._on_host > sum(self.host_peak.values()):
            self.host_peak = {name: held for name, held in self.live.items() if held and name in ON_HOST}

    def _note_peak(self, workspace: int) -> None:
        self._since_mark = max(self._since_mark, self._total + workspace)
        if self.current in ON_HOST:  # the operator has allocated no device memory
            return
        if self._total + workspace > self._highest.get(self.current, -1):
            self._highest[self.current] = self._total + workspace
            parts = {name: size for name, size in self.live.items() if size and name not in ON_HOST and name != ON_DISK}
            if workspace:
                parts["workspace"] = parts.get("workspace", 0) + workspace
            self.peaks[self.current] = parts


_open: list[Book] = []


def _is_called_by_autograd() -> bool:
    """Whether autograd's engine called the operator: the calling frame is the engine's or, in a device's thread, missing."""
    try:
        caller = sys._getframe(2).f_code  # 1 is the dispatch mode
    except ValueError:
        return True
    return caller is _ENGINE


def is_added_in_place(gradient: torch.Tensor) -> bool:
    """Whether autograd, which sums the gradients of a tensor used several times, would add to this one in place.

    It does when nothing else holds it (torch/csrc/autograd/input_buffer.cpp), but never under a dispatch mode, so the ledger does it.
    """
    is_its_own = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    return is_its_own and _num_holders(gradient) == _holders_of_one()


def _num_holders(tensor: torch.Tensor) -> int:
    count: int = tensor._use_count()  # type: ignore[attr-defined]  # not in torch's stubs
    return count


@cache
def _holders_of_one() -> int:
    """The `_use_count`, in a dispatch mode, of a gradient that only autograd holds."""
    counts: list[int] = []

    class Probe(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is _ADD and torch._C._current_graph_task_id() != -1:
                counts.append(_num_holders(args[0]))
            return func(*args, **(kwargs or {}))

    with torch.enable_grad():
        weight, factor = torch.ones(2, device="meta", requires_grad=True), torch.ones(2, device="meta")
        twice = [(weight * factor).sum() for _ in range(2)]
        with Probe():
            torch.autograd.backward(twice)
    return counts[0]


@contextmanager
def opened(book: Book) -> Iterator[None]:
    """Add `book` to the open books inside this block."""
    _open.append(book)
    try:
        yield
    finally:
        _open.remove(book)


@contextmanager
def counted_as(category: str) -> Iterator[None]:
    """Count new storages inside this block as `category` in all open books."""
    before = [(book, book.current) for book in _open]
    count_as(category)
    try:
        yield
    finally:
        for book, current in before:
            book.current = current


def count_as(category: str) -> None:
    """Count new storages as `category` from now on."""
    for book in _open:
        book.current = category


def current_category() -> str:
    """The category of new storages; that of no book is "activations"."""
    return _open[-1].current if _open else "activations"


def count_as_after(tensor: torch.Tensor, category: str) -> None:
    """Count new storages as `category` once the gradient of `tensor` exists; no effect without an open book."""
    if _open and tensor.requires_grad:
        tensor.register_hook(lambda _: count_as(category))


def card_of(tensor: torch.Tensor) -> Card:
    """The card of `tensor`; for a meta tensor, the card of the open ledger."""
    if not tensor.is_meta:
        return card_at(tensor.device)
    ledgers = [book for book in _open if isinstance(book, Ledger)]
    return ledgers[-1].card if ledgers else CPU
