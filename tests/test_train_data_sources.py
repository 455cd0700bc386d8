"""Data from several folders by weight, and data from nowhere."""

import json
import math

import numpy as np
import pytest

from tests.trainer import run_config, token_folder
from train.config.settings import Data
from train.data.prepare import prepare
from train.data.sources import identity, open_data, open_split
from train.data.token_files import open_dataset, train_iterator
from train.evaluation import validation
from train.model import decoder
from train.state.state import initial_state

SEQ_LEN = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of one tokenizer: `few` has a fraction of the tokens of `many`, and other letters."""
    root = tmp_path_factory.mktemp("sources")
    for name, letters, count in (("many", "ab", 300), ("few", "yz", 40)):
        (root / f"{name}.txt").write_text("".join(np.random.default_rng(0).choice(list(letters), 2 * count)))
        (root / f"{name}-val.txt").write_text(letters * count)
        tokenizer = None if name == "many" else root / "many" / "tokenizer.json"
        prepare(
            [root / f"{name}.txt"],
            root / name,
            validation=[root / f"{name}-val.txt"],
            vocab_size=None if tokenizer else 257,
            tokenizer=tokenizer,
            progress=False,
        )
    return root


def mixed(folders, weights=(3, 1), **train):
    sources = [(str(folders / name), weight) for name, weight in zip(("many", "few"), weights, strict=True)]
    return run_config(data=Data(sources=sources), seq_len=SEQ_LEN, **train)


def iterator(dataset, batch_size=4, **options):
    return train_iterator(dataset, batch_size=batch_size, seq_len=SEQ_LEN, seed=0, **options)


def take(batches, count):
    return np.concatenate([next(batches)["tokens"] for _ in range(count)])


def few_rows(tokens, folders):
    """Which rows are from `few`."""
    tokenizer = open_dataset(folders / "few").tokenizer
    own = set(tokenizer.encode("yz"))
    return np.array([bool(own & set(row)) for row in tokens.tolist()])


def test_sources_give_their_share_of_every_stretch(folders):
    dataset = open_split(mixed(folders), "train")
    rows = few_rows(take(iterator(dataset), 100), folders)
    assert rows.mean() == pytest.approx(0.25, abs=0.005)
    stretches = rows.reshape(-1, 20).sum(1)
    assert stretches.min() >= 4
    assert stretches.max() <= 6


def test_each_window_of_a_source_comes_once_an_epoch_of_it(folders):
    config = mixed(folders)
    part = open_dataset(folders / "few")
    count = part.num_windows(SEQ_LEN)
    tokens = take(iterator(open_split(config, "train"), batch_size=1), 4 * count)
    found = tokens[few_rows(tokens, folders)][:count]
    expected = part.windows(np.arange(count), SEQ_LEN)
    np.testing.assert_array_equal(sorted(map(tuple, found)), sorted(map(tuple, expected)))


def test_the_position_of_a_mixture_is_exact_and_independent_of_processes(folders):
    dataset = open_split(mixed(folders), "train")
    running = iterator(dataset)
    take(running, 37)
    state = json.loads(json.dumps(running.get_state()))
    expected = take(running, 20)
    fresh = iterator(dataset)
    fresh.set_state(state)
    np.testing.assert_array_equal(take(fresh, 20), expected)
    halves = [iterator(dataset, process_index=i, process_count=2) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([take(half, 1) for half in halves]), take(iterator(dataset), 1))


def test_the_validation_loss_of_a_mixture_is_the_mean_by_shares(folders):
    config = mixed(folders, eval_batches=None)
    graphdef, state = decoder.structure(config.model, 1), initial_state(config)
    both = validation.Evaluator(graphdef, config, open_split(config, "val"))(state, 0)
    alone = {
        n: validation.Evaluator(graphdef, config, open_dataset(folders / n, "val"))(state, 0) for n in ("many", "few")
    }
    for name, values in alone.items():
        assert both[f"val_loss/{name}"] == values["val_loss"]
    loss = 0.75 * alone["many"]["val_loss"] + 0.25 * alone["few"]["val_loss"]
    assert both["val_loss"] == pytest.approx(loss, rel=1e-6)
    size = 0.75 * open_dataset(folders / "many", "val").bytes_per_token
    size += 0.25 * open_dataset(folders / "few", "val").bytes_per_token
    assert both["val_bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=1e-6)
    assert f"few {alone['few']['val_loss']:.4f}" in validation.describe(both)


def test_weights_belong_to_the_identity_of_a_run(folders):
    """Else a resume would continue at the old position of another order."""
    first, second = (identity(open_split(mixed(folders, w), "train")) for w in ((3, 1), (1, 1)))
    assert first != second
    assert first["tokens"] == second["tokens"]


def test_sources_that_do_not_go_together_are_refused(folders):
    foreign = Data(sources=[(str(folders / "many"), 1), (str(token_folder()), 1)])
    with pytest.raises(ValueError, match=r"different tokenizers; prepare one again with --tokenizer="):
        open_split(run_config(data=foreign), "train")
    twice = Data(sources=[(str(folders / "many"), 1), ("elsewhere/many", 1)])
    with pytest.raises(ValueError, match=r"same last component: \['many', 'many'\]"):
        open_split(run_config(data=twice), "train")
    with pytest.raises(ValueError, match=r"few has 81"):
        open_data(run_config(data=mixed(folders).data, seq_len=200))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one, such as --gin_bindings=\"Data.folder='runs/data'\""),
        ({"folder": "a", "synthetic": True}, "give exactly one"),
        ({"sources": ["a", "b"]}, "must be a list of"),
        ({"sources": [("a", 0)]}, "weights positive"),
    ],
)
def test_data_are_named_in_one_way(options, message):
    with pytest.raises(ValueError, match=message):
        Data(**options)


def test_random_tokens_are_the_same_again_and_frequent_as_in_text():
    config = run_config(data=Data(synthetic=True))
    train, val = open_data(config)
    first, again = (take(train_iterator(train, batch_size=8, seq_len=64, seed=1), 20) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    vocab = config.model.vocab_size
    counts = np.bincount(first.ravel(), minlength=vocab)
    assert len(counts) == vocab
    expected = np.log1p(1 / np.arange(1, 6)) / np.log(vocab)
    np.testing.assert_allclose(counts[:5] / counts.sum(), expected, rtol=0.1)
    assert not np.array_equal(val.windows(np.arange(4), 8), train.windows(np.arange(4), 8))
    with pytest.raises(ValueError, match=r"Data.synthetic=True has no tokenizer"):
        _ = train.tokenizer


def test_a_document_start_that_is_not_the_datas_is_refused():
    open_data(run_config(shape={"document_start": 0}))
    with pytest.raises(ValueError, match=r"Model.document_start=5, but documents of .* divided by the token 0"):
        open_data(run_config(shape={"document_start": 5}))
