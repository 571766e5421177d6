"""Recognize errors that mean a lack of memory: torch's allocator, the driver and CUDA's libraries word them differently. Needs no torch."""

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_cpu",
    "status_alloc_failed",
    "allocation_failed",
    "cublascreate",
    "hipblascreate",
    "failed to cuda calloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that the device or the machine has no memory left: torch has no single class for it.

    CUDA and its driver say "out of memory"; cuBLAS, cuSOLVER, cuSPARSE and cuDNN name a status instead. A failed creation of a cuBLAS
    handle is a lack of memory for its workspace, whatever its status.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OUT_OF_MEMORY)
    )
