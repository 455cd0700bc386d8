"""The dependency audit: findings count, and a machine without a network passes and says so."""

import json

import pytest

from tests import audit

FOUND = {"id": "PYSEC-2026-1", "fix_versions": ["2.1"], "aliases": [], "description": "long"}
VERSIONS = ["first==1.0", "second==2.0", "third==3.0"]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """index(answers) -> (runner, what it was asked): pip-audit with an index that says this of each package."""
    monkeypatch.setattr(audit, "FOLDER", tmp_path)

    def make(answers, *, installs=True):
        asked = []

        def runner(command):
            if command[0] == "pip":
                if installs:
                    (tmp_path / "site" / "pip_audit").mkdir(parents=True)
                return "", "ERROR: no address" if not installs else ""
            asked.append((tmp_path / "asked.txt").read_text().split())
            if answers is None:
                return "", "WARNING: slow\nERROR: no route"
            names = [line.split("==") for line in asked[-1]]
            told = [{"name": name, "version": version, "vulns": answers[name]} if name in answers
                    else {"name": name, "skip_reason": "not found"} for name, version in names]  # fmt: skip
            return json.dumps({"dependencies": told, "fixes": []}), ""

        return runner, asked

    return make


def test_a_known_vulnerability_is_told_with_its_remedy(index, capsys):
    runner, asked = index({"first": [], "second": [FOUND]})
    assert audit.audit(VERSIONS, runner) == 1
    assert capsys.readouterr().out.splitlines() == [
        "second 2.0: PYSEC-2026-1, mended in 2.1",
        "audit: 1 known vulnerabilities; 2 of the 3 versions in constraints.txt looked up",
    ]
    assert asked == [VERSIONS[:1], VERSIONS]


@pytest.mark.parametrize(
    ("answers", "installs", "questions", "reason"),
    [
        (None, False, 0, "no network (pip-audit==2.10.1: ERROR: no address)"),
        (None, True, 1, "no network (ERROR: no route)"),
        ({"second": []}, True, 1, "the package index has no advisories"),
    ],
)
def test_without_an_answer_it_passes_and_says_why(index, capsys, answers, installs, questions, reason):
    runner, asked = index(answers, installs=installs)
    assert audit.audit(VERSIONS, runner) == 0
    assert capsys.readouterr().out == f"audit skipped: {reason}\n"
    assert len(asked) == questions


def test_nothing_known_is_no_skip(index, capsys):
    assert audit.audit(VERSIONS, index({"first": [], "third": []})[0]) == 0
    assert capsys.readouterr().out == "audit: nothing known; 2 of the 3 versions in constraints.txt looked up\n"


def test_every_version_in_the_constraints_is_asked_about():
    versions = audit.pins(audit.ROOT / "constraints.txt")
    assert len(versions) > 90
    assert all(line.count("==") == 1 for line in versions)
