"""Who holds how many bytes, storage by storage, while tensor code runs: on meta tensors (nothing is computed) or on real ones.

    with Ledger(card=card) as ledger:         # its allocator rounds to 512 bytes; the CPU's to 1
        ledger.hold("weights", *model.parameters())
        loss = model(x)                       # storages that are made count as activations until they are freed
        with counted_as("workspace"):         # and as workspace here
            optimizer.step()
    ledger.peaks["workspace"]                 # highest sum while workspace was made: its parts at that instant

`counted_as`, `count_as` and `count_as_after` speak to whatever is open: a ledger, or another book that wants to know what is made now
(memory/measuring.py asks the allocator by them).

A dispatch mode sees every operator's results; a storage is counted once, whatever views there are, and leaves when Python's last
reference and autograd's are gone. What an operator allocates and frees inside itself is invisible here: `workspace` says it,
a function of the operator and its arguments that returns bytes. Costs about ten microseconds an operator.
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

# The phase of a step in which a category is made.
PHASES = {"activations": "forward", "logits": "head", "recompute": "backward", "workspace": "update"}
PAGED = "paged"  # a category that lies in managed memory: counted, and no part of what the device must hold
_ADD = torch.ops.aten.add.Tensor
_ENGINE = _engine_run_backward.__code__  # what calls an operator that no function of Python's calls
Workspace = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]
Answer = Callable[[Any], float]


class Book(Protocol):
    """Something that is told what is made from now on."""

    current: str


@dataclass(frozen=True)
class Moment:
    """Bytes held at most between the mark before and this one."""

    phase: str  # what was made when the mark was set
    name: str
    num_bytes: int


class Ledger(TorchDispatchMode):
    """Bytes by category, now and at the peaks: one peak for each category that new storages have counted as.

    `card` is what meta tensors stand for; an allocation there takes a multiple of its `round_to` bytes. Code that asks a meta tensor
    for its value (`.item()`, `if`) is told `answer(operator)`, of the operator that ran before it asked.
    """

    def __init__(self, *, card: Card = CPU, workspace: Workspace | None = None) -> None:
        super().__init__()
        _holders_of_one()  # while nothing is computed
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        self.current = "activations"
        self.card = card
        self.moments: list[Moment] = []
        self.answer: Answer = lambda operator: 1.0
        self._last: Any = None
        self._total = self._since_mark = 0
        self._highest: dict[str, int] = {}  # by category
        self._round_to = card.round_to
        self._workspace = workspace
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}  # by the storage's address

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own hook: nothing is compiled under a ledger, and the guard against it costs 3 microseconds an operator."""
        return False

    @property
    def total_bytes(self) -> int:
        """All that is held now."""
        return self._total

    def __enter__(self) -> "Ledger":
        _open.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _open.remove(self)

    def hold(self, category: str, *tensors: torch.Tensor) -> None:
        """Count the storages of `tensors` as `category`, whether they are new or known."""
        for tensor in tensors:
            self._enter(tensor.untyped_storage(), category)

    def forget_peaks(self) -> None:
        """Peaks from now on."""
        self.peaks.clear()
        self._highest.clear()

    def mark(self, name: str) -> None:
        """Note what was held at most since the last mark."""
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
            self.live[before] -= size
            self.live[category] += size
            return
        size = -(-storage.nbytes() // self._round_to) * self._round_to
        self._known[key] = (weakref.ref(storage, lambda _: self._leave(key)), category, size)
        self.live[category] += size
        if category != PAGED:
            self._total += size
            self._note_peak(0)

    def _leave(self, key: int) -> None:
        _, category, size = self._known.pop(key)
        self.live[category] -= size
        if category != PAGED:
            self._total -= size

    def _note_peak(self, workspace: int) -> None:
        self._since_mark = max(self._since_mark, self._total + workspace)
        if self._total + workspace > self._highest.get(self.current, -1):
            self._highest[self.current] = self._total + workspace
            parts = {name: size for name, size in self.live.items() if size and name != PAGED}
            if workspace:
                parts["workspace"] = parts.get("workspace", 0) + workspace
            self.peaks[self.current] = parts


_open: list[Book] = []


def _is_called_by_autograd() -> bool:
    """Whether no function of Python's called the operator: the engine does, below its own frame or, in a device's thread, below none."""
    try:
        caller = sys._getframe(2).f_code  # 1 is the dispatch mode
    except ValueError:
        return True
    return caller is _ENGINE


def is_added_in_place(gradient: torch.Tensor) -> bool:
    """Whether autograd, which adds up the gradients of what is used several times, would add to this one where it lies.

    It does when nothing else holds it (torch/csrc/autograd/input_buffer.cpp), but never under a dispatch mode, so a ledger does it.
    """
    is_its_own = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    return is_its_own and _num_holders(gradient) == _holders_of_one()


def _num_holders(tensor: torch.Tensor) -> int:
    count: int = tensor._use_count()  # type: ignore[attr-defined]  # not in torch's stubs
    return count


@cache
def _holders_of_one() -> int:
    """What `_use_count` says in a dispatch mode of a gradient that nothing but autograd holds."""
    found: list[int] = []

    class Probe(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is _ADD and torch._C._current_graph_task_id() != -1:
                found.append(_num_holders(args[0]))
            return func(*args, **(kwargs or {}))

    with torch.enable_grad():
        weight, factor = torch.ones(2, device="meta", requires_grad=True), torch.ones(2, device="meta")
        twice = [(weight * factor).sum() for _ in range(2)]
        with Probe():
            torch.autograd.backward(twice)
    return found[0]


@contextmanager
def opened(book: Book) -> Iterator[None]:
    """`book` is told, too, what is made inside this block."""
    _open.append(book)
    try:
        yield
    finally:
        _open.remove(book)


@contextmanager
def counted_as(category: str) -> Iterator[None]:
    """Storages that are made inside this block count as `category` in the books that are open."""
    before = [(book, book.current) for book in _open]
    count_as(category)
    try:
        yield
    finally:
        for book, current in before:
            book.current = current


def count_as(category: str) -> None:
    """Storages that are made from now on count as `category`."""
    for book in _open:
        book.current = category


def count_as_after(tensor: torch.Tensor, category: str) -> None:
    """From the moment that the gradient of `tensor` is there, storages count as `category`; only while a book is open."""
    if _open and tensor.requires_grad:
        tensor.register_hook(lambda _: count_as(category))


def card_of(tensor: torch.Tensor) -> Card:
    """The card that `tensor` is on, or, of a meta tensor, the one that the open ledger says it stands for."""
    if not tensor.is_meta:
        return card_at(tensor.device)
    ledgers = [book for book in _open if isinstance(book, Ledger)]
    return ledgers[-1].card if ledgers else CPU
