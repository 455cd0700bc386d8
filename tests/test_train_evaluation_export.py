"""Export and import: the same function under Hugging Face's names, also by their own implementation."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import arcee_numpy
from tests.trainer import MODEL, build, three_phases, token_folder
from train.data.token_files import open_dataset
from train.evaluation import validation
from train.evaluation.export import export, write_folder
from train.model import arcee, decoder
from venom_jax import Recipe

GROUPED = replace(MODEL, heads=4, kv_heads=2, tied_head=True, rope_base=50.0, norm_epsilon=1e-2)
# Angles of a context four times as long as 16: pairs that stay, pairs that are slowed down, and one between.
YARN = replace(MODEL, d_model=64, rope_base=100.0, rope_factor=4.0, rope_original_length=16, rope_fast=4.0)
SHAPES = pytest.mark.parametrize("shape", [MODEL, GROUPED, YARN], ids=["plain", "grouped and tied", "YaRN"])
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, 24)


@cache
def loud(shape):
    """A model whose every weight matters: a swapped pair of heads or features changes its logits at once."""
    graphdef, params, method = build(shape, 1, 3)
    rng = np.random.default_rng(4)
    noisy = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), jnp.float32), params)
    return graphdef, noisy, method


def our_logits(graphdef, params, method):
    def forward(params, method, tokens):
        return decoder.assemble(graphdef, params, method)(tokens, recipe=Recipe.dense())[0]

    return np.asarray(jax.jit(forward)(params, method, TOKENS[None])[0])


def write(folder, shape, params, **options):
    dataset = open_dataset(token_folder(), "train")
    options = {"dtype": "float32"} | options
    write_folder(
        folder, params, shape, seq_len=64, tokenizer=dataset.tokenizer, tokenizer_path=dataset.tokenizer_path, **options
    )
    return folder


@SHAPES
def test_the_exported_files_hold_the_same_function(tmp_path, shape):
    graphdef, params, method = loud(shape)
    ours = our_logits(graphdef, params, method)
    assert ours.std() > 1, "logits near zero would agree whatever the layout"
    np.testing.assert_allclose(
        arcee_numpy.logits(write(tmp_path, shape, params), TOKENS), ours, atol=1e-4 * np.abs(ours).max()
    )


@SHAPES
def test_the_shape_comes_back(tmp_path, shape):
    values = arcee.config_json(shape, seq_len=64, eos_id=0, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert replace(arcee.read_model(tmp_path), init_std=shape.init_std) == replace(
        shape, kv_heads=shape.key_value_heads
    )


@SHAPES
def test_transformers_computes_the_same_logits(tmp_path, shape):
    torch = pytest.importorskip("torch", reason="needs torch (extra export)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra export)")
    graphdef, params, method = loud(shape)
    ours = our_logits(graphdef, params, method)
    # Scaled to logits of order 1, so that 1e-4 means the same for both shapes.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(write(tmp_path, shape, params), local_files_only=True)
    assert type(loaded).__name__ == "ArceeForCausalLM"
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        theirs = loaded(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    np.testing.assert_allclose(theirs / ours.std(), ours / ours.std(), atol=1e-4)


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra export)")
    dataset = open_dataset(token_folder(), "train")
    loaded = transformers.AutoTokenizer.from_pretrained(write(tmp_path, MODEL, loud(MODEL)[1]), local_files_only=True)
    text = "the cat sees  a dog.\nmy house"
    assert loaded(text)["input_ids"] == dataset.tokenizer.encode(text)
    assert loaded.decode(dataset.tokenizer.encode(text)) == text
    assert loaded.eos_token_id == dataset.tokenizer.eos_id


@SHAPES
def test_a_round_trip_changes_no_bit(tmp_path, shape):
    params = loud(shape)[1]
    folder = write(tmp_path, shape, params)
    assert replace(arcee.read_model(folder), init_std=shape.init_std, kv_heads=shape.kv_heads) == shape
    jax.tree.map(np.testing.assert_array_equal, arcee.read_params(folder, shape), params)


def test_weights_are_rounded_to_the_type_that_was_asked_for(tmp_path):
    params = loud(MODEL)[1]
    found = load_file(write(tmp_path, MODEL, params, dtype="bfloat16") / "model.safetensors")
    assert {w.dtype for w in found.values()} == {np.dtype(jnp.bfloat16)}
    expected = params["blocks"]["ffn"]["w1"][1].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(found["model.layers.1.mlp.up_proj.weight"], expected)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_weights_in_several_files_are_read(tmp_path):
    params = loud(MODEL)[1]
    folder = write(tmp_path, MODEL, params)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for part in (0, 1):
        save_file({n: tensors[n] for n in names[part::2]}, folder / f"model-0000{part + 1}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, arcee.read_params(folder, MODEL), params)


def test_inside_a_sparse_phase_the_baked_model_is_exported(tmp_path):
    workdir = three_phases()[1]
    text = export(f"{workdir}@6", tmp_path / "out", "float32")
    assert "step 6" in text
    assert "inside a sparse phase (act24+w24 E=4 k=1): the exported model is dense, its thresholded weights" in text
    up = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    kept = (up.reshape(*up.shape[:-1], -1, 4) != 0).sum(-1)
    assert kept.max() == 2
    run = validation.restore(f"{workdir}@6")
    ours = our_logits(run.graphdef, run.dense_params(), run.state.method)
    np.testing.assert_allclose(arcee_numpy.logits(tmp_path / "out", TOKENS), ours, atol=1e-4)
    assert "sparse phase" not in export(f"{workdir}@12", tmp_path / "end", "float32")


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "train.export", f"--workdir={three_phases()[1]}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 12 as ArceeForCausalLM, bfloat16, in ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_what_cannot_be_exported_is_refused(tmp_path):
    workdir = three_phases()[1]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not an empty folder"):
        export(str(workdir), tmp_path, "float32")
    with pytest.raises(ValueError, match=r"cannot be written: Not a directory"):
        export(str(workdir), tmp_path / "file" / "out", "float32")
    with pytest.raises(ValueError, match=r"no checkpoint of step 99; it has \[1, 2, 3"):
        export(f"{workdir}@99", tmp_path / "out", "float32")
    with pytest.raises(ValueError, match=r"holds no config.gin"):
        export(str(tmp_path), tmp_path / "out", "float32")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "llama"}, ValueError, "model_type 'llama'"),
        ({"hidden_act": "silu"}, ValueError, "hidden_act 'silu'"),
        ({"attention_bias": True}, NotImplementedError, "attention_bias = True"),
        ({"mlp_bias": True}, NotImplementedError, "mlp_bias = True"),
        ({"head_dim": 8}, NotImplementedError, "head_dim = 8"),
        ({"rope_scaling": {"rope_type": "llama3"}}, NotImplementedError, "rope_type = 'llama3'"),
    ],
)
def test_models_that_this_decoder_cannot_be_are_refused(tmp_path, change, error, message):
    values = arcee.config_json(MODEL, seq_len=8, eos_id=0, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(error, match=message):
        arcee.read_model(tmp_path)


def test_rope_base_in_either_place_is_read(tmp_path):
    values = arcee.config_json(MODEL, seq_len=8, eos_id=0, dtype="float32")
    del values["rope_theta"]
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert arcee.read_model(tmp_path).rope_base == 77.0


def test_broken_weights_are_named(tmp_path):
    folder = write(tmp_path, MODEL, loud(MODEL)[1])
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({n: w for n, w in tensors.items() if n != "model.norm.weight"}, path)
    with pytest.raises(ValueError, match=r"lack model\.norm\.weight"):
        arcee.read_params(folder, MODEL)
    save_file(tensors | {"model.norm.weight": np.ones(5, np.float32)}, path)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \(5,\), but its config.json says \(32,\)"):
        arcee.read_params(folder, MODEL)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        arcee.read_params(folder, MODEL)
    (folder / "config.json").write_text('{"model_type": "arcee", "vocab_size": 5}')
    with pytest.raises(ValueError, match=r"config\.json lacks hidden_size, intermediate_size"):
        arcee.read_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        arcee.read_model(folder)
