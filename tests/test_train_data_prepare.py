"""Text to token shards: every input format round-trips, every mistake in the input is named."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from train.data import documents, encode
from train.data import prepare as prepare_module
from train.data.documents import TXT_DOCUMENT_CHARS, Field, find_files, read_documents
from train.data.prepare import prepare
from train.data.token_files import open_dataset
from train.data.tokenizer import train_bpe

TEXTS = [f"Document {i}: naïve café, 日本 {i * 7919}\r\nsecond line." + " word" * (i % 13) for i in range(60)]


def json_lines(texts, field="text"):
    return [json.dumps({field: t, "id": i}).encode() + b"\n" for i, t in enumerate(texts)]


def write_jsonl(path, texts):
    path.write_bytes(b"".join(json_lines(texts)))


def write_zst(path, texts, frames=7):
    """`frames` documents a frame: as `cat a.zst b.zst` would make it."""
    lines, packer = json_lines(texts), zstandard.ZstdCompressor()
    chunks = [b"".join(lines[i : i + frames]) for i in range(0, len(lines), frames)]
    path.write_bytes(b"".join(packer.compress(chunk) for chunk in chunks))


def write_parquet(path, texts):
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), path, row_group_size=16)


def write_txt(folder, texts):
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())


def tokens_of(dataset):
    return np.concatenate([np.fromfile(p, np.dtype(dataset.dtype)) for p in dataset.shards])


def documents_of(dataset):
    tokens = tokens_of(dataset)
    ends = np.flatnonzero(tokens == dataset.eos_id)
    assert ends[-1] == len(tokens) - 1
    return [dataset.tokenizer.decode(part[part != dataset.eos_id]) for part in np.split(tokens, ends[:-1] + 1)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "in.jsonl"
    write_jsonl(path, TEXTS)
    return path


@pytest.fixture
def prepared(jsonl, tmp_path):
    out = tmp_path / "prepared"
    prepare([jsonl], out, vocab_size=300, validation_fraction=0.2, progress=False)
    return out


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.zstd", "a.jsonl", "a.parquet", "folder"])
def test_every_format_gives_back_its_documents(name, tmp_path):
    path = tmp_path / name
    write = {"zst": write_zst, "zstd": write_zst, "jsonl": write_jsonl, "parquet": write_parquet, "folder": write_txt}
    write[name.rsplit(".", 1)[-1]](path, TEXTS)
    out = tmp_path / "out"
    prepare([path], out, vocab_size=300, validation_fraction=0, progress=False)
    dataset = open_dataset(out)
    assert documents_of(dataset) == TEXTS
    assert dataset.bytes == sum(len(t.encode()) for t in TEXTS)
    assert dataset.documents == len(TEXTS)
    assert dataset.tokens == len(tokens_of(dataset))
    assert dataset.bytes_per_token == dataset.bytes / dataset.tokens


def test_formats_agree_bit_for_bit(jsonl, tmp_path):
    write_zst(tmp_path / "in.jsonl.zst", TEXTS)
    shards = []
    for path in (jsonl, tmp_path / "in.jsonl.zst"):
        out = tmp_path / f"out{len(shards)}"
        prepare([path], out, vocab_size=300, validation_fraction=0.2, progress=False)
        shards.append([(out / n).read_bytes() for n in ("train-00000.bin", "val-00000.bin", "manifest.json")])
    assert shards[0] == shards[1]


def test_the_split_depends_on_the_text_alone(jsonl, prepared, tmp_path):
    train, val = documents_of(open_dataset(prepared)), documents_of(open_dataset(prepared, "val"))
    assert sorted(train + val) == sorted(TEXTS)
    assert 0 < len(val) < 30
    write_jsonl(tmp_path / "other.jsonl", [*reversed(TEXTS), "one more document"])
    out = tmp_path / "other"
    prepare([tmp_path / "other.jsonl"], out, vocab_size=300, validation_fraction=0.2, progress=False)
    assert set(val) <= set(documents_of(open_dataset(out, "val"))) <= {*val, "one more document"}


def test_separate_validation_input(jsonl, tmp_path):
    write_txt(tmp_path / "held", ["held out text"])
    out = tmp_path / "out"
    prepare([jsonl], out, vocab_size=300, validation=[tmp_path / "held"], progress=False)
    assert documents_of(open_dataset(out)) == TEXTS
    assert documents_of(open_dataset(out, "val")) == ["held out text"]


def test_many_shards_hold_the_same_tokens(jsonl, prepared, tmp_path):
    out = tmp_path / "small"
    prepare(
        [jsonl], out, tokenizer=prepared / "tokenizer.json", validation_fraction=0.2, shard_tokens=37, progress=False
    )
    one, many = open_dataset(prepared), open_dataset(out)
    assert len(many.shards) == -(-one.tokens // 37)
    np.testing.assert_array_equal(tokens_of(one), tokens_of(many))


def test_a_large_vocabulary_takes_four_bytes(jsonl, prepared, tmp_path):
    content = json.loads((prepared / "tokenizer.json").read_text())
    content["model"]["vocab"] = {k: v + 70000 if v == 299 else v for k, v in content["model"]["vocab"].items()}
    (tmp_path / "wide.json").write_text(json.dumps(content))
    out = tmp_path / "wide"
    prepare([jsonl], out, tokenizer=tmp_path / "wide.json", validation_fraction=0, progress=False)
    assert open_dataset(out).dtype == "uint32"
    assert open_dataset(prepared).dtype == "uint16"
    assert documents_of(open_dataset(out)) == TEXTS


def test_other_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"".join(json_lines(TEXTS, "content")))
    assert list(read_documents(tmp_path / "a.jsonl", Field("content"))) == TEXTS


def test_a_long_txt_file_becomes_several_documents_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} of a long text\n" for i in range(30000))
    (tmp_path / "a.txt").write_text(text)
    documents = list(read_documents(tmp_path / "a.txt"))
    assert "".join(documents) == text
    assert len(documents) == -(-len(text) // TXT_DOCUMENT_CHARS)
    assert all(d.endswith("\n") for d in documents)


def test_byte_order_marks_blank_lines_and_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\n{"text": ""}\n{"text": "  "}\n{"text": "x"}\n\n')
    assert list(read_documents(tmp_path / "a.txt")) == ["hello"]
    assert list(read_documents(tmp_path / "b.jsonl")) == ["x"]
    manifest = prepare([tmp_path], tmp_path / "out", vocab_size=300, validation_fraction=0, progress=False)
    assert (manifest["skipped"]["documents"], manifest["skipped"]["empty"]) == (0, 2)


def test_progress_counts_the_bytes_of_the_file(tmp_path):
    for write, name in ((write_jsonl, "a.jsonl"), (write_zst, "a.jsonl.zst")):
        write(tmp_path / name, TEXTS)
        seen = []
        list(read_documents(tmp_path / name, on_bytes=seen.append))
        assert sum(seen) == (tmp_path / name).stat().st_size


def test_find_files_takes_paths_patterns_and_folders_once_each_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.jsonl.zst", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [p.relative_to(tmp_path).as_posix() for p in find_files([tmp_path, tmp_path / "a.txt"])]
    assert names == ["a.txt", "b.txt", "sub/c.jsonl.zst"]
    assert [p.name for p in find_files([f"{tmp_path}/**/*.txt"])] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl, line 2: not valid JSON"),
        (b'{"text": "a"}\n\xff\xfe\xfd\n', r"line 2: not valid JSON.*mend or remove the line"),
        (b'{"text": "a"}\n[1]\n', r"line 2: expected a JSON object, found list; mend or remove the line"),
        (b'{"body": "a"}\n', r"line 1: no field 'text'; the fields are \['body'\].*--text_field"),
        (b'{"text": 3}\n', r"line 1: field 'text' should be a string, found int"),
        (b"", r"the input holds no t"),
        (b"\x28\xb5\x2f\xfd and so on", r"a\.jsonl, line 1: compressed by zstd.*give it as \.jsonl\.zst"),
    ],
)
def test_a_mistake_in_jsonl_names_file_and_line(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300, progress=False, strict=True)
    with pytest.raises(ValueError, match=r"no manifest\.json.*interrupted"):
        open_dataset(tmp_path / "out")


def test_broken_documents_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "UNIT_BYTES", 1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        write_jsonl(folder / "a.jsonl", TEXTS)
        write_jsonl(folder / "b.jsonl", TEXTS)
    lines = json_lines(TEXTS)
    (broken / "a.jsonl").write_bytes(
        b"".join([b"{\n", *lines[:5], b'{"body": 1}\n', *lines[5:], b'{"text": null}\n[1]\n'])
    )
    write_parquet(whole / "c.parquet", TEXTS)
    write_parquet(broken / "c.parquet", [None, *TEXTS])
    out = {}
    for folder in (whole, broken):
        out[folder] = tmp_path / f"{folder.name}-out"
        prepare([folder], out[folder], vocab_size=300, validation_fraction=0, progress=False)
    assert open_dataset(out[broken]).documents == 3 * len(TEXTS)
    np.testing.assert_array_equal(tokens_of(open_dataset(out[broken])), tokens_of(open_dataset(out[whole])))
    skipped = {folder: json.loads((out[folder] / "manifest.json").read_text())["skipped"] for folder in out}
    assert skipped[whole] == {"documents": 0, "empty": 0, "examples": [], "files": []}
    assert skipped[broken]["documents"] == 5
    assert skipped[broken]["files"] == [
        {
            "name": str(broken / "a.jsonl"),
            "broken": {"no JSON object": 1, "no string": 1, "not valid JSON": 1, "without field 'text'": 1},
            "empty": 0,
        },
        {"name": str(broken / "c.parquet"), "broken": {"no string": 1}, "empty": 0},
    ]
    assert [example.split(":")[0].split("/")[-1] for example in skipped[broken]["examples"]] == [
        "a.jsonl, line 1",
        "a.jsonl, line 7",
        f"a.jsonl, line {len(TEXTS) + 3}",
    ]


def test_a_document_that_is_too_long_is_broken(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["short enough", "x" * 101, "also short"])
    write_parquet(tmp_path / "b.parquet", ["x" * 102])
    options = {"vocab_size": 300, "validation_fraction": 0, "max_document_chars": 100, "progress": False}
    for name, where in (("a.jsonl", "line 2: a document of 101"), ("b.parquet", "row 1: a document of 102")):
        with pytest.raises(ValueError, match=rf"{name}, {where} characters, more than 100; .*--max_document_chars"):
            prepare([tmp_path / name], tmp_path / "out", strict=True, **options)
    manifest = prepare([tmp_path], tmp_path / "out", **options)
    assert (manifest["splits"]["train"]["documents"], manifest["skipped"]["documents"]) == (2, 2)


def test_nothing_but_broken_documents_is_an_error_that_shows_one(jsonl, prepared, tmp_path):
    options = {"text_field": "body", "tokenizer": prepared / "tokenizer.json", "max_broken": 1.0}
    with pytest.raises(
        ValueError, match=r"no training document.*broken documents left out: 60 \(100.00%.*no field 'body'"
    ):
        prepare([jsonl], tmp_path / "out", progress=False, **options)


def test_too_many_broken_documents_stop_with_the_remedy_and_a_higher_limit_goes_on(
    jsonl, prepared, tmp_path, monkeypatch
):
    broken, out = tmp_path / "broken.jsonl", tmp_path / "out"
    options: dict[str, Any] = {"tokenizer": prepared / "tokenizer.json", "validation_fraction": 0, "progress": False}
    broken.write_bytes(jsonl.read_bytes() + b"{\n" * 11)
    with pytest.raises(
        ValueError, match=r"11 of 71 documents are broken.*max_broken=0\.01.*broken\.jsonl, line 61.*raise -"
    ):
        prepare([broken], out, **options)
    monkeypatch.setattr(encode.Encoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert prepare([broken], out, max_broken=0.2, **options)["skipped"]["documents"] == 11


def test_a_few_broken_documents_are_no_reason_to_stop(jsonl, prepared, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl.read_bytes() + b"{\n" * 10)
    options: dict[str, Any] = {"tokenizer": prepared / "tokenizer.json", "validation_fraction": 0, "progress": False}
    assert prepare([tmp_path / "a.jsonl"], tmp_path / "out", **options)["skipped"]["documents"] == 10


def test_a_wrong_field_stops_before_the_whole_corpus_is_read(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BROKEN_AT_ONCE", 20)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options: dict[str, Any] = {"text_field": "body", "vocab_size": 300, "progress": False}
    with pytest.raises(ValueError, match=r"20 of 20 documents are broken.*line 1: no field 'body'.*--text_field"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (60, r"60 of 60 documents are broken.*line 1: no field 'body'.*--text_field"),
        (3, r"no training document.*broken documents left out: 3 \(100\.00%.*line 1: no field 'body'.*--text_field"),
    ],
    ids=["many", "few"],
)
def test_a_wrong_field_is_told_where_a_tokenizer_is_to_be_trained(count, message, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:count])
    with pytest.raises(ValueError, match=message):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", text_field="body", vocab_size=300, progress=False)


def test_strict_holds_for_what_an_earlier_run_left_out(jsonl, prepared, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl.read_bytes() + b"{\n")
    options: dict[str, Any] = {"tokenizer": prepared / "tokenizer.json", "validation_fraction": 0, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare([tmp_path / "a.jsonl"], tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"line 61: not valid JSON"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", strict=True, **options)


def test_files_of_other_kinds_in_a_folder_are_told(tmp_path, capsys):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)
    for name in ("b.jsonl.gz", "deeper/c.doc", ".hidden"):
        (tmp_path / "in" / name).touch()
    prepare([tmp_path / "in"], tmp_path / "out", vocab_size=300, validation_fraction=0, progress=False)
    assert f"in: 2 files of other kinds are not read, such as {tmp_path}/in/b.jsonl.gz\n" in capsys.readouterr().err


def test_an_empty_text_file_is_counted_as_an_empty_document(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").touch()
    manifest = prepare([tmp_path], tmp_path / "out", vocab_size=300, validation_fraction=0, progress=False)
    assert manifest["skipped"]["files"] == [{"name": str(tmp_path / "b.txt"), "broken": {}, "empty": 1}]


@pytest.mark.parametrize("damage", ["truncated", "garbage inside", "not zst", "empty"])
def test_broken_zst_is_named(damage, tmp_path):
    path = tmp_path / "a.jsonl.zst"
    write_zst(path, TEXTS)
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[:-9], "garbage inside": whole + b"x" * 40, "not zst": b"x" * 40, "empty": b""}[damage]
    )
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: broken compressed data after line \d+.*fetch the file"):
        list(read_documents(path))


def test_broken_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS)
    with pytest.raises(ValueError, match=r"no column 'body'; the columns are \['text', 'id'\].*--text_field"):
        list(read_documents(path, Field("body")))
    with pytest.raises(ValueError, match=r"row 1: field 'id' should be a string, found int"):
        list(read_documents(path, Field("id")))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: broken parquet file"):
        list(read_documents(path))


def test_txt_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"a\.txt, after line 0: not UTF-8 text.*iconv"):
        list(read_documents(tmp_path / "a.txt"))


def test_missing_and_unknown_input(tmp_path):
    (tmp_path / "a.doc").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"none\.txt is no file, no folder"):
        find_files([tmp_path / "none.txt"])
    with pytest.raises(ValueError, match="unknown kind of file; the suffix must be one of"):
        find_files([tmp_path / "a.doc"])
    with pytest.raises(ValueError, match="holds no file with a suffix among"):
        find_files([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no input files given"):
        find_files([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "vocab_size=100 is too small.*at least 257"),
        ({"vocab_size": 300, "tokenizer": "t.json"}, "not both"),
        ({"eos_token": "</s>"}, "eos_token names a token of a given tokenizer"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must be"),
        ({"validation_fraction": 0.1, "validation": ["x"]}, "not both"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"processes": 0}, "processes=0"),
        ({"tokenizer": "none.json"}, "no tokenizer file at none.json"),
        ({"vocab_size": 300, "validation_fraction": 1 - 1e-9}, "holds no t"),
    ],
)
def test_bad_options_are_named(options, message, jsonl, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare([jsonl], tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_same_file_cannot_be_training_and_validation(jsonl, tmp_path):
    with pytest.raises(ValueError, match=r"in\.jsonl is both training and validation input"):
        prepare([jsonl], tmp_path / "out", validation=[jsonl], vocab_size=300, progress=False)


def test_a_finished_dataset_is_replaced_only_when_asked(jsonl, prepared, tmp_path):
    before = (prepared / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a finished dataset.*--overwrite"):
        prepare([jsonl], prepared, vocab_size=290, progress=False)
    assert (prepared / "manifest.json").read_bytes() == before
    prepare([jsonl], prepared, vocab_size=290, validation_fraction=0, overwrite=True, progress=False)
    assert open_dataset(prepared).vocab_size == 290
    assert not (prepared / "val-00000.bin").exists()


@pytest.mark.parametrize("where", ["a file", "below a file", "a file system without files"])
def test_an_output_that_cannot_be_written_is_refused(where, jsonl):
    out = {"a file": jsonl, "below a file": jsonl / "out"}.get(where, "/proc/self/out")
    with pytest.raises(ValueError, match="cannot write to output folder"):
        prepare([jsonl], out, vocab_size=300, progress=False)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def four_files(tmp_path, monkeypatch):
    """Four files of a few hundred documents, each a unit of its own."""
    monkeypatch.setattr(encode, "UNIT_BYTES", 1)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", [f"{i} {t}" for t in TEXTS * 10])
    return folder


OPTIONS: dict[str, Any] = {"vocab_size": 300, "validation_fraction": 0.2, "shard_tokens": 20_000, "progress": False}


@pytest.mark.parametrize("where", ["while encoding", "while renaming", "before the manifest"])
def test_an_interrupted_run_leaves_no_dataset_and_the_next_goes_on(where, four_files, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare([four_files], whole, **OPTIONS)
    encoded = []

    def interrupt(name, at, real):
        def call(*args):
            encoded.extend(args[1:2] if name == "encode" else ())
            calls.append(name)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*args)

        calls = []
        return call

    owner, name, at = {
        "while encoding": (encode.Encoder, "encode", 3),
        "while renaming": (prepare_module.os, "replace", 14),
        "before the manifest": (prepare_module, "write_atomically", 3),
    }[where]
    real = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt(name, at, real))
        with pytest.raises(KeyboardInterrupt):
            prepare([four_files], out, **OPTIONS)
    with pytest.raises(ValueError, match="interrupted"):
        open_dataset(out)
    encoded.clear()
    monkeypatch.setattr(encode.Encoder, "encode", interrupt("encode", 100, encode.Encoder.encode))
    prepare([four_files], out, **OPTIONS)
    assert [unit.index for unit in encoded] == ([2, 3] if where == "while encoding" else [])
    assert content_of(out) == content_of(whole)


def test_other_options_start_over(four_files, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare([four_files], whole, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([four_files], out, **(OPTIONS | {"vocab_size": 310, "shard_tokens": 100}))
    prepare([four_files], out, **OPTIONS)
    assert "starting over" in capsys.readouterr().err
    assert content_of(out) == content_of(whole)


def test_a_kill_of_parallel_work_loses_nothing_and_leaves_no_process(four_files, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    write_jsonl(four_files / "0.jsonl", ["short"])
    write_jsonl(four_files / "3.jsonl", [f"{i} {t}" for i, t in enumerate(TEXTS * 300)])  # a second of work
    options = OPTIONS | {"validation_fraction": 0, "tokenizer": tmp_path / "tokenizer.json"}
    del options["vocab_size"]
    train_bpe(TEXTS, 300).core.save(str(options["tokenizer"]))
    code = f"""
from pathlib import PosixPath
from train.data import encode, prepare
encode.UNIT_BYTES = 1
prepare.prepare([{str(four_files)!r}], {str(out)!r}, processes=2, **{options!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (out / ".unfinished" / "00000.json").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    workers = [int(w) for w in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while any(running(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives the program"
        time.sleep(0.01)
    assert not (out / ".unfinished" / "00003.json").exists()
    prepare([four_files], out, **options)
    prepare([four_files], whole, **options)
    assert content_of(out) == content_of(whole)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_command_line(jsonl, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "train.prepare", f"--input={jsonl}", f"--output={out}", "--vocab_size=300"]
    jsonl.write_bytes(jsonl.read_bytes() + b"{\n")
    first = subprocess.run([*command, "--validation_fraction=0.2"], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert f"{open_dataset(out).tokens:,} tokens" in first.stdout
    assert "vocabulary 300, uint16" in first.stdout
    assert "broken documents left out: 1 (1.64%; in files: 1), 1 not valid JSON; the first:\n  " in first.stdout
    assert f"{jsonl}, line 61: not valid JSON" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr == f"error: {out} already holds a finished dataset: choose another folder, or use --overwrite\n"
