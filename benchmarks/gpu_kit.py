"""Compiles the kernels of gpu_first.sh and gpu_second.sh beforehand, without a GPU, and unpacks them.

    python -m benchmarks.gpu_kit prepare                  with the GPU machine's Python, torch and triton (make gpu-kit)
    python -m benchmarks.gpu_kit unpack first|second      on the GPU machine; the scripts do that
    python -m benchmarks.gpu_kit slowest KERNELS.CSV      kernels that took longest against their prediction

The kit has two halves, each small enough to be carried to a machine on its own: ``first`` has Triton's cache for sm_90
and the first half of flash-attn 4, ``second`` the other half. The cache is filled by running both scripts on the
stand-in (``stand_in.py``), so that it holds the kernels that they will launch. It works if Python, torch and triton
have the same versions as here; otherwise kernels are compiled when they are needed, which only takes time.

Triton's cache holds absolute paths, so it is filled and unpacked in the same folder, ``/tmp/molsaki-gpu-kit``.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

HOME = Path("/tmp/molsaki-gpu-kit")
# Versions of the target machine. Another patch release of torch has different kernels, but the same keys.
VERSIONS = {"Python": "3.12", "torch": "2.11", "triton": "3.6"}
# flash-attn 4 and what it imports, without torch. The compiled kernels are valid for these versions only.
FLASH4 = (
    "flash-attn-4==4.0.0b36",
    "nvidia-cutlass-dsl==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1",
    "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cutlass-dsl-libs-cu13==4.8.1",
    "quack-kernels==0.6.5",
    "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5",
    "einops==0.8.2",
)
LIMIT = 60 << 20  # bytes of a half; what carries it may take 64 MiB with the working tree
TRITON, FLASH4_SITE, FLASH4_CACHE = "triton", "flash-attn-4", "flash-attn-4-cache"
DEFAULT_KERNELS = "map_partials|map_dq|map_dk|fold|flash_forward"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kit", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_ = commands.add_parser("prepare", help="write the kit")
    prepare_.add_argument("--no-flash4", action="store_true", help="without flash-attn 4")
    prepare_.add_argument("--scripts", nargs="+", default=["first", "second"], choices=["first", "second"])
    unpack_ = commands.add_parser("unpack", help="unpack a half, and say whether it fits this machine")
    unpack_.add_argument("half", choices=["first", "second"])
    for command in (prepare_, unpack_):
        command.add_argument("--kit", type=Path, default=Path("gpu-kit"))
        command.add_argument("--home", type=Path, default=HOME)
    slowest_ = commands.add_parser("slowest", help="print kernels for Nsight Compute, as a regular expression")
    slowest_.add_argument("csv", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "slowest":
        print(slowest(arguments.csv))
        return 0
    if arguments.command == "unpack":
        print(*unpack(arguments.half, arguments.kit, arguments.home), sep="\n")
        return 0
    try:
        prepare(arguments.kit, arguments.home, not arguments.no_flash4, arguments.scripts)
    except ValueError as reason:
        print(f"gpu-kit: {reason}", file=sys.stderr)
        return 1
    return 0


def prepare(kit: Path, home: Path, flash4: bool, scripts: list[str]) -> None:
    """Fill the caches in ``home`` and pack them into ``kit``. Existing content of ``home`` is reused.

    Raises:
        ValueError: the versions are not those of the machine that the kit is for, a half is too large, or a rehearsal
            failed; the kit is written then, and may lack kernels.
    """
    check_versions()
    home.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHON": sys.executable, "KIT_HOME": str(home)}
    if flash4:
        install_flash4(home / FLASH4_SITE)
    failed = []
    for mode in ("fill", "dry"):
        begin, keys = time.monotonic(), []
        for script in scripts:
            out = home / f"rehearsal-{mode}-{script}"
            shutil.rmtree(out, ignore_errors=True)
            command = ["bash", f"benchmarks/gpu_{script}.sh"]
            options = environment | {"OUT": str(out), "REHEARSE": mode}
            if subprocess.run(command, env=options, stdout=subprocess.DEVNULL, check=False).returncode:
                failed.append(f"{mode} {script}")
            keys += read_keys(out / "keys.jsonl")
            print(*(f"  {mode} {script}: {line}" for line in (out / "status.txt").read_text().splitlines()), sep="\n")
        print(f"{mode}: {count_keys(keys)}, {time.monotonic() - begin:.0f} s", flush=True)
    # The processes of the dry rehearsal computed the keys anew and compiled nothing.
    matched = {key["key"] for key in keys if key["known"]}
    shutil.rmtree(kit, ignore_errors=True)
    facts = {"triton_key": triton_key(), "keys": len({key["key"] for key in keys}), "matched": len(matched)}
    prune(home / TRITON, matched)
    for half in ("first", "second"):
        (kit / half).mkdir(parents=True)
        (kit / half / "commit").write_text(commit() + "\n")
        (kit / half / "facts.json").write_text(json.dumps(facts) + "\n")
    pack(kit / "first/triton.tar.xz", home, [TRITON])
    if flash4:
        whole = kit / "flash4.tar.xz"
        pack(whole, home, [FLASH4_SITE, FLASH4_CACHE])
        data = whole.read_bytes()
        whole.unlink()
        room = LIMIT - (kit / "first/triton.tar.xz").stat().st_size - (1 << 16)  # beside it are small files
        cut = min(room, len(data))
        (kit / "first/flash4.1").write_bytes(data[:cut])
        (kit / "second/flash4.2").write_bytes(data[cut:])
        digest = hashlib.sha256(data).hexdigest()
        (kit / "second/flash4.sha256").write_text(digest + "\n")
    for half in ("first", "second"):
        files = sorted((kit / half).iterdir())
        size = sum(file.stat().st_size for file in files)
        print(f"{kit / half}: {size / 2**20:.1f} MiB ({', '.join(f'{f.name} {f.stat().st_size}' for f in files)})")
        if size > LIMIT:
            raise ValueError(f"{kit / half} is larger than {LIMIT >> 20} MiB")
    print(f"{len(matched)} of {facts['keys']} keys match; triton_key {facts['triton_key'][:16]}")
    if failed:
        raise ValueError(f"the kit is written, but rehearsals failed: {', '.join(failed)}; their logs are in {home}")


def check_versions() -> None:
    import torch
    import triton

    found = {"Python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    wrong = [f"{name} {found[name]}, expected {want}" for name, want in VERSIONS.items() if not fits(found[name], want)]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}. The kit must be made with the versions of the GPU machine, in an environment of its "
            "own: make gpu-kit GPU_PYTHON=python3.12 creates it"
        )


def fits(found: str, wanted: str) -> bool:
    return found == wanted or found.startswith((f"{wanted}.", f"{wanted}+"))


def install_flash4(site: Path) -> None:
    """Install flash-attn 4 into a separate folder, without torch, unless these versions are installed there."""
    stamp = site / "installed.txt"
    if stamp.exists() and stamp.read_text().split() == list(FLASH4):
        return
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*pip, "--no-deps", "--target", str(site), *FLASH4], check=True)
    stamp.write_text("\n".join(FLASH4) + "\n")


def triton_key() -> str:
    """Return the hash of Triton's own version, a part of the key of every compiled kernel."""
    from triton.runtime.cache import triton_key as key

    return hashlib.sha256(key().encode()).hexdigest()


def read_keys(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count_keys(keys: list[dict]) -> str:
    """Describe the kernels of a rehearsal: how many, how many were in the cache, of which names."""
    distinct = {key["key"]: key for key in sorted(keys, key=lambda key: key["known"])}
    names = Counter(key["kernel"].removesuffix("_kernel") for key in distinct.values())
    known = {key["key"] for key in keys if key["known"]}
    seconds = sum(key["seconds"] for key in keys)
    listed = ", ".join(f"{name} {count}" for name, count in names.most_common())
    return (
        f"{len(distinct)} kernels ({listed}), {len(known)} of them in the cache, {seconds:.0f} CPU seconds to compile"
    )


def cache_folder(key: str) -> str:
    """Return the name of a key's folder in Triton's cache."""
    return base64.b32encode(bytes.fromhex(key)).decode().rstrip("=")


def prune(cache: Path, keys: set[str]) -> None:
    """Remove kernels of earlier code from Triton's cache; C launchers stay."""
    wanted = {cache_folder(key) for key in keys}
    for folder in cache.iterdir() if cache.exists() else ():
        if any(folder.glob("*.cubin")) and folder.name not in wanted:
            shutil.rmtree(folder)


def pack(target: Path, home: Path, names: list[str]) -> None:
    """Write folders of ``home`` as a tar.xz, by the program xz if it is there, which uses every processor."""
    with contextlib.ExitStack() as stack:
        if shutil.which("xz"):
            file = stack.enter_context(target.open("wb"))
            process = stack.enter_context(subprocess.Popen(["xz", "-6", "-T0"], stdin=subprocess.PIPE, stdout=file))
            archive = stack.enter_context(tarfile.open(fileobj=process.stdin, mode="w|"))
        else:
            archive = stack.enter_context(tarfile.open(target, "w:xz", preset=6))
        for name in names:
            if (home / name).exists():
                archive.add(home / name, name, filter=lambda file: None if "__pycache__" in file.name else file)


def unpack(half: str, kit: Path, home: Path) -> list[str]:
    """Unpack a half of the kit into ``home``; return lines that say what it holds and whether it fits this machine."""
    folder = kit / half
    if not folder.is_dir():
        return [f"kit: {folder} is not there; kernels are compiled as they are needed (make gpu-kit)"]
    home.mkdir(parents=True, exist_ok=True)
    lines = []
    alone = half == "second" and not (home / TRITON).exists()  # the first script did not run on this machine
    if alone and not (kit / "first").is_dir():
        lines.append("kit: the compiled Triton kernels came with the first script; here every kernel is compiled anew")
    if half == "first" or (alone and (kit / "first").is_dir()):
        folder = kit / "first"
        facts = json.loads((folder / "facts.json").read_text())
        extract(folder / "triton.tar.xz", home)
        broken = remove_broken_launchers(home / TRITON)
        here = triton_key()
        same = "the same here" if here == facts["triton_key"] else f"here {here[:16]}: every kernel is compiled anew"
        kernels = len(list((home / TRITON).glob("*/*.cubin")))
        lines.append(f"kit: {kernels} kernels, {facts['matched']} of {facts['keys']} keys matched when it was made")
        lines.append(f"kit: triton_key {facts['triton_key'][:16]}, {same}")
        if broken:
            lines.append(f"kit: {broken} launchers do not load here and are built anew")
        if (folder / "flash4.1").exists():
            shutil.copy(folder / "flash4.1", home)
    folder = kit / half
    if half == "second" and (folder / "flash4.2").exists():
        first = next((file for file in (home / "flash4.1", kit / "first/flash4.1") if file.exists()), None)
        if first is None:
            return [*lines, "kit: the first half of flash-attn 4 is not on this machine; it came with the first script"]
        data = first.read_bytes() + (folder / "flash4.2").read_bytes()
        if hashlib.sha256(data).hexdigest() != (folder / "flash4.sha256").read_text().strip():
            return [*lines, "kit: the halves of flash-attn 4 are not of one kit"]
        whole = home / "flash4.tar.xz"
        whole.write_bytes(data)
        extract(whole, home)
        whole.unlink()
        lines.append(f"kit: flash-attn 4 unpacked, {len(list((home / FLASH4_CACHE).rglob('*.o')))} compiled kernels")
    return lines


def extract(archive: Path, home: Path) -> None:
    """Unpack with the programs tar and xz if they are there, which use several processors."""
    if shutil.which("tar") and shutil.which("xz"):  # tar reads xz by the program xz, which small images lack
        subprocess.run(
            ["tar", "-xf", str(archive), "-C", str(home)], check=True, env=os.environ | {"XZ_DEFAULTS": "-T0"}
        )
    else:
        with tarfile.open(archive) as file:
            file.extractall(home, filter="data")


def remove_broken_launchers(cache: Path) -> int:
    """Remove C launchers that cannot be loaded here, because the system's libraries are older; return their number."""
    broken = 0
    for launcher in cache.glob("*/*.so"):
        try:
            ctypes.CDLL(str(launcher))
        except OSError:
            shutil.rmtree(launcher.parent)
            broken += 1
    return broken


def slowest(path: Path) -> str:
    """Return the project's kernels that took longest against their predictions, joined by ``|``.

    At most five, the farthest above its prediction first; the usual ones if there are no times with a prediction.
    """
    if not path.exists():
        return DEFAULT_KERNELS
    with path.open(newline="") as file:
        records = [r for r in csv.DictReader(file) if r["predicted_us"] and float(r["predicted_us"]) > 0]
    over: dict[str, float] = {}
    for record in records:
        name = record["kernel"].removesuffix("_kernel")
        over[name] = max(over.get(name, 0.0), float(record["us"]) / float(record["predicted_us"]))
    return "|".join(sorted(over, key=lambda name: -over[name])[:5]) or DEFAULT_KERNELS


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
