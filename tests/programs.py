"""Where the programs of this project define their options."""

import re
from importlib.util import find_spec
from pathlib import Path


def source_of(module: str) -> str:
    """The text of a program that defines its options, with what the benchmarks of the kernels share."""
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    source = Path(spec.origin).read_text()
    if found := re.search(r"^from (pallas_kernels\.measure\.\w+) import main$", source, flags=re.MULTILINE):
        return source_of(found[1])
    return source + (source_of("pallas_kernels.measure.command_line") if "command_line.parser(" in source else "")
