"""The environment of the forkserver, and so of every rank and preparer: what libraries read when they are loaded."""

from __future__ import annotations

import os


def forkserver_environment() -> dict[str, str]:
    """Our own environment, with what the libraries of ranks and preparers read when they are loaded.

    A variable that the operator has set keeps its value, except for the number of OpenMP threads: the forkserver must
    have one thread, and each of its children chooses its own number (`torch.set_num_threads`).
    """
    return {
        # Threads that spin long at OpenMP's barriers take the cores from the front, and from each other's forwards:
        # beside other load a forward then costs ten times its processor time. Spinning for some 10 µs spares a forward
        # that runs alone most of its sleeps. Ten times as long saves such a forward another tenth at best, makes it
        # half as fast beside a busy front, and a forward of 15 ms five times slower even alone.
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "1000",
        # oneDNN keeps half a megabyte of code for each number of rows it ever multiplied, 1024 of them by default,
        # and torch's wrapper of it as many again.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "LRU_CACHE_CAPACITY": "128",
        # glibc gives large blocks back to the kernel as soon as they are free, and the next layer pays for every page
        # of its own again: 40,000 page faults for an image of 448², a tenth of its forward. With these values a rank
        # keeps memory that it once needed, in huge pages. A preparer undoes the first two (`prepare.confine`).
        "GLIBC_TUNABLES": (
            "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296:glibc.malloc.hugetlb=1"
        ),
        # transformers asks while it is imported whether CUDA is available. Without this variable the answer initialises
        # the CUDA driver in the forkserver, and no child of it could use a GPU.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # Batches differ in size: the allocator would keep blocks of many sizes, none of which fits the next batch.
        **({} if "PYTORCH_CUDA_ALLOC_CONF" in os.environ else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
