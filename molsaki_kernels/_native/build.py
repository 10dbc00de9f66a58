"""Compile and load the C sources of this folder.

Compiled once a machine, with the C compiler that is there (``$CC``, cc, gcc or clang), for the processor that is there;
kept in ``$MOLSAKI_CACHE``, else ``$XDG_CACHE_HOME/molsaki_kernels`` (``~/.cache``), else a temporary folder. Without a
compiler, or with ``MOLSAKI_NATIVE=0``, attention on a CPU is PyTorch's and its map is made by plain PyTorch
(``../stepmap.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = sorted((Path(__file__).parents[1] / "csrc").glob("*.c"))
HEADERS = sorted((Path(__file__).parents[1] / "csrc").glob("*.h"))
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
NEEDED = {"avx2", "fma"}
MAX_HEAD_DIM = 256  # MAX_D of tiles.h


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """Why this machine has no native library, or None. The first call may compile it, in seconds."""
    return _loaded()[1]


def why_not_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why such q, k and v cannot be handed to the library, or None."""
    if device.type != "cpu":
        return f"it takes CPU tensors, not {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return f"it takes head_dim in multiples of 16 up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


def library() -> ctypes.CDLL:
    """The library; only where :func:`why_not` is None."""
    return _loaded()[0]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("MOLSAKI_NATIVE") == "0":
        return None, "switched off by MOLSAKI_NATIVE=0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, f"written for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    processor = _processor()
    if not set(processor.split()) >= NEEDED:
        return None, "the processor has no AVX2 and FMA"
    command = compiler()
    if command is None:
        return None, "no C compiler (cc, gcc, clang or $CC)"
    try:
        return _made(command, processor), None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return None, f"{command} failed: {lines[-1]}"
    except OSError as error:
        return None, f"could not be compiled or loaded: {error}"


def compiler() -> str | None:
    """The C compiler's path, or None."""
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


@torch.compiler.assume_constant_result
def has_amx() -> bool:
    """Whether PyTorch's bfloat16 products run on AMX here, which this library does not use."""
    return platform.system() == "Linux" and "amx_bf16" in _processor().split()


@functools.cache
def _processor() -> str:
    """Model and features, which decide what ``-march=native`` means."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return " ".join(next((x for x in lines if x.startswith(name)), "") for name in ("model name", "flags"))


def _made(command: str, processor: str) -> ctypes.CDLL:
    """The library from the first folder that can hold it; one that cannot be loaded is compiled once more."""
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    identity = "\n".join([*(file.read_text() for file in (*HEADERS, *SOURCES)), *FLAGS, command, version, processor])
    name = f"molsaki-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    reason = OSError("no folder to keep it in")
    for folder in _folders():
        try:
            _own(folder)
            path = folder / name
            if path.exists():
                with contextlib.suppress(OSError):  # damaged
                    return _load(path)
            _compile(command, path)
            return _load(path)
        except OSError as error:
            reason = error
    raise reason


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.molsaki_fold.restype = loaded.molsaki_attention_work.restype = ctypes.c_int64
    return loaded


def _compile(command: str, path: Path) -> None:
    handle, made = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        call = [command, *FLAGS, *map(str, SOURCES), "-o", made]
        subprocess.run(call, capture_output=True, text=True, check=True)
        os.chmod(made, 0o755)
        os.replace(made, path)  # whole or not at all, whoever else compiles it
    finally:
        Path(made).unlink(missing_ok=True)


def _own(folder: Path) -> None:
    """Make a folder, or see that nobody else could have put a library of his own into the one that is there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder == _shared():
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise OSError(f"{folder}: expected a folder that only this user can write to")


def _shared() -> Path:
    """In a folder where everybody can make files."""
    return Path(tempfile.gettempdir()) / f"molsaki_kernels-{os.getuid()}"


def _folders() -> list[Path]:
    given = os.environ.get("MOLSAKI_CACHE")
    if given:
        return [Path(given)]
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [*([home / "molsaki_kernels"] if home.is_absolute() else []), _shared()]
