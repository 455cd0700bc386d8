"""Token datasets: every window once an epoch, an exact position, and files that are checked before use."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from train.data.prepare import prepare
from train.data.token_files import eval_batches, open_dataset, train_iterator, verify_shards

SEQ_LEN = 14
BATCH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["sparse", "dense", "tensor", "core", "token", "phase", "expert", "router"]
    for i in range(40):
        (root / f"{i}.txt").write_text(" ".join(rng.choices(words, k=rng.randrange(20, 60))))
    # Shards of 101 tokens: windows cross their borders, some shards are shorter than two windows.
    prepare([root], root / "out", vocab_size=270, validation_fraction=0.2, shard_tokens=101, progress=False)
    return root / "out"


@pytest.fixture
def dataset(folder):
    return open_dataset(folder)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def flat(dataset):
    return np.concatenate([np.fromfile(p, dataset.dtype) for p in dataset.shards]).astype(np.int32)


def iterator(dataset, batch_size=BATCH, seed=0, **options):
    return train_iterator(dataset, batch_size=batch_size, seq_len=SEQ_LEN, seed=seed, **options)


def take(iterator, count):
    return np.stack([next(iterator)["tokens"] for _ in range(count)])


def test_reading_crosses_shards(dataset):
    everything = flat(dataset)
    assert len(dataset.shards) > 5
    for start, length in ((0, 1), (100, 2), (101, 101), (7, 350), (0, len(everything)), (len(everything) - 3, 3)):
        out = np.empty(length, np.int32)
        dataset.read(start, out)
        np.testing.assert_array_equal(out, everything[start : start + length])


def test_every_window_comes_once_per_epoch_and_epochs_differ(dataset):
    count = dataset.num_windows(SEQ_LEN)
    everything = flat(dataset)
    windows = np.stack([everything[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1] for i in range(count)])
    rows = take(iterator(dataset, batch_size=1), 3 * count)[:, 0]
    epochs = rows.reshape(3, count, SEQ_LEN + 1)
    for epoch in epochs:
        np.testing.assert_array_equal(sorted(map(tuple, epoch)), sorted(map(tuple, windows)))
        assert not np.array_equal(epoch, windows)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_each_token_is_predicted_once(dataset):
    targets = np.concatenate([b["tokens"][b["weight"] > 0, 1:].ravel() for b in full_eval(dataset)])
    everything = flat(dataset)
    np.testing.assert_array_equal(targets, everything[1 : 1 + len(targets)])
    assert len(everything) - 1 - len(targets) < SEQ_LEN


def full_eval(dataset):
    return list(eval_batches(dataset, batch_size=BATCH, seq_len=SEQ_LEN))


def test_batches_have_the_documented_shape_and_type(dataset):
    batch = next(iterator(dataset))
    assert batch.keys() == {"tokens"}
    assert batch["tokens"].shape == (BATCH, SEQ_LEN + 1)
    assert batch["tokens"].dtype == np.int32
    assert batch["tokens"].flags.writeable


def test_same_seed_same_order_other_seed_other_order(dataset):
    first = take(iterator(dataset), 5)
    np.testing.assert_array_equal(first, take(iterator(dataset), 5))
    assert not np.array_equal(first, take(iterator(dataset, seed=1), 5))


@pytest.mark.parametrize("position", ["start", "inside", "last of the epoch", "epoch boundary", "third epoch"])
def test_resume_is_exact(dataset, position):
    batches_per_epoch = dataset.num_windows(SEQ_LEN) / BATCH
    assert batches_per_epoch % 1, "the boundary should fall inside a batch"
    consumed = {
        "start": 0,
        "inside": 7,
        "last of the epoch": int(batches_per_epoch) - 1,
        "epoch boundary": int(batches_per_epoch) + 1,
        "third epoch": int(2.5 * batches_per_epoch),
    }[position]
    running = iterator(dataset)
    for _ in range(consumed):
        next(running)
    state = json.loads(json.dumps(running.get_state()))  # checkpoints store it as JSON
    expected = take(running, 2 * int(batches_per_epoch))
    fresh = iterator(dataset)
    fresh.set_state(state)
    np.testing.assert_array_equal(take(fresh, len(expected)), expected)
    running.set_state(state)  # also backwards, in the iterator that has gone on
    np.testing.assert_array_equal(take(running, 3), expected[:3])


def test_processes_share_the_global_batch(dataset):
    whole = iterator(dataset)
    parts = [iterator(dataset, process_index=i, process_count=2) for i in range(2)]
    for _ in range(30):
        rows = np.concatenate([next(p)["tokens"] for p in parts])
        np.testing.assert_array_equal(rows, next(whole)["tokens"])
    assert parts[0].get_state() == whole.get_state()


def test_eval_batches_are_in_order_and_padded_with_weight_zero(dataset):
    batches = full_eval(dataset)
    count = dataset.num_windows(SEQ_LEN)
    assert count % BATCH, "the last batch should need padding"
    assert len(batches) == -(-count // BATCH)
    weight = np.concatenate([b["weight"] for b in batches])
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, np.arange(len(weight)) < count)
    assert not batches[-1]["tokens"][batches[-1]["weight"] == 0].any()
    two = list(eval_batches(dataset, batch_size=BATCH, seq_len=SEQ_LEN, max_batches=2))
    assert len(two) == 2
    np.testing.assert_array_equal(two[1]["tokens"], batches[1]["tokens"])


def test_a_sequence_as_long_as_the_data_works_and_one_longer_is_refused(dataset):
    longest = dataset.tokens - 1
    assert next(train_iterator(dataset, batch_size=1, seq_len=longest, seed=0))["tokens"].shape[1] == dataset.tokens
    message = rf"sequence length {longest + 1} needs {longest + 2} tokens, but the train split .* has {dataset.tokens}"
    with pytest.raises(ValueError, match=message):
        train_iterator(dataset, batch_size=1, seq_len=longest + 1, seed=0)
    with pytest.raises(ValueError, match=message):
        eval_batches(dataset, batch_size=1, seq_len=longest + 1)


def test_bad_arguments_are_named(dataset):
    with pytest.raises(ValueError, match=r"batch_size=5 must be a positive multiple of process_count=2"):
        iterator(dataset, batch_size=5, process_count=2)
    with pytest.raises(ValueError, match=r"process_index=2 must be"):
        iterator(dataset, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        eval_batches(dataset, batch_size=0, seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match="seq_len=0"):
        train_iterator(dataset, batch_size=1, seq_len=0, seed=0)


def test_a_missing_folder_manifest_or_split_is_named(copy, tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json.*train\.prepare"):
        open_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match=rf"{Path.cwd()}/none holds no .* start in the folder from which none leads"):
        open_dataset("none")
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'val'\]"):
        open_dataset(copy, "test")
    (copy / "manifest.json").write_text('{"format": "venom-jax')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        open_dataset(copy)


@pytest.mark.parametrize("change", [{"version": 99}, {"format": "other"}, "a list"])
def test_a_manifest_of_another_kind_or_version_is_refused(change, copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    changed = [1] if change == "a list" else manifest | change
    (copy / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"manifest\.json: expected format 'venom-jax token shards' version 1, found"):
        open_dataset(copy)


def test_a_truncated_token_file_is_refused_with_both_sizes(copy):
    path = copy / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00001\.bin is truncated or foreign: expected 202 bytes .* found 200"):
        open_dataset(copy)


def test_a_foreign_token_file_of_the_right_size_is_refused(copy):
    path = copy / "train-00000.bin"
    path.write_bytes(b"\1\0" * 101)
    with pytest.raises(ValueError, match=r"train-00000\.bin is not the one that was prepared: expected checksum"):
        open_dataset(copy)
    assert open_dataset(copy, "val").tokens > 0


def test_a_bit_flipped_anywhere_is_found_by_reading_it_all(copy):
    path = copy / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    verify_shards(copy, "train")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000.bin was changed after it was prepared"):
        verify_shards(copy, "train")


def test_a_missing_token_file_is_named(copy):
    (copy / "train-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"train-00002\.bin is missing: the manifest lists it with 101 tokens"):
        open_dataset(copy)


def test_another_tokenizer_beside_the_tokens_is_refused(copy):
    path = copy / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer that wrote the token files"):
        open_dataset(copy)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        open_dataset(copy)


def test_a_token_beyond_the_vocabulary_stops_the_run(copy):
    dataset = open_dataset(copy)
    tokens = np.fromfile(dataset.shards[0], "<u2")
    tokens[50] = dataset.vocab_size
    tokens.tofile(dataset.shards[0])  # damaged after it was checked
    with pytest.raises(ValueError, match=rf"hold token {dataset.vocab_size}, but the vocabulary has"):
        list(eval_batches(dataset, batch_size=2, seq_len=SEQ_LEN))
