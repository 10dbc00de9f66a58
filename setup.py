"""Build the C engine into the wheel, and the long description from README.md. All else is in pyproject.toml.

The wheel has one library for AVX2, one for AVX-512, and one for AVX-512 BF16 and AMX. Where they cannot be built
(another platform, no C compiler), or with MOLSAKI_PURE_WHEEL=1, the wheel is a pure one and says so; a machine that
installs it compiles the engine on first use. An editable install and an sdist contain the sources only.
"""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("molsaki_kernels") / "_native"
compilation = runpy.run_path(str(NATIVE / "compile.py"))
readme_for_pypi = runpy.run_path("readme_for_pypi.py")
README = Path("README.md").read_text(encoding="utf-8")


class BuildWithEngine(build_py):
    """Copy the Python files, then compile the libraries beside them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / NATIVE
        for old in folder.glob("*.so"):
            old.unlink()
        reason = build_engine(folder)
        if reason is not None:
            self.warn(f"the wheel is built without the C engine: {reason}. It will be compiled on first use.")


class WheelWithEngine(bdist_wheel):
    """Tag the wheel for this platform if it contains the engine, but for every Python: ctypes needs no Python ABI."""

    def run(self) -> None:
        self.run_command("build")
        has_engine = any((Path(self.get_finalized_command("build").build_lib) / NATIVE).glob("*.so"))
        self.root_is_pure = not has_engine
        self.distribution.has_ext_modules = lambda: has_engine  # then it is installed as a platform-dependent package
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform_ = super().get_tag()
        return (python, abi, platform_) if self.root_is_pure else (self.python_tag, "none", platform_)


class WithLongDescription(Distribution):
    """Take the URL of the repository from [project.urls], or from MOLSAKI_REPOSITORY_URL and add it to the metadata."""

    def parse_config_files(self, *args: Any, **kwargs: Any) -> None:
        super().parse_config_files(*args, **kwargs)
        metadata = self.metadata
        urls = metadata.project_urls = dict(metadata.project_urls or {})
        if url := os.environ.get("MOLSAKI_REPOSITORY_URL"):
            urls["Repository"] = url
        tag = f"v{metadata.version}"
        metadata.long_description = readme_for_pypi["long_description"](README, urls.get("Repository"), tag)


def build_engine(folder: Path) -> str | None:
    """Compile all variants into ``folder``, or none of them and return the reason."""
    if os.environ.get("MOLSAKI_PURE_WHEEL") == "1":
        return "MOLSAKI_PURE_WHEEL is 1"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it is written for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    command = compilation["compiler"]()
    if command is None:
        return "no C compiler (cc, gcc, clang or $CC)"
    built = [folder / f"molsaki-{name}.so" for name in compilation["VARIANTS"]]
    try:
        for variant, path in zip(compilation["VARIANTS"].values(), built, strict=True):
            compilation["compile_library"](command, variant.flags, path.resolve())
    except subprocess.CalledProcessError as error:
        for path in built:
            path.unlink(missing_ok=True)
        return f"{command} failed: {error.stderr.strip()}"
    return None


setup(
    cmdclass={"build_py": BuildWithEngine, "bdist_wheel": WheelWithEngine},
    distclass=WithLongDescription,
    long_description=README,
    long_description_content_type="text/markdown",
)
