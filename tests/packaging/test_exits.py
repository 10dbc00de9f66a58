"""Checks which failed imports are mistakes of the user, and which are faults of the program."""

from __future__ import annotations

import importlib
import sys

import pytest

from molsaki import doctor
from molsaki.cli import main
from molsaki.extras import MissingExtra, require


def import_statement(folder):
    import no_such_module  # noqa: F401


def import_of_a_missing_name(folder):
    from molsaki.doctor import no_such_name  # noqa: F401


def import_by_name(folder):
    importlib.import_module("molsaki.no_such_module")


def import_in_a_module_that_fails(folder):
    (folder / "module_that_fails.py").write_text("import no_such_module\n")
    importlib.import_module("module_that_fails")


def lazy_import_of_a_library(folder):
    """As `transformers.utils.import_utils` raises it."""
    try:
        import_by_name(folder)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Could not import module 'Trainer'.") from error


def refused_by_a_library(folder):
    raise ImportError("this needs the package deepspeed of at least 0.14")


def missing_extra(folder):
    require("train", "no_such_module", by="--endpoint:")


def missing_extra_after_an_import(folder):
    """As where an import fails and an extra is the cause."""
    try:
        import_by_name(folder)
    except ImportError as error:
        raise MissingExtra("no_such_module: expected to be installed") from error


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (import_statement, 70),
        (import_of_a_missing_name, 70),
        (import_by_name, 70),
        (import_in_a_module_that_fails, 70),
        (lazy_import_of_a_library, 70),
        (refused_by_a_library, 2),
        (missing_extra, 2),
        (missing_extra_after_an_import, 2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failed_import_is_a_fault_and_a_missing_extra_a_mistake(monkeypatch, capsys, tmp_path, function, code):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(doctor, "report", lambda: function(tmp_path))
    assert main(["doctor"]) == code
    error = capsys.readouterr().err
    assert ("internal error: " in error and "Traceback" in error) is (code == 70)
    assert error.startswith("molsaki doctor: error: ") is (code == 2)
