"""The kernels compiled for GPUs that are not there: no spill, registers and shared memory that a launch gets, SASS."""

import re

import pytest

from pallas_kernels.warp.tiles import STAGING_BYTES
from tests import absent_gpus
from tests.test_house import ROOT

FAST = ("sm_80", "sm_86", "sm_120")
"""What differs most: 163 KiB of shared memory, 99 KiB, and the newest instructions."""

pytestmark = pytest.mark.skipif(absent_gpus.missing() is not None, reason=f"aot: {absent_gpus.missing()}")


def check(rows):
    for row in rows:
        target = absent_gpus.TARGETS[row["architecture"]]
        threads = 256 if row["registers"] * 256 <= 65536 else 128
        assert row["spills"] == 0, row
        assert row["registers"] <= 255, row
        assert row["registers"] * threads <= 65536, row
        assert row["shared_bytes"] <= target.block_bytes, row
        product = row["kernel"].startswith(("sparse24", "grouped24", "vnm", "tcgen05"))
        assert (row["sparse"] > 0) == product, row
        assert product == (row["shared_bytes"] > 16 * STAGING_BYTES), row
        assert not row["foreign"], row


@pytest.mark.parametrize("architecture", FAST)
def test_some_kernels(architecture):
    rows = absent_gpus.compile_kernels(architecture, every=False)
    assert len(rows) == 4
    check(rows)


@pytest.mark.slow
def test_every_kernel_on_every_architecture():
    """`python -m tests.absent_gpus table` prints the table anew where this says that it differs."""
    rows = [row for name in absent_gpus.TARGETS for row in absent_gpus.compile_kernels(name, every=True)]
    check(rows)
    assert _without_registers(absent_gpus.table(rows)) in _without_registers((ROOT / "docs" / "gpus.md").read_text())


def _without_registers(text: str) -> str:
    """They are another number with another version of ptxas."""
    return re.sub(r"\d+, (\d+ KiB)", r"\1", text)
