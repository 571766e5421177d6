"""A device that is not the CPU, where there is no card: for tests of everything that asks where a tensor lies.

    standin.install()                 once, before the process runs its first backward pass
    with standin.card("rtx-4090"):    inside, the program's accelerator is this device, with that card's capability

What is real: values (operators compute through their CPU kernels), memory of its own with an allocator that counts, rounds to 512 bytes
and can refuse (`limit`), a thread of its own for autograd, a random generator of its own, and the count of times that the host waits.
Operators that only CUDA has (FlashAttention, the memory-efficient kernel, products with an fp32 result) compute here what they compute
there, and refuse what they refuse there. What it cannot show: kernels' rounding, atomics, streams, speed, fragmentation.

The device is torch's PrivateUse1, compiled from standin.cpp with g++ against torch's headers (20 s, kept in .pytest_cache).
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import qlora_lite  # noqa: F401  (guards the import of bitsandbytes)
from qlora_lite.device import accelerator
from qlora_lite.device.known_cards import KNOWN_CARDS, KnownCard

NAME = "standin"
_SOURCE = Path(__file__).with_name("standin.cpp")
_REPOSITORY = Path(__file__).resolve().parents[2]
_library: Any = None
_kept: list[Any] = []  # operator libraries: gone with the object
_card: KnownCard = KNOWN_CARDS["rtx-4090"]
calls: Counter[str] = Counter()  # of attention kernels, by name


def why_not() -> str | None:
    """Why it cannot be made here; None where it can."""
    return None if shutil.which("g++") else "needs g++ to compile the stand-in device"


def build() -> Path:
    """Compile the device, unless that was done before for this torch. Raises RuntimeError with the compiler's words."""
    root = Path(torch.__file__).parent
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    path = _REPOSITORY / ".pytest_cache" / "standin" / f"{key}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(".making")
        command = [
            "g++",
            "-shared",
            "-fPIC",
            "-std=c++20",
            "-O1",
            str(_SOURCE),
            "-o",
            str(made),
            f"-I{root / 'include'}",
        ]
        done = subprocess.run([*command, f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{_SOURCE.name} does not compile: {done.stderr[-2000:]}")
        made.replace(path)
    return path


def install() -> None:
    """Make torch know the device. Nothing takes it away again, so tests that use it run in a process of their own."""
    global _library
    if _library is not None:
        return
    import bitsandbytes  # noqa: F401  (defines the operators)

    _library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    for name in ("allocated", "peak", "num_refused", "num_synchronized"):
        getattr(_library, f"standin_{name}").restype = ctypes.c_size_t
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module(f"torch.{NAME}"))
    _register_operators()


@contextlib.contextmanager
def card(name: str = "rtx-4090", *, memory_bytes: int | None = None) -> Iterator[None]:
    """The program's accelerator is the stand-in, with the capability of this card; `memory_bytes` limits what may be allocated."""
    global _card
    install()
    before, _card = (accelerator.ACCELERATOR, _card), KNOWN_CARDS[name]
    accelerator.ACCELERATOR = NAME
    accelerator.card_here.cache_clear()
    calls.clear()
    try:
        with limit(memory_bytes), _bitsandbytes_here():
            yield
    finally:
        accelerator.ACCELERATOR, _card = before
        accelerator.card_here.cache_clear()


@contextlib.contextmanager
def limit(num_bytes: int | None) -> Iterator[None]:
    """Inside, an allocation that would go beyond `num_bytes` in all is refused as CUDA's allocator refuses it."""
    _library.standin_set_limit(ctypes.c_size_t(num_bytes or 0))
    try:
        yield
    finally:
        _library.standin_set_limit(ctypes.c_size_t(0))


def num_synchronized() -> int:
    """How often the host has waited for the device so far: values read, copies to the host."""
    return _library.standin_num_synchronized()


@contextlib.contextmanager
def _bitsandbytes_here() -> Iterator[None]:
    """bitsandbytes' paged buffers without its CUDA library: memory that the allocator does not count. And copies of its weights, which
    set the data of a CPU tensor to another device's: torch allows that for the devices that it knows."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Params4bit

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        _library.standin_set_managed(True)
        try:
            buffer = torch.empty(*shape, dtype=dtype, device=NAME)
        finally:
            _library.standin_set_managed(False)
        buffer.is_paged, buffer.page_deviceid = True, 0
        return buffer

    def copied(weight: Any, memo: dict[int, Any]) -> Any:
        made = torch.Tensor._make_subclass(type(weight), weight.data.clone(), weight.requires_grad)
        made.__dict__.update(weight.__dict__)
        made.quant_state = copy.deepcopy(weight.quant_state, memo)
        return made

    before = functional.get_paged, functional.fill, functional.prefetch_tensor, Params4bit.__deepcopy__
    Params4bit.__deepcopy__ = copied
    functional.get_paged = get_paged
    functional.fill = lambda tensor, value, **_: tensor.fill_(value)
    functional.prefetch_tensor = lambda tensor, **_: None
    try:
        yield
    finally:
        functional.get_paged, functional.fill, functional.prefetch_tensor, Params4bit.__deepcopy__ = before


class _Module(types.ModuleType):
    """What torch.cuda is for CUDA, as far as it is asked."""

    OutOfMemoryError = torch.OutOfMemoryError
    _initialized = True  # what torch's checkpointing asks before it keeps random numbers

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.generator = torch.Generator()
        self.memory = types.SimpleNamespace(
            set_per_process_memory_fraction=self.set_per_process_memory_fraction,
            _record_memory_history=lambda *_, **__: None,
            _dump_snapshot=lambda path: Path(path).write_bytes(b""),
        )

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def memory_allocated(self, device: Any = None) -> int:
        return _library.standin_allocated()

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return _library.standin_peak()

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        _library.standin_reset_peak()

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        _library.standin_set_limit(ctypes.c_size_t(round(fraction * _card.memory_gib * 2**30)))

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        total = int(_card.memory_gib * 2**30)
        return total - self.memory_allocated(), total

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        held, refused = self.memory_allocated(), _library.standin_num_refused()
        return {"reserved_bytes.all.current": held, "num_alloc_retries": 0, "num_ooms": refused}

    def memory_snapshot(self) -> list[Any]:
        return []

    def get_device_name(self, device: Any = None) -> str:
        return _card.full_name

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return _card.capability

    def get_device_properties(self, device: Any = None) -> Any:
        return types.SimpleNamespace(
            name=_card.full_name,
            total_memory=int(_card.memory_gib * 2**30),
            major=_card.capability[0],
            minor=_card.capability[1],
            multi_processor_count=_card.num_sms,
            L2_cache_size=int(_card.l2_mib * 2**20),
        )


def _register_operators() -> None:
    """CUDA's own operators, computed on the host, and what draws random numbers, from the device's generator."""
    aten = torch.library.Library("aten", "IMPL")
    _kept.append(aten)
    for name, function in {
        "mm.dtype": _mm_dtype,
        "_scaled_dot_product_flash_attention": _flash,
        "_scaled_dot_product_flash_attention_backward": _flash_backward,
        "_scaled_dot_product_efficient_attention": _efficient,
        "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
        "native_dropout": _native_dropout,
        "bernoulli_.float": _bernoulli_,
        "uniform_": _uniform_,
        "normal_": _normal_,
    }.items():
        aten.impl(name, _uncounted(function), "PrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):  # with autograd, and in inference mode
        aten.impl("scaled_dot_product_attention", _attention_of_torchs_choice, key)


def _uncounted(kernel: Any) -> Any:
    """As one kernel of a card: what it copies to the host and back is nothing that the host waits for there."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = num_synchronized()
        try:
            return kernel(*args, **kwargs)
        finally:
            _library.standin_set_num_synchronized(ctypes.c_size_t(before))

    return run


def _generator() -> torch.Generator:
    return torch.get_device_module(NAME).generator


def _native_dropout(input: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    kept = torch.empty(input.shape).bernoulli_(1 - p, generator=_generator()).bool().to(NAME)
    return input * kept / (1 - p), kept


def _bernoulli_(self: torch.Tensor, p: float = 0.5, *, generator: Any = None) -> torch.Tensor:
    return self.copy_(torch.empty(self.shape).bernoulli_(p, generator=generator or _generator()))


def _uniform_(self: torch.Tensor, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> torch.Tensor:
    return self.copy_(torch.empty(self.shape).uniform_(low, high, generator=generator or _generator()))


def _normal_(self: torch.Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> torch.Tensor:
    return self.copy_(torch.empty(self.shape).normal_(mean, std, generator=generator or _generator()))


def _mm_dtype(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    if out_dtype != left.dtype and (out_dtype != torch.float32 or left.dtype not in (torch.float16, torch.bfloat16)):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    return (left.cpu().float() @ right.cpu().float()).to(out_dtype).to(NAME)


def _attention_of_torchs_choice(  # type: ignore[no-untyped-def]
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """What torch chooses on CUDA where cuDNN is switched off (sdp_utils.cpp): flash, the efficient kernel, plain products; counted."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=NAME).masked_fill(~attn_mask, -math.inf)
    kernels = torch.ops.aten
    try:
        if attn_mask is not None:
            raise RuntimeError("FlashAttention takes no mask")
        return kernels._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    except RuntimeError:
        pass
    try:
        _refuse_for_efficient(q, k, v)
    except RuntimeError:
        calls[f"math of {q.shape[2]} x {k.shape[2]}"] += 1
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=NAME).triu(1), -math.inf)
        return torch.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ v
    bias = None if attn_mask is None else attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    trains = q.requires_grad and torch.is_grad_enabled()
    return kernels._scaled_dot_product_efficient_attention(q, k, v, bias, trains, dropout_p, is_causal, scale=scale)[0]


def _refuse_for_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    width = q.shape[-1]
    if _card.capability < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if width % 8 or width > 256 or v.shape[-1] != width or k.shape[-1] != width:
        raise RuntimeError(f"FlashAttention: head width {width} (value {v.shape[-1]}) is not supported")
    if q.shape[1] % k.shape[1] or k.shape != v.shape:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")


def _scores(
    q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, H, L, S] in fp64."""
    scores = (q.double() @ k.double().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if causal:  # aligned to the upper left, as both kernels of PyTorch have it
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores


def _forward(
    q: Any, k: Any, v: Any, causal: bool, scale: float | None, bias: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (output laid out [B, L, H, d] as the kernels do, log-sum-exp [B, H, L] fp32), on the host."""
    q, k, v = (tensor.cpu() for tensor in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = _scores(q, k, causal, scale, None if bias is None else bias.cpu())
    total = scores.logsumexp(-1)
    output = ((scores - total[..., None]).exp() @ v.double()).to(q.dtype)
    return output.transpose(1, 2).contiguous().transpose(1, 2), total.float()


def _backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, total: Any, causal: bool, scale: float | None, bias: Any = None
) -> tuple[torch.Tensor, ...]:
    grad, q, k, v, out, total = (tensor.cpu() for tensor in (grad, q, k, v, out, total))
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    wide_k, wide_v = k.repeat_interleave(groups, 1).double(), v.repeat_interleave(groups, 1).double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (
        _scores(q, wide_k, causal, scale, None if bias is None else bias.cpu()) - total.double()[..., None]
    ).exp()
    share = (grad.double() * out.double()).sum(-1, keepdim=True)
    grad_scores = weights * (grad.double() @ wide_v.mT - share) * scale
    grad_k = (grad_scores.mT @ q.double()).unflatten(1, (heads, groups)).sum(2)
    grad_v = (weights.mT @ grad.double()).unflatten(1, (heads, groups)).sum(2)
    return (grad_scores @ wide_k).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):  # type: ignore[no-untyped-def]
    _refuse_for_flash(q, k, v)
    calls["flash"] += 1
    output, total = _forward(q, k, v, is_causal, scale)
    nothing = torch.empty(0, device=NAME)
    seed = torch.empty(2, dtype=torch.uint64, device=NAME)
    return _on_device(output), total.to(NAME), nothing, nothing, q.shape[2], k.shape[2], seed, seed, nothing


def _flash_backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, out, total, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
):
    _refuse_for_flash(q, k, v)
    if 192 < q.shape[-1] <= 224 and _card.capability in ((8, 6), (8, 9), (12, 0)):
        raise RuntimeError("torch does not choose this kernel for training with such heads on this card")
    if total.dtype != torch.float32 or total.shape != q.shape[:3] or not total.is_contiguous():
        raise RuntimeError("FlashAttention backward: log-sum-exp must be contiguous fp32 [B, H, L]")
    calls["flash backward"] += 1
    return tuple(_on_device(each) for each in _backward(grad, q, k, v, out, total, is_causal, scale))


def _refuse_for_efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dtype == torch.bfloat16 and _card.capability < (8, 0):
        raise RuntimeError("Expected query, key, value dtype to be fp16 or fp32 before SM 8.0")
    if q.shape[1] != k.shape[1] or k.shape[1] != v.shape[1]:
        raise RuntimeError("efficient attention: query, key and value must have as many heads")
    needs = 4 if q.dtype == torch.float32 else 8
    if q.shape[-1] % needs or v.shape[-1] % needs:
        raise RuntimeError(f"efficient attention: head widths must be multiples of {needs}")


def _efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):  # type: ignore[no-untyped-def]
    _refuse_for_efficient(q, k, v)
    calls["efficient"] += 1
    output, total = _forward(q, k, v, is_causal, scale, attn_bias)
    rows = 32 * math.ceil(q.shape[2] / 32) if compute_log_sumexp else 0
    padded = torch.full((*q.shape[:2], rows), math.inf)
    if rows:
        padded[..., : q.shape[2]] = total
    seed = torch.empty((), dtype=torch.int64, device=NAME)
    return _on_device(output), padded.to(NAME), seed, seed


def _efficient_backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, attn_bias, out, total, seed, offset, dropout_p, grad_input_mask, is_causal=False, *, scale=None
):
    _refuse_for_efficient(q, k, v)
    if out.stride(2) != out.shape[1] * out.shape[3] or out.stride(1) != out.shape[3]:
        raise RuntimeError(
            "efficient attention backward: the kernel reads the output as [B, L, H, d], whatever its strides say"
        )
    if total.shape[-1] != 32 * math.ceil(q.shape[2] / 32):
        raise RuntimeError("efficient attention backward: the log-sum-exp must be padded to a multiple of 32")
    calls["efficient backward"] += 1
    found = _backward(grad, q, k, v, out, total[..., : q.shape[2]], is_causal, scale, attn_bias)
    return (*(_on_device(each) for each in found), None)


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    """With the strides it has on the host."""
    placed = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=NAME)
    return placed.copy_(tensor)
