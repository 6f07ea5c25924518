"""What GitHub does with the project: the parts of its workflows that can be run here."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import check_mac
from mlx_flashhead import __version__

CHECKOUT = Path(__file__).parents[1]


def workflow(name):
    """The jobs of a workflow."""
    return yaml.safe_load((CHECKOUT / ".github" / "workflows" / name).read_text())["jobs"]


def project():
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


def test_a_mac_runs_every_check_whatever_became_of_the_others():
    steps = [s for s in workflow("tests.yml")["mac"]["steps"] if "check_mac.sh" in s.get("run", "")]
    asked = [step["run"].split() for step in steps]
    assert asked == [["scripts/check_mac.sh", name] for name in check_mac.CHECKS]
    assert all("!cancelled()" in step["if"] for step in steps)


def test_the_oldest_python_is_tested():
    versions = workflow("tests.yml")["linux"]["strategy"]["matrix"]["python"]
    oldest = min(versions, key=lambda version: tuple(map(int, version.split("."))))
    supported = SpecifierSet(project()["requires-python"])
    major, minor = oldest.split(".")
    assert oldest in supported and f"{major}.{int(minor) - 1}" not in supported


@pytest.mark.parametrize("tag, code", [(f"v{__version__}", 0), ("v99.0", 1), (__version__, 1)])
def test_a_release_is_refused_whose_tag_is_not_the_version(tag, code):
    steps = workflow("release.yml")["build"]["steps"]
    (script,) = (step["run"] for step in steps if "GITHUB_REF_NAME" in step.get("run", ""))
    result = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=CHECKOUT,
        env={**os.environ, "GITHUB_REF_NAME": tag},
        capture_output=True,
        text=True,
    )
    assert result.returncode == code
    assert not code or (f"tag is {tag}" in result.stdout and __version__ in result.stdout)


def test_only_what_is_tested_and_built_is_published():
    publish = workflow("release.yml")["publish"]
    assert set(publish["needs"]) == {"tests", "build"}
    assert publish["permissions"] == {"id-token": "write"}


def test_commits_are_formatted_by_the_ruff_of_the_tests():
    (ruff,) = (r for r in project()["optional-dependencies"]["test"] if re.match(r"ruff\b", r))
    (hooks,) = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())["repos"]
    assert all(hook["additional_dependencies"] == [ruff] for hook in hooks["hooks"])
