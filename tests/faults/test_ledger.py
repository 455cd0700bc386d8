"""What the documentation says was tried is what the ledger says."""

import json

from tests.faults import ledger
from tests.test_house import ROOT


def test_the_documented_table_is_the_committed_ledgers():
    table = ledger.table(ROOT / "docs" / "results" / "faults.jsonl")
    assert len(table.splitlines()) > 20
    assert table in (ROOT / "docs" / "reliability.md").read_text()


def test_lines_of_one_fault_are_added_up(tmp_path, monkeypatch):
    path = tmp_path / "faults.jsonl"
    monkeypatch.setenv("FAULTS_LOG", str(path))
    ledger.tried("kill", 1200, "same bits", seconds=0.9)
    ledger.tried("long", 1, "flat", resident_MiB=[7, 6, 8])
    ledger.tried("kill", 3, "same bits", seconds=0.2)
    ledger.tried("kill", 1, "lost")
    ledger.tried(ledger.WHOLE, 8, "passed", passed=7, failed=0, error=0, skipped=1, minutes=25.5)
    cores, date = (json.loads(path.read_text().splitlines()[0])[name] for name in ("cores", "date"))
    assert ledger.table(path).splitlines()[2:] == [
        "| kill | 1,203 | same bits; at most 0.9 s |",
        "| long | 1 | flat; 6 to 8 MiB resident |",
        "| kill | 1 | lost |",
        "",
        f"7 passed, 0 failed, 0 errors, 1 skipped in 25.5 minutes on {cores} cores, {date}.",
    ]
