"""One setting or a grid of them on one model and one text: calibrated, compared, written down cell by cell.

Interrupted, the same command continues: cells that are written are not computed again, and calibration is kept.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from train.sparsity import saved
from train.sparsity.subject import Subject
from train.sparsity.texts import Windows
from venom_jax.activation.criteria import Statistics
from venom_jax.activation.linear import Parameters
from venom_jax.activation.patterns import Unstructured, parse_pattern
from venom_jax.activation.settings import Sparsity, as_json, describe, parse_layers, parse_mitigation
from venom_jax.pretrained import calibration, comparison
from venom_jax.pretrained.architecture import Architecture

CELLS = "cells.jsonl"
CALIBRATION = "calibration.safetensors"
LEARNING = "learning.safetensors"
WEIGHT_BASELINES = ("magnitude", "wanda")
KEEP_EVERY = 16  # steps of learning between two states that are kept

Row = dict[str, Any]


class Cell(NamedTuple):
    """One entry of a grid.

    Attributes:
      name: as tables show it.
      sparsity: the setting; None for the dense model.
      weights: "magnitude" or "wanda" where weights are pruned by the setting's pattern instead of activations.
    """

    name: str
    sparsity: Sparsity | None
    weights: str | None = None


@dataclass(frozen=True)
class Options:
    """How cells are computed.

    Attributes:
      seed: of calibration and learning.
      skip_first: tokens of each calibration window that statistics leave out.
      learn_steps, learn_rate: of learned parameters.
      budget: share of the linear operations to prune at most; None for all of the setting's layers.
    """

    seed: int = 0
    skip_first: int = 1
    learn_steps: int = 64
    learn_rate: float = 1e-3
    budget: float | None = None


def parse_grid(text: str, base: Sparsity) -> list[Cell]:
    """Cells for `pattern=2:4,8:16;criterion=act,wina;mitigation=none,channel+var;layers=all,safe`, all combinations.

    A value of layers joins names by +. The criteria `magnitude` and `wanda` prune weights instead and take no
    mitigation.

    Raises:
      ValueError: an unknown key or value, or one given twice.
    """
    known = {"pattern": [], "criterion": [], "mitigation": [], "layers": []}
    for part in filter(None, (one.strip() for one in text.split(";"))):
        key, _, values = part.partition("=")
        if key not in known or known[key]:
            raise ValueError(f"grid {part!r}: write each of {', '.join(known)} at most once, as KEY=VALUE,VALUE")
        known[key] = [value.strip() for value in values.split(",") if value.strip()]
        if not known[key]:
            raise ValueError(f"grid {part!r} gives no value")
    cells: list[Cell] = []
    for pattern, criterion, mitigation, layers in itertools.product(*(values or [None] for values in known.values())):
        setting = base
        if pattern is not None:
            setting = replace(setting, pattern=parse_pattern(pattern))
        if layers is not None:
            setting = replace(setting, layers=parse_layers(layers))
        if criterion in WEIGHT_BASELINES:
            if mitigation in (None, "none"):
                plain = Sparsity(setting.pattern, layers=setting.layers)
                cells.append(Cell(f"{describe(plain).replace(' act', '', 1)} weights {criterion}", plain, criterion))
            continue
        if mitigation is not None:
            cleared = replace(setting, shift="none", variance="none", learn_bias=False, learn_scale=False, low_rank=0)
            setting = replace(cleared, **parse_mitigation(mitigation))
        if criterion is not None:
            setting = replace(setting, criterion=criterion)
        cells.append(Cell(describe(setting), setting))
    if doubled := {cell.name for cell in cells if [other.name for other in cells].count(cell.name) > 1}:
        raise ValueError(f"grid {text!r} names {', '.join(sorted(doubled))} twice")
    return cells


def run_grid(
    subject: Subject,
    cells: Sequence[Cell],
    text: Windows,
    calibration_text: Windows,
    output: Path,
    options: Options = Options(),
    *,
    say: Callable[[str], object] = print,
) -> list[Row]:
    """Rows of the dense model and of each cell; each is appended to `OUTPUT/cells.jsonl` as it is done.

    Each cell of activations is saved under `OUTPUT/CELL/`, in OUTPUT itself where it is the only one.

    Raises:
      ValueError: OUTPUT holds cells of another model, text or calibration, or cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror}; give --output another folder") from error
    key = {"model": subject.hashes, "text": text.sha256, "calibration": calibration_text.sha256}
    done = {row["cell"]: row for row in read_rows(output / CELLS)}
    for row in done.values():
        check_same(row, key, str(output / CELLS))
    arch, weights = subject.architecture, subject.weights
    dense: list[Any] = []
    collected: calibration.Collected | None = None
    rows = []
    for cell in (Cell("dense", None), *cells):
        chosen = _identity(cell, options)
        if cell.name in done:
            if done[cell.name]["identity"] != chosen:
                raise ValueError(
                    f"{output / CELLS} holds {cell.name!r} computed with other settings; give --output another folder"
                )
            rows.append(done[cell.name])
            continue
        if cell.sparsity is not None and collected is None and cell.weights != "magnitude":
            collected = _calibrated(subject, calibration_text, output, options, say)
        # Of the whole text once, and not at all where every cell is written already.
        dense = dense or [comparison.dense_states(arch, weights, jnp.asarray(one)) for one in text.tokens]
        place = output if len(cells) == 1 else output / file_name(cell.name)
        row = _run_cell(subject, cell, text, calibration_text, dense, collected, place, options, say)
        row = {"cell": cell.name, "identity": chosen, "key": key} | row
        with (output / CELLS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        say(f"{cell.name}: loss {row['loss']:.4f}, KL {row['kl']:.4f}, same likeliest token {row['agree']:.1%}")
    return rows


def read_rows(path: Path) -> list[Row]:
    """The cells that are written; a last line that was cut off does not count.

    Raises:
      ValueError: a line that is no cell.
    """
    if not path.is_file():
        return []
    content = path.read_text()
    lines = content.splitlines()
    if content and not content.endswith("\n"):
        lines = lines[:-1]
        path.write_text("".join(f"{line}\n" for line in lines))
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append(row | {"cell": row["cell"], "key": dict(row["key"]), "losses": list(row["losses"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no cell of a grid: {error!r}") from error
    return rows


def check_same(row: Row, key: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless a row was computed on the same model, text and calibration."""
    names = {"model": "another model", "text": "other windows of text", "calibration": "another calibration text"}
    if unlike := [names[name] for name in names if row["key"].get(name) != key[name]]:
        raise ValueError(
            f"{where} holds {row['cell']!r} of {' and '.join(unlike)}; such rows do not belong in one table. Give "
            "--output another folder"
        )


def pruned_share(arch: Architecture, sparsity: Sparsity) -> float:
    """The share of the linear layers' multiplications that pruning leaves out."""
    left_out = 0.0
    for i in range(arch.layers):
        for name, (inputs, outputs) in arch.linears.items():
            if (pattern := sparsity.of(i, name)) is not None:
                left_out += inputs * outputs * float(1 - pattern.density)
    return left_out / arch.linear_weights


def modelled_bytes(arch: Architecture, sparsity: Sparsity | None) -> dict[str, float]:
    """Bytes a token that the linear layers move, by arithmetic alone, bf16: nothing here is measured.

    activations   2 I dense; 2 I N/M and the index's bits where pruned
    weights       2 I O dense; 2 I O N/M where one sequence is decoded and the rows of pruned inputs are skipped
    """
    activations = weights = 0.0
    for i in range(arch.layers):
        for name, (inputs, outputs) in arch.linears.items():
            pattern = None if sparsity is None else sparsity.of(i, name)
            density = 1.0 if pattern is None else float(pattern.density)
            bits = 0.0 if pattern is None else float(pattern.index_bits)
            activations += inputs * (2 * density + bits / 8)
            weights += 2 * inputs * outputs * density
    return {"activation_bytes": activations, "decode_weight_bytes": weights}


def _run_cell(
    subject: Subject,
    cell: Cell,
    text: Windows,
    calibration_text: Windows,
    dense: Sequence[Array],
    collected: calibration.Collected | None,
    place: Path,
    options: Options,
    say: Callable[[str], object],
) -> Row:
    """A cell's figures; `dense` are the dense model's hidden states of each window."""
    arch, weights, sparsity = subject.architecture, subject.weights, cell.sparsity
    parameters: dict[str, Parameters] = {}
    extra: Row = {}
    if cell.weights is not None and sparsity is not None:
        used = collected if cell.weights == "wanda" else None
        weights = calibration.prune_weights(arch, weights, sparsity, used)
        sparsity = None
    elif sparsity is not None:
        sparsity, parameters = _prepared(subject, sparsity, collected, calibration_text, options)
        if sparsity.is_learned:
            parameters = _learned(subject, sparsity, parameters, calibration_text, place, options, say)
        calibrated = {"sha256": calibration_text.sha256, "tokens": int(calibration_text.tokens.size)}
        saved.write(place, sparsity, parameters, model=subject.hashes, calibration=calibrated, seed=options.seed)
        if not isinstance(sparsity.pattern, Unstructured) or sparsity.pattern.scope == "token":
            some = calibration_text.tokens[:4]
            found = calibration.errors(arch, weights, some, sparsity, parameters)
            extra["errors"] = {name: [round(float(e), 5) for e in one] for name, one in found.items()}
        extra |= {"pruned": pruned_share(arch, sparsity), "settings": as_json(sparsity)}
    sums = []
    for tokens, states in zip(text.tokens, dense, strict=True):
        at = jnp.asarray(tokens)
        if cell.sparsity is None:
            found = comparison.compare_states(arch, weights, at, states, states)
        else:
            found = comparison.compare(arch, weights, at, states, sparsity, parameters)
        nll, kl, agree = jax.device_get(found)
        sums.append((float(np.mean(nll, dtype=np.float64)), float(np.mean(kl, dtype=np.float64)), float(agree.mean())))
    losses = [one[0] for one in sums]
    predicted = text.tokens.shape[1] - 1
    loss = math.fsum(losses) / len(losses)
    return extra | {
        "loss": loss,
        "kl": math.fsum(one[1] for one in sums) / len(sums),
        "agree": math.fsum(one[2] for one in sums) / len(sums),
        "bits_per_byte": loss * predicted * len(losses) / (math.log(2) * float(text.bytes.sum())),
        "losses": losses,
        "tokens": predicted * len(losses),
        "window": int(text.tokens.shape[1]),
        "modelled": modelled_bytes(arch, sparsity),
    }


def _prepared(
    subject: Subject, sparsity: Sparsity, collected: Any, calibration_text: Windows, options: Options
) -> tuple[Sparsity, dict[str, Parameters]]:
    """The setting within its budget, and its constants."""
    arch, weights = subject.architecture, subject.weights
    if options.budget is not None:
        found = calibration.layer_parameters(arch, weights, sparsity, collected)
        errors = calibration.errors(arch, weights, calibration_text.tokens[:4], sparsity, found)
        sparsity = calibration.within_budget(arch, sparsity, errors, options.budget)
    return sparsity, calibration.layer_parameters(arch, weights, sparsity, collected)


def _calibrated(
    subject: Subject, text: Windows, output: Path, options: Options, say: Callable[[str], object]
) -> calibration.Collected:
    """Statistics, from the file of an earlier call where it is of the same model and text."""
    arch, path = subject.architecture, output / CALIBRATION
    content = json.dumps([subject.hashes, text.sha256, options.seed, options.skip_first], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()
    names = {name for name in arch.linears if calibration.READS[name] == name}
    try:
        stored = load_file(path)
        if bytes(stored["key"]).decode() == key:
            layers = [{name: _unpacked(stored, f"{i}.{name}") for name in names} for i in range(arch.layers)]
            return [{name: one[calibration.READS[name]] for name in arch.linears} for one in layers]
    except (OSError, SafetensorError, KeyError, ValueError):
        pass  # none yet, or another call's
    say(f"calibrating on {text.tokens.size:,} tokens")
    found = calibration.calibrate(arch, subject.weights, text.tokens, skip_first=options.skip_first, seed=options.seed)
    tensors = {"key": np.frombuffer(key.encode(), np.uint8)}
    for i, one in enumerate(found):
        for name in names:
            numbers = np.array([one[name].tokens, one[name].medians], np.float64)
            parts = {"numbers": numbers} | {part: getattr(one[name], part) for part in Statistics._fields[1:4]}
            tensors |= {f"{i}.{name}.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
            tensors[f"{i}.{name}.sample"] = one[name].sample
    save_file(tensors, path)
    return found


def _unpacked(stored: Mapping[str, np.ndarray], at: str) -> Statistics:
    tokens, medians = stored[f"{at}.numbers"]
    total, squares, largest, sample = (stored[f"{at}.{part}"] for part in ("total", "squares", "largest", "sample"))
    return Statistics(int(tokens), total, squares, largest, float(medians), sample)


def _learned(
    subject: Subject,
    sparsity: Sparsity,
    parameters: dict[str, Parameters],
    text: Windows,
    place: Path,
    options: Options,
    say: Callable[[str], object],
) -> dict[str, Parameters]:
    """The parameters after learning, which keeps its state in the cell's folder and continues from there."""
    state = comparison.start_learning(sparsity, parameters)
    leaves, structure = jax.tree.flatten((state.parameters, state.optimizer))
    path = place / LEARNING
    content = [subject.hashes, text.sha256, as_json(sparsity), options.seed, options.learn_steps, options.learn_rate]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    try:
        stored = load_file(path)
        if bytes(stored["key"]).decode() == key:
            found = [jnp.asarray(stored[f"{i}"], leaf.dtype).reshape(leaf.shape) for i, leaf in enumerate(leaves)]
            parameters, optimizer = jax.tree.unflatten(structure, found)
            state = comparison.Learning(parameters, optimizer, int(stored["step"][0]))
    except (OSError, SafetensorError, KeyError, ValueError):
        pass  # none yet, or another setting's
    place.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    while state.step < options.learn_steps:
        state = comparison.learn(
            subject.architecture,
            subject.weights,
            sparsity,
            state,
            text.tokens,
            steps=options.learn_steps,
            rate=options.learn_rate,
            seed=options.seed,
            until=state.step + KEEP_EVERY,
            on_step=lambda step, loss: losses.append(loss),
        )
        kept = {f"{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves((state.parameters, state.optimizer)))}
        kept |= {"key": np.frombuffer(key.encode(), np.uint8), "step": np.array([state.step])}
        save_file(kept, path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").rename(path)
        say(f"learned {state.step} of {options.learn_steps} steps, KL {np.mean(losses[-KEEP_EVERY:]):.4f}")
    path.unlink(missing_ok=True)
    return state.parameters


def _identity(cell: Cell, options: Options) -> str:
    settings = None if cell.sparsity is None else as_json(cell.sparsity)
    used: list[Any] = [settings, cell.weights]
    if cell.sparsity is not None:
        used += [options.seed, options.skip_first, options.budget]
        used += [options.learn_steps, options.learn_rate] if cell.sparsity.is_learned else []
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:16]


def file_name(name: str) -> str:
    """A cell's name as that of its folder."""
    return "".join(letter if letter.isalnum() or letter in "-.+" else "_" for letter in name.replace(":", "of"))
