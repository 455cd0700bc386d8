"""Where the time of a step goes: what a device does during traced steps, by part of the model.

A kernel belongs to the part in whose scope its HLO operation was traced: the innermost one of `PARTS` in the
operation's name, which model and step give by `jax.named_scope`. A fusion across parts counts as that of its root.
What has an operation outside those scopes (norms, embedding, sums) is ``other``; a kernel that no operation of the
program is known for is ``unknown``, such as those of CUDA graphs, which do not tell (trace programs that were compiled
with `NO_COMMAND_BUFFERS`).
"""

import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax

PARTS = ("ffn", "attention", "projections", "head", "optimizer")
NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
"""XLA's option by which the host launches kernel by kernel, without CUDA graphs: 1.6 % slower for a step of 1B."""
COMMUNICATION, OTHER, UNKNOWN, IDLE = "communication", "other", "unknown", "idle"
_SCOPE = re.compile(rf"\b({'|'.join(PARTS)})\b")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_EXCHANGE = re.compile(r"nccl|all-?gather|all-?reduce|all-?to-?all|reduce-?scatter|collective", re.IGNORECASE)
_COPY = re.compile(r"mem(cpy|set)", re.IGNORECASE)
_CONTAINERS = ("while", "conditional", "call")  # on a CPU they take the time of what they contain


class Work(NamedTuple):
    """A kernel or a copy on a device; times in ns."""

    name: str
    operation: str
    """The HLO instruction, or "" where the trace does not say."""
    start: float
    end: float


def record(run: Callable[[], Any]) -> list[Work]:
    """What the first device does while ``run()`` and what it has sent off run, in order of time.

    Raises:
      ValueError: the profiler saw nothing of a device.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        with warnings.catch_warnings():
            # jaxlib's own types warn when they are first met, and where warnings are errors it aborts.
            warnings.simplefilter("ignore", DeprecationWarning)
            found = sorted(_device_work(jax.profiler.ProfileData.from_file(str(files[0]))), key=lambda w: w.start)
    if not found:
        raise ValueError("the profiler's trace holds no work of a device; is another profiler attached to it?")
    return found


def _device_work(trace: Any) -> Iterable[Work]:
    planes = {plane.name: plane for plane in trace.planes}
    device = min((name for name in planes if name.startswith("/device:GPU")), default=None)
    for line in planes[device or "/host:CPU"].lines:
        if device and not line.name.startswith("Stream"):
            continue  # summaries of what the streams show
        for event in line.events:
            operation = str(dict(event.stats).get("hlo_op", ""))
            if device or (operation and operation.split(".")[0] not in _CONTAINERS):
                yield Work(event.name, operation, event.start_ns, event.start_ns + event.duration_ns)


def operation_names(hlo: str) -> dict[str, str]:
    """The instructions of a compiled program -> the names, with their scopes, of what they compute, or "".

    A fusion that has no name of its own has that of the last instruction inside it that has a scope.
    """
    names: dict[str, str] = {}
    inside: dict[str, str] = {}
    computation = ""
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start[1]
        elif instruction := _INSTRUCTION.match(line):
            own, called = _NAME.search(line), _CALLED.search(line)
            name = own[1] if own else inside.get(called[1], "") if called else ""
            names[_plain(instruction[1])] = name
            if _SCOPE.search(name):
                inside[computation] = name
    return names


def _plain(instruction: str) -> str:
    """As kernels are called after instructions."""
    return re.sub(r"[.\-]", "_", instruction)


def _operation_name(work: Work, names: dict[str, str]) -> str | None:
    """What a piece of work computes; None if no instruction of the program is known to have launched it."""
    return names.get(_plain(work.operation), names.get(_plain(work.name)))


def part_of(work: Work, names: dict[str, str]) -> str:
    """The part that a piece of work belongs to."""
    if _EXCHANGE.search(work.name) or _EXCHANGE.search(work.operation):
        return COMMUNICATION
    name = _operation_name(work, names)
    if name is None:
        return OTHER if _COPY.match(work.name) else UNKNOWN
    scopes = _SCOPE.findall(name)
    return scopes[-1] if scopes else OTHER


def part_ms(found: Sequence[Work], names: dict[str, str], steps: int, step_ms: float) -> dict[str, float]:
    """Milliseconds a step: every part's, ``unknown`` and ``idle``, all together ``step_ms``.

    Where kernels overlap, what began first counts. Of copies (``other``) and of the exchange between devices only what
    no kernel hides counts.

    Args:
      found: the work of ``steps`` steps, in order of time.
      names: from ``operation_names``.
      step_ms: of a step that was not traced, as tracing delays what the host sends off.
    """
    spent = dict.fromkeys((*PARTS, COMMUNICATION, OTHER, UNKNOWN), 0.0)
    own = [(work, part_of(work, names)) for work in found]
    local = [(work, part) for work, part in own if part != COMMUNICATION]
    end = float("-inf")
    for work, part in local:
        if not _COPY.match(work.name):
            spent[part] += max(0.0, work.end - max(end, work.start))
            end = max(end, work.end)
    busy = _covered(work for work, _ in local)
    spent[OTHER] += busy - sum(spent.values())
    spent[COMMUNICATION] = _covered(found) - busy
    spent = {part: ns / steps / 1e6 for part, ns in spent.items()}
    return spent | {IDLE: step_ms - sum(spent.values())}


def _covered(found: Iterable[Work]) -> float:
    total, end = 0.0, float("-inf")
    for work in found:
        total += max(0.0, work.end - max(end, work.start))
        end = max(end, work.end)
    return total


def table(found: Sequence[Work], names: dict[str, str], steps: int, rows: int) -> str:
    """The kernels that take most time: milliseconds and launches a step, part, kernel, operation."""
    ordered = sorted(found, key=lambda w: (w.name, w.operation))
    groups = []
    for (name, operation), same in groupby(ordered, key=lambda w: (w.name, w.operation)):
        works = list(same)
        ms = sum(work.end - work.start for work in works) / steps / 1e6
        meaning = _operation_name(works[0], names) or ""
        groups.append((ms, len(works) / steps, part_of(works[0], names), name[:60], operation, meaning[-90:]))
    groups.sort(reverse=True)
    return "\n".join(f"{ms:8.3f} {count:6.0f} {part:13} {' '.join(rest)}" for ms, count, part, *rest in groups[:rows])
