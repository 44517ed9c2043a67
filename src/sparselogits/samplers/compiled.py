"""Sum blocks of weights by a C function, which is compiled when it is first worthwhile.

`block_sums.c` computes what `distribution.torch_block_sums` computes, in one pass over each row.
The machine's C compiler (environment variable CC, `cc` by default) compiles it into a temporary
folder, in about half a second per process. The function is used only if its results for test
logits equal those of PyTorch in every bit, so a cache has the same bytes with and without a
compiler. `CC=false` disables it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Sums = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Largest logits, shifts, sums and moments; see `distribution.torch_block_sums`."""

BlockSums = Callable[[Tensor, float, float, bool], Sums]

WORTHWHILE = 2**22
"""Smallest number of logits that the function is compiled for. PyTorch takes 5 ms for them."""

_SOURCE = Path(__file__).with_name("block_sums.c")
# Compiler options by the instruction set of PyTorch's functions; others have no multiply-add.
_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
# Contraction would fuse operations that PyTorch does separately. errno and traps are not used.
_FLAGS = ["-std=c11", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
_FLAGS += ["-fno-trapping-math"]
_SECONDS = 60

_log = logging.getLogger(__name__)


@cache
def block_sums() -> BlockSums | None:
    """Compile `block_sums.c`; return None where it cannot be compiled or is not exact.

    The result takes the arguments of `distribution.torch_block_sums`; logits must be contiguous
    float32 on a CPU.
    """
    try:
        found = _compile(_INSTRUCTIONS[torch.backends.cpu.get_cpu_capability()])
    except KeyError as error:
        _log.info("block sums were not compiled: no options for instruction set %s", error)
    except subprocess.CalledProcessError as error:
        _log.info("block sums were not compiled: %s", error.stderr.decode(errors="replace"))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        _log.info("block sums were not compiled: %s", error)
    else:
        if _is_exact(found):
            return found
        _log.info("block sums in C differ from those of PyTorch and are not used")
    return None


def _compile(instructions: list[str]) -> BlockSums:
    """Compile and load the source. The library stays loaded when its file is deleted.

    Raises:
        OSError: there is no compiler, or the library cannot be loaded.
        subprocess.CalledProcessError: the compiler failed.
        subprocess.TimeoutExpired: the compiler took longer than a minute.
        ValueError: CC cannot be parsed.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        made, library = f"{folder}/block_sums.o", f"{folder}/block_sums.so"
        # Linked without -fopenmp, so that the OpenMP library is the one that PyTorch has loaded:
        # two libraries would have two pools of threads.
        for command in (
            [*compiler, *_FLAGS, *instructions, "-c", str(_SOURCE), "-o", made],
            [*compiler, "-shared", made, "-o", library],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        function = ctypes.CDLL(library).block_sums
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    function.argtypes = [ctypes.c_int, pointer, size, size, number, number, *[pointer] * 4]
    function.restype = None

    def call(logits: Tensor, slope: float, remainder: float, with_moment: bool) -> Sums:
        rows, vocabulary = logits.shape
        peaks, shifts = torch.empty(rows, 1), torch.empty(rows, 1)
        sums = torch.empty(rows, vocabulary // 64, dtype=torch.float64)
        moments = torch.empty_like(sums) if with_moment else None
        results = (peaks, shifts, sums, moments)
        function(
            *(torch.get_num_threads(), logits.data_ptr(), rows, vocabulary, slope, remainder),
            *(None if result is None else result.data_ptr() for result in results),
        )
        return results

    return call


def _is_exact(found: BlockSums) -> bool:
    """Return whether results equal those of PyTorch, for small to large logits and masked ids."""
    from sparselogits.samplers.distribution import factors, torch_block_sums

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 4096, generator=generator) * torch.logspace(-3, 2, 64)[:, None]
    logits[1::2, 2048:2100] = -torch.inf
    for exponent in (0.7, 1.0):
        given = (logits, *factors(exponent), exponent == 1.0)
        for expected, result in zip(torch_block_sums(*given), found(*given), strict=True):
            if expected is not None and not (result is not None and expected.equal(result)):
                return False
    return True
