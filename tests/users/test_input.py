"""Texts and tokenizers as people have them."""

import errno
import fcntl
import json
import resource
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from tests.trainer import MODEL, build
from train.data import prepare as preparing
from train.data.documents import find_files, other_files, read_documents
from train.data.prepare import prepare
from train.data.sources import identity
from train.data.token_files import open_dataset
from train.data.tokenizer import load_tokenizer, train_bpe
from train.evaluation.export import write_folder
from train.state.workdir import WorkdirLock, is_held

WORDS = ["the", "cat", "sees", "a", "dog"]


def text_file(path, count=40, **more):
    path.write_text("".join(json.dumps({"text": f"document {i} of the state"} | more) + "\n" for i in range(count)))
    return path


# ---- the same thing named in two ways


@pytest.mark.parametrize("spelling", ["corpus/../corpus/held.jsonl", "{root}/corpus/held.jsonl", "link.jsonl"])
def test_held_out_text_is_not_trained_on_however_it_is_spelt(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    text_file(tmp_path / "corpus" / "a.jsonl")
    held = text_file(tmp_path / "corpus" / "held.jsonl")
    (tmp_path / "link.jsonl").symlink_to(held)
    with pytest.raises(ValueError, match="both training and validation"):
        prepare(["corpus"], "out", validation=[spelling.format(root=tmp_path)], vocab_size=300, progress=False)


def test_a_folder_given_twice_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    text_file(tmp_path / "corpus" / "a.jsonl")
    assert len(find_files(["corpus", str(tmp_path / "corpus"), "corpus/../corpus"])) == 1


def test_linked_folders_are_searched_once_and_hidden_files_are_not(tmp_path):
    inside, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (inside, elsewhere, inside / ".git"):
        folder.mkdir()
    for path in (inside / "a.txt", elsewhere / "b.txt", inside / "._a.txt", inside / ".git" / "c.txt"):
        path.write_text("x")
    (inside / "linked").symlink_to(elsewhere)
    (inside / "again").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(inside)
    (elsewhere / "notes.md").write_text("x")
    assert [path.name for path in find_files([inside])] == ["a.txt", "b.txt"]
    assert [path.name for path in other_files(inside)] == ["notes.md"]


def test_the_same_counts_of_other_tokens_are_another_data_set(tmp_path):
    """Two files change names, so their order: tokens, bytes and vocabulary count the same."""
    a, b = (text_file(tmp_path / f"{name}.jsonl", 40, text=f"{name} {WORDS} " * 3) for name in "ab")
    held = text_file(tmp_path / "held.jsonl")

    def prepared(name):
        prepare([a, b], tmp_path / name, validation=[held], vocab_size=300, progress=False)
        return identity(open_dataset(tmp_path / name))

    first = prepared("first")
    a.rename(tmp_path / "c.jsonl"), b.rename(a), (tmp_path / "c.jsonl").rename(b)
    second = prepared("second")
    assert {**first, "sha256": 0} == {**second, "sha256": 0}
    assert first != second


# ---- broken documents


@pytest.mark.parametrize(
    "line", ['{"text": "a", "n": ' + "1" * 5000 + "}", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"]
)
def test_a_line_that_no_decoder_takes_is_one_broken_document(tmp_path, line):
    (path := tmp_path / "a.jsonl").write_text(f'{line}\n{{"text": "good"}}\n')
    broken = []
    assert list(read_documents(path, on_broken=broken.append)) == ["good"]
    assert [error.reason for error in broken] == ["not valid JSON"]
    assert "line 1" in str(broken[0])


def test_a_parquet_row_that_is_no_text_is_one_broken_document(tmp_path):
    column = pa.array([b"good", b"\xff\xfe", b"better"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path := tmp_path / "a.parquet")
    broken = []
    assert list(read_documents(path, on_broken=broken.append)) == ["good", "better"]
    assert "row 2" in str(broken[0])


def test_few_documents_leave_one_for_validation(tmp_path, capsys):
    manifest = prepare([text_file(tmp_path / "a.jsonl", 12)], tmp_path / "out", vocab_size=300, progress=False)
    assert {name: split["documents"] for name, split in manifest["splits"].items()} == {"train": 11, "val": 1}
    assert "the one nearest to it is held out" in capsys.readouterr().err
    text_file(tmp_path / "one.jsonl", 1)
    with pytest.raises(ValueError, match="no document fell into the held-out split"):
        prepare([tmp_path / "one.jsonl"], tmp_path / "one", vocab_size=300, progress=False)


def test_two_at_once_on_one_folder(tmp_path, monkeypatch):
    source = text_file(tmp_path / "a.jsonl")
    encode = preparing.encode_units

    def meanwhile(*arguments):
        with pytest.raises(ValueError, match=r"output folder .*out' is in use by another run .* another --output"):
            prepare([source], tmp_path / "out", vocab_size=300, progress=False)
        encode(*arguments)

    monkeypatch.setattr(preparing, "encode_units", meanwhile)
    prepare([source], tmp_path / "out", vocab_size=300, progress=False)


def test_ctrl_c_in_prepare_is_one_line(tmp_path):
    text_file(tmp_path / "a.jsonl")
    code = "import train.data.prepare as p, signal, runpy, sys\n"
    code += "p.encode_units = lambda *_: signal.raise_signal(signal.SIGINT)\n"
    code += f"sys.argv = ['prepare', '--input={tmp_path}/a.jsonl', '--output={tmp_path}/out', '--vocab_size=300']\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "runpy.run_module('train.prepare', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "stopped; the same command goes on where it was")
    assert "Traceback" not in done.stderr


def test_more_token_files_than_a_process_may_open(tmp_path):
    source = text_file(tmp_path / "a.jsonl", 320)
    prepare([source], tmp_path / "out", vocab_size=300, shard_tokens=5, validation_fraction=0, progress=False)
    data = open_dataset(tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert len(data.shards) > 300
    whole = np.concatenate([np.fromfile(path, data.dtype) for path in data.shards])
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, limits[1]))
    try:
        out = np.empty(data.tokens, np.int32)
        data.read(0, out)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_array_equal(out, whole)


# ---- tokenizers


def saved(core, path, **changes):
    content = json.loads(core.to_str()) | changes
    path.write_text(json.dumps(content))
    return path


def word_level(unknown=True):
    vocab = {word: i for i, word in enumerate(["</s>", "[UNK]", "the", "cat", "a", "dog", "b", "<", "/s>"])}
    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]" if unknown else ""))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


def unigram(unknown=True):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz</>")]
    core = tokenizers.Tokenizer(models.Unigram(pieces, 0 if unknown else None, False))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return core


def added_without_special():
    core = train_bpe(["the cat"], 300).core
    content = json.loads(core.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("build", [word_level, unigram, added_without_special])
def test_no_document_can_forge_its_own_end(tmp_path, build):
    tokenizer = load_tokenizer(saved(build(), tmp_path / "tokenizer.json"))
    name = tokenizer.eos_token
    for text in (f"the cat {name} a dog", name, f"a{name}b", name * 3):
        ids = tokenizer.encode(text)
        assert ids
        assert tokenizer.eos_id not in ids
    assert tokenizer.encode("the cat") == tokenizer.core.encode("the cat", add_special_tokens=False).ids


@pytest.mark.parametrize("build", [word_level, unigram])
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, build):
    with pytest.raises(ValueError, match=r"cannot encode every text.*unknown token"):
        load_tokenizer(saved(build(unknown=False), tmp_path / "tokenizer.json"))


def test_a_bpe_of_characters_that_drops_others_is_refused(tmp_path):
    core = tokenizers.Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2}, []))
    with pytest.raises(ValueError, match=r"becomes nothing.*unknown token"):
        load_tokenizer(saved(core, tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("sign", ["a", " ", "-", "\0"])
def test_a_long_run_of_one_kind_trains_in_time_that_grows_with_it(sign):
    """54 s for 200,000 letters without a blank: every merge went through all of them."""
    began = time.process_time()
    tokenizer = train_bpe([sign * 200_000, "the cat sees a dog"], 300)
    assert time.process_time() - began < 10
    assert tokenizer.decode(tokenizer.encode(sign * 1000)) == sign * 1000


def test_the_exported_tokenizer_puts_no_token_before_a_text(tmp_path):
    """A Llama-3-like post-processor begins every text with a token that training never saw."""
    core = train_bpe(["the cat"], 300).core
    core.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = load_tokenizer(path := saved(core, tmp_path / "tokenizer.json"))
    assert core.encode("the").ids != tokenizer.encode("the")
    write_folder(tmp_path / "out", build(MODEL, 1, 0)[1], MODEL, seq_len=16, tokenizer=tokenizer, tokenizer_path=path)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert exported.encode("the").ids == tokenizer.encode("the")


# ---- file systems


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def no_lock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with WorkdirLock(tmp_path):
        assert "has no locks" in capsys.readouterr().err
    assert not is_held(tmp_path)
