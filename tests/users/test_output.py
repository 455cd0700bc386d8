"""Output is a convenience: a run outlives whoever reads it."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from tests.trainer import gin_bindings
from train.state.checkpoint import Checkpoints


def script(workdir, before="", **overrides) -> list[str]:
    """A command that trains 12 steps with `python -m train.main`'s own `main`, after the lines ``before``."""
    arguments = [f"--gin_bindings={one}" for one in gin_bindings(Train_sample_tokens=0, **overrides)]
    code = f"import sys, signal\nimport train.loop as loop\n{before}\nimport runpy\n"
    code += f"sys.argv = ['train.main', *{arguments!r}, '--workdir={workdir}']\n"
    code += "runpy.run_module('train.main', run_name='__main__', alter_sys=True)\n"
    return [sys.executable, "-c", code]


def saved_steps(workdir) -> list[int]:
    with Checkpoints(workdir, 2, writer=False) as checkpoints:
        return checkpoints.steps


AFTER_STEP_3 = """
_log = loop.Logger.log
def log(self, step, *rest):
    _log(self, step, *rest)
    if step == 3:
        {what}
loop.Logger.log = log
"""


def test_a_reader_that_ends_stops_no_run(tmp_path):
    """`python -m train.main ... | head -1`: the next line met a broken pipe, and nothing was saved."""
    process = subprocess.Popen(script(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(240) == 0
    assert saved_steps(tmp_path)[-1] == 12


@pytest.mark.parametrize(
    ("before", "what", "code", "saved"),
    [
        ("", "os.kill(os.getpid(), signal.SIGHUP)", 129, 3),
        ("signal.signal(signal.SIGHUP, signal.SIG_IGN)", "os.close(terminal)", 0, 12),
        ("", "os.close(terminal); os.kill(process.pid, signal.SIGINT)", 130, None),
    ],
    ids=["hangup saves", "nohup goes on", "Ctrl-C after the reader's end saves"],
)
def test_a_terminal_goes_away(tmp_path, before, what, code, saved):
    terminal, theirs = pty.openpty()
    inside = "os.kill" in what and "process" not in what
    pause = "print('three', flush=True); import time; time.sleep(1)"
    lines = AFTER_STEP_3.format(what=f"import os; {what}" if inside else pause)
    process = subprocess.Popen(script(tmp_path, f"{before}\n{lines}"), stdout=theirs, stderr=theirs)
    os.close(theirs)
    if not inside:
        seen = b""
        while b"three" not in seen:
            seen += os.read(terminal, 1000)
        os.close(terminal)
        if "SIGINT" in what:
            os.kill(process.pid, signal.SIGINT)
    assert process.wait(240) == code
    steps = saved_steps(tmp_path)
    assert steps[-1] == saved if saved else 3 <= steps[-1] <= 12


def test_words_that_a_terminal_cannot_show_are_escaped():
    code = "from train.output import outlive_output; outlive_output(); print('ü東'); print('end')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout == b"\\xfc\\u6771\nend\n"


def test_output_that_the_shell_has_closed():
    code = "from train.output import outlive_output; outlive_output(); print('a'); import sys; sys.stderr.write('b')"
    done = subprocess.run(f'{sys.executable} -c "{code}" >&- 2>&-', shell=True, check=False)
    assert done.returncode == 0
