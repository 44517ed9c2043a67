"""Sum blocks of weights with a function in C or Triton that is compiled at run time.

`block_sums.c` replaces PyTorch's operations in `distribution.sum_by_block` by one pass over each
row. The system's C compiler (environment variable CC, `cc` by default) compiles the source to a
temporary folder, which takes about half a second per process. The function is used only if its
results for test logits are bitwise equal to those of PyTorch with one thread, so that a cache has
the same bytes with and without a compiler. There is one exception: with three or more threads,
torch.exp2 may differ in the last bit of weights where a thread's share ends inside a vector; the C
function does not depend on the number of threads. `CC=false` disables compilation.

On CUDA the function is the Triton kernel of triton_sums.py, which is used from the first logits on,
because the results may differ from PyTorch's in low-order bits. Each device and dtype is checked
once per process.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselogits.errors import SparseLogitsWarning, reason_of

Sums = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Largest logits [P, 1], shifts float64 [P, 1], sums of weights float64 [P, B], and sums of weights
times exponents float64 [P, B], which are None if they are not requested."""

Kernel = Callable[[Tensor, float, bool], Sums]
"""Function of logits [P, V], exponent and `with_moment`; see `triton_sums.block_sums`."""

WORTHWHILE = 2**26
"""Number of logits after which a process compiles the function.

PyTorch samples from this number of logits in 0.1 s.
"""

_SOURCE = Path(__file__).with_name("block_sums.c")
# Compiler options by the instruction set of PyTorch's kernels; others lack fused multiply-add.
_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
# Contraction would fuse operations that are separate in PyTorch. errno and traps are not used.
_FLAGS = ["-std=c11", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
_FLAGS += ["-fno-trapping-math"]
_TIMEOUT = 60  # seconds per command

_sampled = 0
_log = logging.getLogger(__name__)


class Library:
    """Compiled function for contiguous float32 logits on a CPU."""

    def __init__(self, path: str) -> None:  # the file may be deleted afterwards
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        single, double = ctypes.c_float, ctypes.c_double
        self._function = ctypes.CDLL(path).block_sums
        self._function.argtypes = [ctypes.c_int, pointer, size, size]
        self._function.argtypes += [double, single, single, double, *[pointer] * 4]
        self._function.restype = None

    def sums(
        self,
        logits: Tensor,
        slope: float,
        factors: tuple[float, float],
        heavy: float,
        with_moment: bool,
    ) -> Sums:
        """Sum weights by block; see `distribution.sum_by_block`.

        Args:
            logits: float32 [P, V], with V a multiple of 64.
            slope: factor of the logits in the exponents of the weights, for float64.
            factors: the same factor as two float32 numbers; see `distribution._factors`.
            heavy: limit above which a block is summed in float64; see `distribution._HEAVY`.
            with_moment: whether to compute the moments.
        """
        rows, vocabulary = logits.shape
        # C writes to these addresses, whatever PyTorch's default dtype and device are.
        peaks = logits.new_empty(rows, 1)
        shifts = logits.new_empty(rows, 1, dtype=torch.float64)
        sums = logits.new_empty(rows, vocabulary // 64, dtype=torch.float64)
        moments = torch.empty_like(sums) if with_moment else None
        self._function(
            *(torch.get_num_threads(), logits.data_ptr(), rows, vocabulary),
            *(slope, *factors, heavy),
            *(peaks.data_ptr(), shifts.data_ptr(), sums.data_ptr()),
            None if moments is None else moments.data_ptr(),
        )
        return peaks, shifts, sums, moments


def fastest_for(logits: Tensor) -> Library | Kernel | None:
    """Return the compiled function to use for logits [P, V]; None for PyTorch's operations."""
    if logits.is_cuda and logits.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return kernel_on(logits.device, logits.dtype)
    return library_for(logits)


@cache
def kernel_on(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return the Triton kernel for logits of a dtype on a device; None if it cannot be used.

    A warning is issued if the kernel fails or is inaccurate, but not if Triton is not installed.
    """
    try:
        from sparselogits.samplers import triton_sums

        if triton_sums.is_accurate(device, dtype):
            return triton_sums.block_sums
        found = "its results differ from those of PyTorch"
    except ModuleNotFoundError as error:
        _log.info("block sums were not compiled: %s", error)
        return None
    except Exception as error:  # Triton, its compilers and the driver share no class of errors
        found = f"{type(error).__name__}: {reason_of(error)}"
    warnings.warn(
        f"the Triton kernel that samples {dtype} logits cannot be used on {device}: {found}. "
        "PyTorch's operations are used, which read the logits several times; the targets may "
        "differ in rounding from those of other devices",
        SparseLogitsWarning,
        stacklevel=2,
    )
    return None


def library_for(logits: Tensor) -> Library | None:
    """Return the compiled library for float32 logits on a CPU; None if it is not to be used.

    The library is not used for other logits, before the process has passed `WORTHWHILE` logits to
    this function, or if `library` returns None.
    """
    global _sampled
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return None
    _sampled += logits.numel()
    return library() if _sampled >= WORTHWHILE else None


@cache
def library() -> Library | None:
    """Compile `block_sums.c`; return None if it cannot be compiled or is not exact."""
    try:
        function = _compile(_INSTRUCTIONS[torch.backends.cpu.get_cpu_capability()])
    except KeyError as error:
        _log.info("block sums were not compiled: no options for instruction set %s", error)
    except subprocess.CalledProcessError as error:
        _log.info("block sums were not compiled: %s", error.stderr.decode(errors="replace"))
    except (OSError, ValueError, AttributeError, subprocess.TimeoutExpired) as error:
        _log.info("block sums were not compiled: %s", error)
    else:
        if _is_exact(function):
            return function
        _log.info("block sums in C differ from those of PyTorch and are not used")
    return None


def _compile(instructions: list[str]) -> Library:
    """Compile the source for an instruction set, and load the library."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        compiled, path = f"{folder}/block_sums.o", f"{folder}/block_sums.so"
        # Linked without -fopenmp, so that the library uses the OpenMP runtime of PyTorch: two
        # runtimes would have two pools of threads.
        for command in (
            [*compiler, *_FLAGS, *instructions, "-c", str(_SOURCE), "-o", compiled],
            [*compiler, "-shared", compiled, "-o", path],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT)
        return Library(path)


def _is_exact(found: Library) -> bool:
    """Return whether the results for test logits equal those of PyTorch with one thread bitwise."""
    from sparselogits.samplers.distribution import sum_by_block

    generator = torch.Generator().manual_seed(0)
    single: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    logits = torch.randn(64, 4096, generator=generator, **single)
    logits *= torch.logspace(-3, 2, 64, **single)[:, None]
    logits[1::2, 2048:2100] = -torch.inf
    # PyTorch uses one thread for fewer than 32768 numbers.
    for exponent, few in product((0.7, 1.0), logits.chunk(16)):
        _, expected = sum_by_block(few, exponent, with_moment=True, library=None)
        _, result = sum_by_block(few, exponent, with_moment=True, library=found)
        for name in ("shift", "sums", "moment"):
            if not getattr(expected, name).equal(getattr(result, name)):
                return False
    return True
