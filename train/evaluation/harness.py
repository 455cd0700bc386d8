"""EleutherAI's lm-eval over our models; its six tasks of the paper also from local files, without a network.

Needs the extra `eval`.  Local items are in the schema of the published data sets; prompts and metrics are lm-eval's.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from train.data.tokenizer import Tokenizer
from train.evaluation.likelihood import BatchScorer, Pair, windows


@dataclass(frozen=True)
class LocalTask:
    """What lm-eval calls it, the split that is scored, and the fields its items need."""

    upstream: str  # lm-eval's task file, inside its folder of tasks
    split: str
    fields: frozenset[str]


_CHOICES = {"choices", "answerKey"}
LOCAL_TASKS = {
    "arc_easy": LocalTask("arc/arc_easy.yaml", "test", frozenset({"question", *_CHOICES})),
    "arc_challenge": LocalTask("arc/arc_challenge.yaml", "test", frozenset({"question", *_CHOICES})),
    "piqa": LocalTask("piqa/piqa.yaml", "validation", frozenset({"goal", "sol1", "sol2", "label"})),
    "openbookqa": LocalTask("openbookqa/openbookqa.yaml", "test", frozenset({"question_stem", *_CHOICES})),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml", "validation", frozenset({"activity_label", "ctx_a", "ctx_b", "endings", "label"})
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml", "validation", frozenset({"sentence", "option1", "option2", "answer"})
    ),
}
KINDS = {"jsonl": "json", "parquet": "parquet"}  # suffix -> builder of Hugging Face's datasets
SPLIT_KEYS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}  # in a task file


def find_items(data_dir: Path, task: str) -> dict[str, list[str]]:
    """The files of a task's splits, `DATA_DIR/TASK/SPLIT*.jsonl` (or .parquet).

    Raises:
      ValueError: a task without local form, a missing file, or items that lack a field, with the line.
    """
    if task not in LOCAL_TASKS:
        raise ValueError(
            f"task {task!r} has no local form; those with one are {', '.join(LOCAL_TASKS)}. "
            "Without --eval_data_dir any task of lm-eval can be named, and its data are downloaded"
        )
    known, folder = LOCAL_TASKS[task], data_dir / task
    for suffix in KINDS:
        splits = {
            split: [str(path.resolve()) for path in sorted(folder.glob(f"{split}*.{suffix}"))] for split in SPLIT_KEYS
        }
        if splits[known.split]:
            for path in map(Path, splits[known.split]):
                _check_fields(path, known.fields)
            return {split: files for split, files in splits.items() if files}
    raise ValueError(f"{folder} holds no {known.split}*.jsonl or .parquet: put the {known.split} split of {task} there")


def _check_fields(path: Path, fields: frozenset[str]) -> None:
    if path.suffix == ".parquet":
        found = {f"{path}": set(pq.read_schema(path).names)}
    else:
        found = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):  # of bytes: U+2028 ends no line
            if not line.strip():
                continue
            try:
                found[f"{path}, line {number}"] = set(json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no items")
    for where, names in found.items():
        if lacking := sorted(fields - names):
            raise ValueError(f"{where}: no field {', '.join(lacking)}; the item has {', '.join(sorted(names))}")


class Generate(Protocol):
    """Tokens that a model writes behind a prompt; `ended` is asked now and then whether to stop."""

    def __call__(
        self,
        prompt: Sequence[int],
        *,
        new_tokens: int,
        temperature: float,
        top_p: float,
        ended: Callable[[list[int]], bool],
    ) -> list[int]: ...


def run_tasks(
    scorer: BatchScorer,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    data_dir: Path | None,
    limit: int | None,
    model_args: dict[str, Any],
    generate: Generate | None = None,
) -> tuple[str, str]:
    """lm-eval's results as its own JSON, and its table.

    Args:
      scorer: the model.
      tokenizer: its tokenizer.
      tasks: names of tasks.
      data_dir: folder with local items; None lets lm-eval fetch its own.
      limit: score only this many items of each task.
      model_args: recorded in the JSON.
      generate: writes text, for tasks that ask for it.

    Raises:
      ValueError: lm-eval is not installed, a task or its items cannot be used or fetched, or a task asks for code that
        its data set brings or that the model writes.
    """
    items = {task: find_items(data_dir, task) for task in tasks} if data_dir else {}
    if data_dir:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when the libraries are imported
    try:
        import lm_eval.tasks
        import lm_eval.utils
        from lm_eval.evaluator import simple_evaluate
    except ImportError as error:
        raise ValueError(f"--tasks needs lm-eval: pip install -e '.[eval]' ({error})") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        upstream = Path(lm_eval.tasks.__file__).parent
        for task, files in items.items():
            content = local_task(task, files, upstream, cache=scratch)
            (Path(scratch) / f"{task}.yaml").write_text(json.dumps(content))  # JSON is YAML
        manager = lm_eval.tasks.TaskManager(
            include_path=scratch if items else None, include_defaults=not items, metadata=None
        )
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise ValueError(
                f"lm-eval knows no task {', '.join(map(repr, unknown))}; `lm-eval ls tasks` lists those it has"
            )
        refuse_foreign_code(tasks, manager.task_index)
        try:
            results = simple_evaluate(
                model=_as_lm(scorer, tokenizer, generate),
                model_args=model_args,
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
        except OSError as error:  # no network, or no such data set
            raise ValueError(
                f"lm-eval could not get the data of {', '.join(tasks)}: {error}; put items into a folder and give it "
                "as --eval_data_dir (docs/evaluation.md)"
            ) from error
    text = json.dumps(results, indent=2, default=lm_eval.utils.handle_non_serializable, ensure_ascii=False)
    return text + "\n", lm_eval.utils.make_table(results)


def token_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Tokens of a context and of what follows it, as one text where the context's tokens stay what they are.

    Blanks between the two belong to the continuation, as in lm-eval. Where a token would reach over the border ("the c"
    and "at"), the continuation has tokens of its own: it must not get those of the context, nor none.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if whole[: len(before)] == before and len(whole) > len(before):
        return before, whole[len(before) :]
    return before, tokenizer.encode(continuation)


FOREIGN_CODE = ("trust_remote_code", "unsafe_code")  # a data set's own program, and text of the model run as one


def refuse_foreign_code(names: Sequence[str], index: Mapping[str, Any]) -> None:
    """Looks at what lm-eval read from the files of tasks, before any data set is opened.

    Args:
      names: tasks, groups or tags.
      index: lm-eval's entry of each name; `entry.cfg` is its file with what it includes, None for a tag.

    Raises:
      ValueError: one of them, or a member of a group or a tag, asks for one of `FOREIGN_CODE`, anywhere in its file.
    """
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in index:
            continue
        seen.add(name)
        entry = index[name]
        if entry.cfg is None:
            waiting += entry.tags
        for key, value in _settings(entry.cfg):
            if key in FOREIGN_CODE and value not in (False, None):
                raise ValueError(
                    f"task {name!r} has {key}: {value!r} in {entry.yaml_path}. Code of a data set or written by the "
                    "model is never run; choose another task, or put its items into files (--eval_data_dir)"
                )
            if key in ("task", "group"):
                waiting += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested mappings with what stands there."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _settings(inner)


def local_task(task: str, files: dict[str, list[str]], upstream: Path, *, cache: str) -> dict[str, Any]:
    """lm-eval's own task of that name with its data taken from ``files``; a format reader, never remote code."""
    builder = KINDS[Path(files[LOCAL_TASKS[task].split][0]).suffix.lstrip(".")]
    absent = {key: None for split, key in SPLIT_KEYS.items() if split not in files}
    return {
        "include": str(upstream / LOCAL_TASKS[task].upstream),
        **absent,
        "task": task,
        "tag": [],
        "dataset_path": builder,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": cache},
    }


MOST_NEW_TOKENS = 256  # where a task names no number


def _write(generate: Generate, tokenizer: Tokenizer, context: str, settings: Mapping[str, Any]) -> str:
    """What follows `context`, up to the first of the task's stop texts: the likeliest tokens, or drawn as it asks."""
    stops = settings.get("until") or []
    stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0

    def first_stop(text: str) -> int:
        return min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)

    drawn = generate(
        tokenizer.encode(context) or [tokenizer.eos_id],
        new_tokens=int(settings.get("max_gen_toks") or MOST_NEW_TOKENS),
        temperature=temperature,
        top_p=float(settings.get("top_p") or 1.0),
        ended=lambda drawn: first_stop(tokenizer.decode(drawn)) >= 0,
    )
    text = tokenizer.decode(drawn)
    return text if (end := first_stop(text)) < 0 else text[:end]


def _as_lm(scorer: BatchScorer, tokenizer: Tokenizer, generate: Generate | None) -> Any:
    """The model as lm-eval wants it."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        tokenizer_name = f"tokenizer.json {tokenizer.sha256}"
        eot_token_id = tokenizer.eos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string)

        def _encode_pair(self, context: str, continuation: str) -> Pair:
            return token_pair(tokenizer, context, continuation)

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
            # A continuation longer than the model's sequences is scored in stretches.
            texts = [(context or [tokenizer.eos_id], continuation) for _, context, continuation in requests]
            return self._in_stretches(texts, progress=not disable_tqdm)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            texts = [([tokenizer.eos_id], tokenizer.encode(request.args[0])) for request in requests]
            return [logp for logp, _ in self._in_stretches(texts, progress=not disable_tqdm)]

        def _in_stretches(self, texts: Sequence[Pair], *, progress: bool) -> list[tuple[float, bool]]:
            cut = [list(windows(continuation, context, scorer.max_length)) for context, continuation in texts]
            scores = iter(scorer([pair for pieces in cut for pair in pieces], progress=progress))
            found = [[next(scores) for _ in pieces] for pieces in cut]
            return [(sum(logp for logp, _ in some), all(best for _, best in some)) for some in found]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            if generate is None:
                raise NotImplementedError("this forward pass writes no text; choose a task scored by likelihood")
            return [_write(generate, tokenizer, *request.args) for request in requests]

    return Adapter()
