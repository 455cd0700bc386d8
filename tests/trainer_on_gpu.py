"""The trainer once as a whole on a real device: killed, resumed, evaluated, exported, compared, branched, in 5 minutes.

    python -m tests.trainer_on_gpu --tokens=FOLDER --output=RESULTS [--size=125m] [--seconds=280] [--binding=...]
    python -m tests.trainer_on_gpu ... --only=kill,branch,masks --update=docs/results/h100/trainer-125m.json

FOLDER is one that `train.prepare` wrote. Every part is a command of a user in a process of its own; one that fails
stops no other. RESULTS gets `trainer-SIZE.json`, `trainer-SIZE.md` and `trainer-SIZE.log` (what every command printed).
Checkpoints go to --work, a temporary folder by default. On a CPU, in minutes: `--size=tiny` with smaller `--binding`s.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.records.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("arc_easy", "arc_challenge", "piqa", "openbookqa", "hellaswag", "winogrande")
RECIPE = "venom"
STEPS, DENSE_UNTIL, SPARSE_UNTIL, EVERY = 160, 30, 110, 40  # EVERY: steps between checkpoints
KILL_AT = 60  # inside the sparse phase, between two checkpoints
BINDINGS = (
    f"Train.steps={STEPS}",
    f"DENSE_UNTIL={DENSE_UNTIL}",
    f"SPARSE_UNTIL={SPARSE_UNTIL}",
    "Train.batch_size=64",
    "Train.seq_len=1024",
    "Train.accumulation=2",
    "Train.remat='none'",
    "LearningRate.warmup=25",
    "LearningRate.peak=1e-3",
    f"Train.eval_every={EVERY}",
    "Train.eval_batches=4",
    f"Train.checkpoint_every={EVERY}",
    "Train.keep_checkpoints=4",
    "Train.log_every=1",
    f"Train.diagnosis_every={2 * EVERY}",
    "Train.sample_tokens=0",
)
AVERAGE = "Optimizer.ema=0.98"
EVALUATIONS = ("end", "sparse phase", "averaged")
PROMPT = "The house of the people is a state of the mind, and"


class PartError(Exception):
    """A part that did not do what it should; its text says what was seen."""


@dataclass
class Session:
    """Where things are, what has been printed, and how much time is left."""

    tokens: Path
    work: Path
    size: str
    bindings: Sequence[str]
    seconds: float
    began: float = field(default_factory=time.monotonic)
    parts: list[dict[str, Any]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The workdir that most parts look at."""
        return self.work / "run"

    def left(self) -> float:
        """Seconds until the whole has to end."""
        return self.seconds - (time.monotonic() - self.began)

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen:
        """The command in a process group of its own."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with log.open("w") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )

    def call(self, name: str, *command: str) -> str:
        """What the command printed.  Raises PartError where it failed or took too long."""
        log = self.work / f"{name}.log"
        process = self.start([sys.executable, "-m", *command], log)
        try:
            code = process.wait(max(1.0, self.left()))
        except subprocess.TimeoutExpired:
            raise PartError(f"not done in time: {last_lines(log, 2)}") from None
        finally:
            kill(process)
            self.logs.append(f"=== {name}: {' '.join(command)}\n{log.read_text()}")
        if code:
            raise PartError(f"exit code {code}: {last_lines(log, 3)}")
        return log.read_text()

    def training(self, workdir: Path, *extra: str, average: bool = True) -> list[str]:
        """The command that trains in ``workdir``."""
        bound = [f"Data.folder='{self.tokens}'", *BINDINGS, *self.bindings, *([AVERAGE] if average else [])]
        chosen = [f"--gin_file=configs/{name}.gin" for name in (f"size/{self.size}", f"recipe/{RECIPE}")]
        given = [f"--gin_bindings={binding}" for binding in bound]
        return ["train.main", *chosen, *given, *extra, f"--workdir={workdir}"]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """Times a part and keeps what it found, or why it failed."""
        found: dict[str, Any] = {}
        began, problem = time.monotonic(), None
        print(f"[{began - self.began:5.0f} s] {name} ...", flush=True)
        try:
            yield found
        except Exception as error:  # whatever it is, the parts after it still say something
            problem = f"{type(error).__name__}: {error}" if not isinstance(error, PartError) else str(error)
        took = time.monotonic() - began
        self.parts.append({"part": name, "ok": problem is None, "seconds": round(took, 1), "problem": problem} | found)
        print(f"[{time.monotonic() - self.began:5.0f} s] {name}: {problem or 'ok'} {json.dumps(found)}", flush=True)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path, count: int) -> str:
    """The end of a log in one line."""
    return " / ".join(line.strip() for line in log.read_text(errors="replace").splitlines()[-count:])


def losses(workdir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {r["step"]: r["loss"] for r in read_metrics(workdir) if r["kind"] == "train"}


def checked(condition: bool, text: str) -> None:
    """Raises PartError with the text unless the condition holds."""
    if not condition:
        raise PartError(text)


def fed(session: Session, found: dict[str, Any]) -> None:
    """The input pipeline's rate on this host, with nothing else to do."""
    text = session.call("data", "train.data_bench", f"--folder={session.tokens}", "--seconds=3")
    found |= json.loads(text.strip().splitlines()[-1])
    checked(found["times_consumed"] >= 10, f"only {found['times_consumed']:.1f} times what a 1B model's step consumes")


def killed(session: Session, found: dict[str, Any]) -> dict[int, float]:
    """Trains until KILL_AT and a complete checkpoint, then SIGKILL.  Returns the losses until then."""
    log = session.work / "killed.log"
    process = session.start([sys.executable, "-m", *session.training(session.run)], log)
    sealed = session.run / "checksums" / f"{EVERY}.json"
    limit = time.monotonic() + session.seconds / 2
    try:
        while max(losses(session.run), default=0) < KILL_AT or not sealed.exists():
            checked(process.poll() is None, f"ended by itself before the kill: {last_lines(log, 3)}")
            checked(time.monotonic() < limit, f"not at step {KILL_AT} in time: {last_lines(log, 2)}")
            time.sleep(0.1)
    finally:
        kill(process)
        session.logs.append(f"=== killed\n{log.read_text()}")
    seen = losses(session.run)
    found |= {"exit": process.returncode, "last_step": max(seen), "phase": phase_at(session.run, max(seen))}
    found["checkpoints"] = sorted(int(p.name) for p in (session.run / "checkpoints").iterdir() if p.name.isdigit())
    checked(process.returncode == -signal.SIGKILL, f"exit code {process.returncode} after SIGKILL")
    checked(max(seen) < STEPS, "the run was complete before the kill")
    return seen


def phase_at(workdir: Path, step: int) -> str:
    """Name of the phase of a logged step."""
    return next(r["phase"] for r in read_metrics(workdir) if r["kind"] == "train" and r["step"] == step)


def resumed(session: Session, before: dict[int, float], found: dict[str, Any]) -> None:
    """The same command again, to the end."""
    text = session.call("resumed", *session.training(session.run))
    start = re.search(r"continuing .* from step (\d+)", text)
    checked(start is not None, "it did not say that it continues")
    assert start is not None
    records = read_metrics(session.run)
    steps = [r["step"] for r in records if r["kind"] == "train"]
    again = {step: loss for step, loss in losses(session.run).items() if step > int(start[1])}
    twice = sorted(before.keys() & again.keys())
    evaluations = [r for r in records if r["kind"] == "eval"]
    memory = [r["peak_memory_gib"] for r in records if r["kind"] == "train" and "peak_memory_gib" in r]
    found |= {
        "from_step": int(start[1]),
        "to_step": max(steps),
        "steps_computed_twice": len(twice),
        "largest_loss_difference_of_these": max((abs(before[step] - again[step]) for step in twice), default=None),
        "equal_losses_of_these": sum(before[step] == again[step] for step in twice),
        "loss": {str(step): losses(session.run)[step] for step in (1, EVERY, 2 * EVERY, 3 * EVERY, STEPS)},
        "validation": {str(r["step"]): {n: v for n, v in r.items() if n.startswith("val_loss")} for r in evaluations},
        "peak_memory_gib": max(memory, default=None),
    }
    checked(steps == list(range(1, STEPS + 1)), "not every step is logged exactly once")
    checked(int(start[1]) > 0, "it began again")


def evaluated(session: Session, found: dict[str, Any]) -> None:
    """Held-out loss of the end, of a checkpoint inside the sparse phase, and of the averaged weights."""
    middle = f"{session.run}@{2 * EVERY}"
    options = [f"--workdir={session.run}"], [f"--workdir={middle}", "--sparse"], [f"--workdir={session.run}", "--ema"]
    for name, given in zip(EVALUATIONS, options, strict=True):
        found[name] = session.call(f"evaluate-{name.split()[0]}", "train.evaluate", *given).strip().splitlines()[-1]
        checked("bits per byte" in found[name], found[name])


def tasks(session: Session, found: dict[str, Any]) -> None:
    """lm-eval's six tasks from the items in the repository."""
    session.call(
        "tasks",
        "train.evaluate",
        f"--workdir={session.run}",
        f"--tasks={','.join(TASKS)}",
        "--eval_data_dir=tests/data/eval",
    )
    results = json.loads((session.run / f"lm_eval-{STEPS}-dense.json").read_text())
    found["accuracy"] = {task: results["results"][task]["acc,none"] for task in TASKS}
    found["items"] = {task: results["n-samples"][task]["effective"] for task in TASKS}
    found["lm_eval"] = results.get("lm_eval_version")


def exported(session: Session, found: dict[str, Any]) -> None:
    """Export, and the same logits from transformers."""
    folder = session.work / "hf"
    session.call("export", "train.export", f"--workdir={session.run}", f"--output={folder}", "--dtype=float32")
    text = session.call("parity", "tests.trainer_on_gpu", f"--parity={session.run}", f"--output={folder}")
    found |= json.loads(text.strip().splitlines()[-1])
    checked(found["largest_difference"] < 1e-3, f"logits differ by {found['largest_difference']}")


def parity(run: Path, folder: Path) -> dict[str, Any]:
    """Logits of a run and of its export by transformers on the CPU, both in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch  # pyrefly: ignore[missing-import]
    import transformers  # pyrefly: ignore[missing-import]

    from train.evaluation import validation
    from train.model import decoder
    from venom_jax import Recipe

    restored = validation.restore(run)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0].numpy()
    with jax.default_matmul_precision("highest"):
        ours_model = decoder.assemble(restored.graphdef, restored.dense_params(), restored.state.method)
        ours = np.asarray(ours_model(jnp.asarray([ids]), recipe=Recipe.dense())[0][0])
    return {
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
        "tokens": len(ids),
        "transformers": transformers.__version__,
    }


def generated(session: Session, found: dict[str, Any]) -> None:
    """A text, and the averaged weights exported too."""
    text = session.call(
        "generate", "train.generate", f"--workdir={session.run}", "--prompt=The state of", "--new_tokens=60"
    )
    found["text"] = text.strip().splitlines()[-1][:300]
    checked("The state of" in text, f"no prompt in {text[-200:]!r}")
    folder = session.work / "hf-ema"
    session.call("export-ema", "train.export", f"--workdir={session.run}", f"--output={folder}", "--ema")


def masked(session: Session, found: dict[str, Any]) -> None:
    """Thirty dense steps with attention across documents, and the same with masks between them."""
    steps = 30
    for name, value in (("across", "None"), ("within", "0")):
        bound = [f"Train.steps={steps}", "Phases.schedule=[(0,'dense')]", "LearningRate.warmup=5",
                 f"Model.document_start={value}"]  # fmt: skip
        workdir = session.work / f"mask-{name}"
        more = [f"--gin_bindings={binding}" for binding in bound]
        session.call(f"mask-{name}", *session.training(workdir, *more, average=False))
        found[name] = losses(workdir)[steps]
    checked(found["across"] != found["within"], "the masks change nothing")
    checked(abs(found["across"] - found["within"]) < 1, "the losses are far apart")


def branched(session: Session, found: dict[str, Any]) -> None:
    """Another decay from a checkpoint inside the sparse phase, with the whole state."""
    at = EVERY  # there even where the run was not resumed
    bound = ["LearningRate.kind='wsd'", f"Train.steps={at + 20}", f"SPARSE_UNTIL={at + 10}", "LearningRate.decay=15"]
    workdir = session.work / "branch"
    more = [f"--gin_bindings={binding}" for binding in bound]
    text = session.call("branch", *session.training(workdir, *more, f"--init_from={session.run}@{at}", "--init_state"))
    found |= {"from_step": at, "to_step": max(losses(workdir)), "phases": re.findall(r"step \d+: .* begins", text)}
    old, new = losses(session.run), losses(workdir)
    found["loss_of_next_step"] = {"run": old[at + 1], "branch": new[at + 1]}
    checked(found["to_step"] == at + 20, "it did not come to its end")


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    parts = {part["part"]: part for part in result["parts"]}
    rows = []
    for name, (title, words) in PAGE.items():
        part = parts.get(name)
        if part is not None:
            text = words(part) if part["ok"] else f"**failed**: {as_code(part['problem'])}"
            rows.append(f"| {title} | {text} | {part['seconds']:.0f} | {part.get('date', result['date'])} |")
    table = "\n".join(rows)
    return f"""# The trainer as a whole: `{result["size"]}` on one {result["device"]}

{result["date"]}, jax {result["jax"]}, written by `python -m tests.trainer_on_gpu`: `configs/size/{result["size"]}.gin`
with `configs/recipe/{RECIPE}.gin`, {STEPS} steps of {result["batch"]}, dense to step {DENSE_UNTIL},
sparse to {SPARSE_UNTIL}, dense to the end, with a moving average of the weights, on {result["data"]}.

| part | what came out | seconds | date |
|---|---|---|---|
{table}

The model has seen too little to say anything about quality: the parts show that the commands work, together and on this
device. After training several parts run side by side, so neither their seconds nor a rate is to be read off.
"""


def as_code(message: str) -> str:
    """A program's message in a cell of a table: what looks like a link or a column there is none."""
    return "`" + message.replace("`", "'").replace("|", "/") + "`"


def words_killed(part: dict[str, Any]) -> str:
    """Of the kill."""
    return f"at step {part['last_step']} ({part['phase']}); complete checkpoints: {part['checkpoints']}"


def words_resumed(part: dict[str, Any]) -> str:
    """Of the resume."""
    difference = part["largest_loss_difference_of_these"]
    again = f"{part['steps_computed_twice']} steps computed twice, {part['equal_losses_of_these']} with equal losses"
    if difference:
        again += f", largest difference {difference:.1e}"
    validation = ", ".join(f"{found['val_loss']:.3f} ({step})" for step, found in part["validation"].items())
    memory = "" if part["peak_memory_gib"] is None else f"; at most {part['peak_memory_gib']:.1f} GiB"
    return (
        f"continued from {part['from_step']} to {part['to_step']}, each step logged once; {again}; "
        f"validation loss (step) {validation}{memory}"
    )


def words_tasks(part: dict[str, Any]) -> str:
    """Of the tasks."""
    found = ", ".join(f"{task} {part['accuracy'][task]:.2f} of {count} items" for task, count in part["items"].items())
    return f"lm-eval {part['lm_eval']}: {found}"


def words_exported(part: dict[str, Any]) -> str:
    """Of the export."""
    return (
        f"transformers {part['transformers']}: float32 logits differ by at most {part['largest_difference']:.1e}, "
        f"of logits up to {part['largest_logit']:.2f}"
    )


def words_branched(part: dict[str, Any]) -> str:
    """Of the branch."""
    loss = part["loss_of_next_step"]
    return (
        f"from step {part['from_step']}, inside the sparse phase, over its end to {part['to_step']}; loss of the next "
        f"step {loss['branch']:.4f}, in the run itself {loss['run']:.4f}"
    )


PAGE: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "data": (
        "`train.data_bench`",
        lambda p: (
            f"{p['tokens_per_second'] / 1e6:.1f}M tokens/s, {p['times_consumed']:.0f} times a step of the 1B model"
        ),
    ),
    "kill": ("SIGKILL in the sparse phase", words_killed),
    "resume": ("the same command again", words_resumed),
    "evaluate": ("`train.evaluate`", lambda p: "; ".join(p[name] for name in EVALUATIONS)),
    "tasks": ("`train.evaluate --tasks=...`", words_tasks),
    "export": ("`train.export`, read by `transformers`", words_exported),
    "generate": ("`train.generate`, `train.export --ema`", lambda p: "60 tokens; exported"),
    "masks": (
        "masks between documents",
        lambda p: f"loss of step 30: {p['within']:.3f} within documents, {p['across']:.3f} across",
    ),
    "branch": ("`--init_from=RUN@STEP --init_state`", words_branched),
}
ORDER = list(PAGE)


def about(session: Session) -> dict[str, Any]:
    """Device, versions and data, asked of a process of its own: this one leaves the device alone."""
    text = session.call(
        "about", "tests.trainer_on_gpu", "--about", *(f"--binding={binding}" for binding in session.bindings),
        f"--tokens={session.tokens}", f"--size={session.size}",
    )  # fmt: skip
    return json.loads(text.strip().splitlines()[-1])


def describe(tokens: Path, size: str, bindings: Sequence[str]) -> dict[str, Any]:
    """What ``about`` is answered with."""
    import jax

    from train.config.settings import load_config

    manifest = json.loads((tokens / "manifest.json").read_text())
    train = load_config([f"configs/size/{size}.gin"], [f"Data.folder='{tokens}'", *BINDINGS, *bindings]).train
    count = manifest["splits"]["train"]["tokens"]
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "size": size,
        "batch": f"{train.batch_size} x {train.seq_len} tokens in {train.accumulation} microbatches",
        "data": f"{count / 1e6:.1f}M tokens of English text with a vocabulary of {manifest['vocab_size']:,}",
    }


def together(session: Session, *pairs: tuple[str, Callable[[Session, dict[str, Any]], None]]) -> None:
    """Parts side by side."""

    def one(pair: tuple[str, Callable[[Session, dict[str, Any]], None]]) -> None:
        with session.part(pair[0]) as found:
            pair[1](session, found)

    with ThreadPoolExecutor(len(pairs)) as pool:
        list(pool.map(one, pairs))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, help="folder that train.prepare wrote")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--work", type=Path, help="folder for runs and exports (default: a temporary one)")
    parser.add_argument("--size", default="125m", help="of configs/size")
    parser.add_argument("--seconds", type=float, default=280, help="all parts together; what is late is cut off")
    parser.add_argument("--binding", action="append", default=[], help="one more gin binding; may be repeated")
    parser.add_argument("--only", help=f"some of {','.join(ORDER)}")
    parser.add_argument("--update", type=Path, help="earlier trainer-SIZE.json, whose other parts stay in the results")
    parser.add_argument("--parity", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--about", action="store_true", help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.parity is not None:
        print(json.dumps(parity(values.parity, values.output)))
        return 0
    if values.tokens is None or not (values.about or values.output):
        parser.error("give --tokens and --output")
    if values.about:
        print(json.dumps(describe(values.tokens.resolve(), values.size, values.binding)))
        return 0
    chosen = ORDER if values.only is None else values.only.split(",")
    if unknown := set(chosen) - set(ORDER):
        parser.error(f"--only={values.only}: {', '.join(sorted(unknown))} is none of {', '.join(ORDER)}")
    if "kill" not in chosen and set(chosen) - {"data", "masks"}:
        parser.error("the other parts look at the run that the part kill begins: add it to --only")
    if "resume" not in chosen and set(chosen) - {"data", "masks", "kill", "branch"}:
        parser.error("the other parts look at the run that the part resume ends: add it to --only")
    old: dict[str, Any] = {"parts": [], "date": ""} if values.update is None else json.loads(values.update.read_text())
    earlier = [{"date": old["date"]} | part for part in old["parts"]]
    values.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = (values.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        session = Session(values.tokens.resolve(), work, values.size, values.binding, values.seconds)
        return conduct(session, values.output, chosen, earlier)


def conduct(session: Session, output: Path, chosen: Sequence[str], earlier: Sequence[dict[str, Any]]) -> int:
    """The chosen parts, then the results with the earlier ones of other parts; exit code 1 if any part failed."""
    result = about(session)
    before: dict[int, float] = {}
    if "data" in chosen:
        with session.part("data") as found:
            fed(session, found)
    if "kill" in chosen:
        with session.part("kill") as found:
            before = killed(session, found)
    if "resume" in chosen:
        with session.part("resume") as found:
            resumed(session, before, found)
    others = {"masks": masked, "branch": branched, "evaluate": evaluated, "tasks": tasks, "export": exported}
    others |= {"generate": generated}
    together(session, *(pair for pair in others.items() if pair[0] in chosen))
    new = {part["part"]: part | {"date": result["date"]} for part in session.parts}
    parts = sorted(
        ({part["part"]: part for part in earlier} | new).values(), key=lambda part: ORDER.index(part["part"])
    )
    result |= {"seconds": round(time.monotonic() - session.began, 1), "parts": parts}
    stem = output / f"trainer-{session.size}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(result))
    stem.with_suffix(".log").write_text("\n".join(session.logs))
    print(stem.with_suffix(".md").read_text())
    failed = [part["part"] for part in parts if not part["ok"]]
    print(f"{len(parts) - len(failed)} of {len(parts)} parts succeeded" + (f"; failed: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
