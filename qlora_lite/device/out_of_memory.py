"""Errors that mean a lack of memory: torch's allocator, the driver and each of CUDA's libraries have their own words. Needs no torch."""

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
    """Whether `error` says that the device or the machine has no memory left: torch has no one class for it.

    CUDA's and its driver's own errors say "out of memory"; cuBLAS, cuSOLVER, cuSPARSE and cuDNN name a status instead. A cuBLAS handle
    that cannot be made is a lack of memory for its workspace, whichever status it names.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OUT_OF_MEMORY)
    )
