"""Which errors of a device mean that memory is short. Imports no torch by itself."""

from __future__ import annotations

_SIGNS = (  # in the messages of errors that are no torch.OutOfMemoryError, in lower case
    "out of memory",  # cudaErrorMemoryAllocation, hipErrorOutOfMemory; NCCL quotes them
    "_status_alloc_failed",  # cuBLAS, cuSOLVER, cuSPARSE, cuDNN, hipBLAS
    "_allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_{HOST,DEVICE}_ALLOCATION_FAILED
    "miopenstatusallocfailed",
    "unable to find an engine to execute this computation",  # cuDNN's: no plan whose workspace there is memory for
    "can't allocate memory",  # torch's allocator on the CPU
    "not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something failed for lack of memory, the device's or the host's: then a smaller batch may succeed.

    Only torch's own allocator raises OutOfMemoryError. The runtime and the libraries that allocate beside it say so in
    a RuntimeError, or in its subclass AcceleratorError.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
