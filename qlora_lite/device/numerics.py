"""Settings of an accelerator's libraries: full fp32 sums, and attention kernels of known memory.

By default cuBLAS may add parts of a 16-bit product in 16 bits (split-K). This rounds more than once, and loses small changes of an
adapter. On capability 9.0 and 10.0 torch prefers cuDNN's attention, which compiles a plan for each new shape; packed sequences have a
new shape in every step. Our code switches both off while it computes, and restores them afterwards. On the CPU nothing changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_sums() -> Iterator[None]:
    """Inside, sum products of 16-bit inputs in fp32, round once, and never use cuDNN's attention; restore the settings afterwards."""
    products = torch.backends.cuda.matmul
    before = (
        products.allow_bf16_reduced_precision_reduction,
        products.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    _set(False, False, False)
    try:
        yield
    finally:
        _set(*before)


def _set(bf16: bool, fp16: bool, cudnn: bool) -> None:
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = bf16
    products.allow_fp16_reduced_precision_reduction = fp16
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
