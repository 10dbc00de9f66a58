"""Find, load and check the C library: the one in the wheel, or one that is compiled on first use.

A wheel for Linux on x86-64 contains a library for AVX2, one for AVX-512, and one for AVX-512 BF16 that also uses AMX
where the machine has it. Everywhere else the sources are compiled once per machine and processor. The result is kept in
``$MOLSAKI_CACHE``, else ``$XDG_CACHE_HOME/molsaki_kernels`` (``~/.cache``), else a temporary folder. If neither library
can be used, or with ``MOLSAKI_NATIVE=0``, PyTorch computes attention on a CPU and its map.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

from molsaki_kernels._compile import constant_when_compiled
from molsaki_kernels._native import compile as compilation
from molsaki_kernels._native.compile import compiler as compiler
from molsaki_kernels._native.structs import (
    FLOAT32,
    HEAD_DIM_MULTIPLE,
    MAX_HEAD_DIM,
    TILES_BF16,
    VECTORS_BF16,
    AttentionCall,
    AttentionMemory,
    LseGradientCall,
    MapCall,
    mismatch,
)

NEEDED = {"avx2", "fma"}


@constant_when_compiled
def why_not() -> str | None:
    """The reason why this machine has no native library, or None. The first call may compile it, in seconds."""
    return _loaded()[1]


def why_not_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why the library cannot take q, k and v of this kind, or None."""
    if device.type != "cpu":
        return f"it takes CPU tensors, not {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
        return f"it takes head_dim in multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


def library() -> ctypes.CDLL:
    """The library. Call it only where :func:`why_not` returns None."""
    found, reason = _loaded()
    if found is None:
        raise RuntimeError(f"the native library is not available: {reason}")
    return found


@constant_when_compiled
@functools.cache
def bf16_unit() -> int:
    """The unit that computes the products of bfloat16 inputs: FLOAT32, VECTORS_BF16 or TILES_BF16.

    TILES_BF16 is AMX; it requires support by the processor, the operating system and the compiler. AVX-512 BF16 is not
    used on Intel processors, because float32 was faster on one of them (docs/performance.md).
    """
    units = bf16_units()
    if units[-1] == VECTORS_BF16 and "GenuineIntel" in _processor().split():
        return FLOAT32
    return units[-1]


def bf16_units() -> list[int]:
    """The units that can compute the products of bfloat16 inputs on this machine, the best one last."""
    found: int = library().molsaki_units()
    return [unit for unit in (FLOAT32, VECTORS_BF16, TILES_BF16) if found >> unit & 1]


@constant_when_compiled
def pytorch_is_faster_in_bfloat16() -> bool:
    """Whether PyTorch uses AMX for bfloat16 products on this machine and the library, though available, does not."""
    has_amx = platform.system() == "Linux" and "amx_bf16" in _processor().split()
    return has_amx and why_not() is None and bf16_unit() != TILES_BF16


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("MOLSAKI_NATIVE") == "0":
        return None, "switched off by MOLSAKI_NATIVE=0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, f"written for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    processor = _processor()
    if not set(processor.split()) >= NEEDED:
        return None, "the processor has no AVX2 and FMA"
    found = _shipped(processor)
    if found is None:
        command = compiler()
        if command is None:
            return None, "no C compiler (cc, gcc, clang or $CC)"
        try:
            found = _compiled(command, processor)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
            return None, f"{command} failed: {lines[-1]}"
        except OSError as error:
            return None, f"could not be compiled or loaded: {error}"
    reason = mismatch(found)
    if reason is not None:
        return None, f"the library does not fit this package: {reason}"
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found, None


_FUNCTIONS = {
    "molsaki_units": (ctypes.c_int64,),
    "molsaki_attention_memory": (
        None,
        ctypes.POINTER(AttentionCall),
        ctypes.c_int64,
        ctypes.POINTER(AttentionMemory),
    ),
    "molsaki_attention_forward": (None, ctypes.POINTER(AttentionCall)),
    "molsaki_attention_backward": (None, ctypes.POINTER(AttentionCall)),
    "molsaki_map_forward": (None, ctypes.POINTER(MapCall)),
    "molsaki_map_dlse": (None, ctypes.POINTER(MapCall)),
    "molsaki_map_add": (None, ctypes.POINTER(MapCall)),
    "molsaki_lse_gradient": (ctypes.c_int64, ctypes.POINTER(LseGradientCall)),
}


_FACTS = ("vendor_id", "model name", "flags")


@functools.cache
def _processor() -> str:
    """Vendor, model and features from /proc/cpuinfo, which determine the meaning of ``-march=native``."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return " ".join(next((x for x in lines if x.startswith(name)), "") for name in _FACTS)


def _shipped(processor: str) -> ctypes.CDLL | None:
    """The wheel's best library for this processor, or None if the wheel has none or it cannot be loaded here."""
    for name, variant in compilation.VARIANTS.items():
        path = Path(__file__).parent / f"molsaki-{name}.so"
        if variant.needs <= set(processor.split()) and path.exists():
            with contextlib.suppress(OSError):  # for example a C library older than the one it was linked with
                return ctypes.CDLL(str(path))
    return None


def _compiled(command: str, processor: str) -> ctypes.CDLL:
    """The library compiled for this processor, from the first cache folder that can hold it.

    A cached file that cannot be loaded is compiled again.
    """
    sources = (file.read_text() for file in (*compilation.HEADERS, *compilation.SOURCES, Path(compilation.__file__)))
    identity = "\n".join([*sources, *compilation.FLAGS, command, compilation.version(command), processor])
    name = f"molsaki-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    reason = OSError("no folder to store it in")
    for folder in _folders():
        try:
            _claim(folder)
            path = folder / name
            if path.exists():
                with contextlib.suppress(OSError):  # damaged
                    return ctypes.CDLL(str(path))
            compilation.compile_library(command, ("-march=native",), path)
            return ctypes.CDLL(str(path))
        except OSError as error:
            reason = error
    raise reason


def _claim(folder: Path) -> None:
    """Create the cache folder, and refuse it if another user could have placed a library there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder == _temporary():
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise OSError(f"{folder}: expected a folder that only this user can write to")


def _temporary() -> Path:
    """This user's cache in the temporary folder, where every user can create files."""
    return Path(tempfile.gettempdir()) / f"molsaki_kernels-{os.getuid()}"


def _folders() -> list[Path]:
    given = os.environ.get("MOLSAKI_CACHE")
    if given:
        return [Path(given)]
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [*([home / "molsaki_kernels"] if home.is_absolute() else []), _temporary()]
