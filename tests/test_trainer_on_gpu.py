"""The page that the trainer's run on a GPU writes."""

from tests.trainer_on_gpu import ORDER, PAGE, markdown

MESSAGE = "exit code 1: Out of memory. [allocator=''] [executable_name='jit_train_step'] | `a`"


def test_a_failed_part_is_one_row_with_its_message_as_code():
    """mkdocs takes [..][..] outside of code for a reference, and refuses one that leads nowhere."""
    part = {"part": ORDER[0], "ok": False, "seconds": 1.0, "problem": MESSAGE}
    result = {"size": "125m", "device": "GPU", "date": "today", "jax": "1", "batch": "a batch", "data": "text"}
    (row,) = [line for line in markdown(result | {"parts": [part]}).splitlines() if "failed" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        PAGE[ORDER[0]][0],
        "**failed**: `exit code 1: Out of memory. [allocator=''] [executable_name='jit_train_step'] / 'a'`",
        "1",
        "today",
    ]
