"""Byte-level BPE: lossless on any text, deterministic, and no document can forge its own end."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_bpe

TEXTS = [f"the quick brown fox {i} jumps over the lazy dog {i * i}, and over the fox again" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(TEXTS), 300)


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_compresses(tokenizer):
    again = train_bpe(iter(TEXTS), 300)
    assert again.to_json() == tokenizer.to_json()
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 1.5


def test_another_text_gives_another_tokenizer(tokenizer):
    assert train_bpe([t.upper() for t in TEXTS], 300).sha256 != tokenizer.sha256


def test_the_name_of_the_end_token_in_a_text_is_ordinary_text(tokenizer, tmp_path):
    text = f"one{END_OF_DOCUMENT}two"
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    for candidate in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json")):
        ids = candidate.encode(text)
        assert candidate.eos_id not in ids
        assert candidate.decode(ids) == text


def test_the_end_token_leaves_no_trace_when_decoding(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("fox"), tokenizer.eos_id]) == "fox"


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
    text = json.loads('"a\\ud83db"')
    assert tokenizer.decode(tokenizer.encode(text)) == "a�b"


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS[:5]) == [tokenizer.encode(t) for t in TEXTS[:5]]


def test_a_saved_tokenizer_loads_to_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    loaded = load_tokenizer(path)
    assert loaded.sha256 == tokenizer.sha256
    assert (loaded.eos_id, loaded.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_a_foreign_tokenizer_keeps_neither_its_template_nor_its_length_limit(tokenizer, tmp_path):
    content = json.loads(tokenizer.to_json())
    content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END_OF_DOCUMENT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END_OF_DOCUMENT: {"id": END_OF_DOCUMENT, "ids": [0], "tokens": [END_OF_DOCUMENT]}},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_vocabulary_size_covers_ids_with_gaps(tokenizer, tmp_path):
    content = json.loads(tokenizer.to_json())
    content["model"]["vocab"] = {k: (v + 1000 if v == 299 else v) for k, v in content["model"]["vocab"].items()}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).vocab_size == 1300


def test_the_end_token_is_found_by_its_usual_names_or_by_the_given_one(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json().replace(END_OF_DOCUMENT, "<|end_of_text|>"))
    assert load_tokenizer(path).eos_token == "<|end_of_text|>"
    path.write_text(tokenizer.to_json().replace(END_OF_DOCUMENT, "<|stop|>"))
    with pytest.raises(ValueError, match=r"none of the usual end-of-document tokens .*--eos_token"):
        load_tokenizer(path)
    assert load_tokenizer(path, "<|stop|>").eos_id == 0
    with pytest.raises(ValueError, match=r"has no token '<\|none\|>'"):
        load_tokenizer(path, "<|none|>")


def test_errors_name_the_value_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=256 is too small.*at least 257"):
        train_bpe(TEXTS, 256)
    with pytest.raises(ValueError, match="the input holds no text"):
        train_bpe(["", ""], 300)
    with pytest.raises(ValueError, match="no tokenizer file at"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
