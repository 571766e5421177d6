"""How an accelerator's libraries shall compute: sums in fp32 to the end, and attention by kernels whose memory is known.

By default cuBLAS may add up parts of a 16-bit product in 16 bits (split-K), which rounds more than once: a small change that an adapter
makes is lost there. And on capability 9.0 and 10.0 torch prefers cuDNN's attention, which compiles a plan for each new shape, while
packed rows have a new shape in every step. Both are switched off while our code computes, and put back afterwards. On the CPU nothing
changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_sums() -> Iterator[None]:
    """Products of 16-bit inputs are summed in fp32 and rounded once, and attention never goes by cuDNN; as before afterwards."""
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
