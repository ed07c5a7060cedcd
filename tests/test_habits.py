"""That what is said in two places is the same in both: versions of the tools, and of the book."""

import re
import tomllib

import pytest
import yaml

from expvae_book.provenance import REPOSITORY

VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]


def read(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


def test_what_checks_commits_is_the_ruff_of_the_constraints():
    (version,) = re.findall(r"^ruff==(\S+)$", read("constraints.txt"), re.MULTILINE)
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [hook["entry"].split()[:2] for hook in repository["hooks"]] == [["ruff", "check"], ["ruff", "format"]]
    assert all(hook["additional_dependencies"] == [f"ruff=={version}"] for hook in repository["hooks"])


def test_the_version_is_that_of_the_citation_and_of_the_last_release():
    released = re.findall(r"^## \[(\d\S*)\] - (\S+)$", read("CHANGELOG.md"), re.MULTILINE)
    citation = yaml.safe_load(read("CITATION.cff"))
    assert released[0] == (citation["version"], str(citation["date-released"]))
    assert citation["version"] == VERSION
    assert sorted(released, reverse=True) == released


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_files_that_are_named_are_there(name):
    for path in re.findall(r"`((?:book|lib|tests|workflow|benchmarks)/[\w./-]*)`", read(name)):
        assert "NAME" in path or (REPOSITORY / path).exists(), path


def test_the_issue_form_asks_for_what_a_number_is_told_by():
    form = yaml.safe_load(read(".github/ISSUE_TEMPLATE/number-differs.yml"))
    asked = [part["id"] for part in form["body"] if "id" in part]
    assert asked == ["command", "published", "record", "versions", "again"]
    assert all(part["validations"]["required"] for part in form["body"] if "id" in part)
