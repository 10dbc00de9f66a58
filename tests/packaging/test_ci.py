"""Checks that the files of GitHub Actions and pre-commit agree with the rest of the tree."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW, HOOKS = ROOT / ".github/workflows/ci.yml", ROOT / ".pre-commit-config.yaml"
pytestmark = pytest.mark.skipif(not WORKFLOW.exists() or not HOOKS.exists(), reason="an sdist does not have them")


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_workflow_runs_the_script_on_the_declared_pythons():
    job = read(WORKFLOW)["jobs"]["ci"]
    declared = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert job["strategy"]["matrix"]["python"] == declared == ["3.10", "3.13"]
    assert job["steps"][-1]["run"] == ".ci/run" and os.access(ROOT / ".ci/run", os.X_OK)


def test_what_the_workflow_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, job in read(WORKFLOW)["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            for file in step.get("with", {}).get("cache-dependency-path", "").split():
                assert (ROOT / file).exists(), file
            target, *settings = step.get("run", "make check").removeprefix("make ").split()
            assert target == ".ci/run" or re.search(rf"^{target}:", makefile, re.MULTILINE), target
            for variable, value in (setting.split("=") for setting in settings):
                assert re.search(rf"^{variable} \?=", makefile, re.MULTILINE), variable
                assert variable != "CONSTRAINTS" or (ROOT / value).exists()


def test_pre_commit_has_the_ruff_of_the_constraints():
    (pinned,) = re.findall(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    hooks = [hook for repository in read(HOOKS)["repos"] for hook in repository["hooks"]]
    assert [hook["additional_dependencies"] for hook in hooks] == [[pinned]] * 2
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
