"""Decoders of published models: their logits by numpy and by transformers, the cache, pruned inputs, bad files."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests import gguf_file
from tests.pretrained_models import CONFIGS, LAYERS, LENGTH, V, numpy_logits, write
from venom_jax import pretrained
from venom_jax.activation import NM, Parameters, Sparsity
from venom_jax.pretrained.architecture import from_config
from venom_jax.pretrained.gguf import File

TOKENS = np.random.default_rng(0).integers(0, V, LENGTH)
FAMILIES = pytest.mark.parametrize("family", list(CONFIGS))
PLAIN = CONFIGS["arcee"] | {"model_type": "llama", "hidden_act": "silu", "rope_scaling": None}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, model) of each family."""
    root = tmp_path_factory.mktemp("models")
    return {name: (folder := write(root / name, config), pretrained.load(folder)) for name, config in CONFIGS.items()}


def logits(model, tokens, **options):
    states, _ = pretrained.hidden(model.architecture, model.weights, jnp.asarray(tokens)[None], **options)
    return np.asarray(pretrained.logits(model.architecture, model.weights, states)[0])


@FAMILIES
def test_logits_are_those_of_the_definition(models, family):
    folder, model = models[family]
    np.testing.assert_allclose(logits(model, TOKENS), numpy_logits(folder, TOKENS), atol=1e-4)


@FAMILIES
def test_logits_are_those_of_transformers(models, family):
    torch = pytest.importorskip("torch", reason="needs torch (extra export)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra export)")
    folder, model = models[family]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", torch_dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits(model, TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_tokens_behind_a_cache_give_what_one_pass_gives(models, family):
    _, model = models[family]
    arch, weights = model.architecture, model.weights
    whole = logits(model, TOKENS)
    cache = pretrained.empty_cache(arch, 1, LENGTH + 3, jnp.float32)
    step = jax.jit(lambda tokens, cache, at: pretrained.hidden(arch, weights, tokens, cache=cache, position=at))
    found, at = [], 0
    for count in (5, 1, 1, 5, *[1] * (LENGTH - 12)):
        states, cache = step(jnp.asarray(TOKENS[at : at + count])[None], cache, at)
        found.append(pretrained.logits(arch, weights, states)[0])
        at += count
    np.testing.assert_allclose(np.concatenate(found), whole, atol=2e-5)


@pytest.mark.parametrize("criterion", ["act", "clact", "clact_causal"])
def test_pruned_tokens_do_not_see_later_ones_batch_mates_or_padding(models, criterion):
    _, model = models["qwen2"]
    sparsity = Sparsity(NM(2, 4), criterion, "token", "variance")
    whole = logits(model, TOKENS, sparsity=sparsity)
    changed = np.concatenate([TOKENS[:10], (TOKENS[10:] + 1) % V])
    other = logits(model, changed, sparsity=sparsity)
    assert np.allclose(whole[:10], other[:10], atol=1e-5) == (criterion != "clact")
    batch = jnp.stack([TOKENS, changed])
    states, _ = pretrained.hidden(model.architecture, model.weights, batch, sparsity=sparsity)
    np.testing.assert_allclose(pretrained.logits(model.architecture, model.weights, states)[0], whole, atol=2e-5)
    padded = np.concatenate([TOKENS, np.full(6, 3)])
    valid = (jnp.arange(len(padded)) < LENGTH)[None]
    np.testing.assert_allclose(logits(model, padded, sparsity=sparsity, valid=valid)[:LENGTH], whole, atol=2e-5)


@pytest.mark.parametrize("criterion", ["act", "clact_causal"])
def test_pruning_step_by_step_is_pruning_at_once(models, criterion):
    _, model = models["gemma3"]
    arch, weights = model.architecture, model.weights
    sparsity = Sparsity(NM(2, 4), criterion, variance="variance", dense_prefix=2)
    whole = logits(model, TOKENS, sparsity=sparsity)
    cache = pretrained.empty_cache(arch, 1, LENGTH, jnp.float32, sparsity)
    step = jax.jit(
        lambda tokens, cache, at: pretrained.hidden(arch, weights, tokens, cache=cache, position=at, sparsity=sparsity)
    )
    for at in range(LENGTH):
        states, cache = step(jnp.asarray(TOKENS[at : at + 1])[None], cache, at)
        np.testing.assert_allclose(pretrained.logits(arch, weights, states)[0, 0], whole[at], atol=5e-5)


@pytest.mark.parametrize("family", ["llama", "arcee"])
def test_filters_prune_exactly_the_named_layers(models, family):
    """A shift of NaN reaches the logits exactly where a layer is pruned."""
    _, model = models[family]
    arch = model.architecture
    poison = {name: Parameters(shift=jnp.full((LAYERS, size), jnp.nan)) for name, (size, _) in arch.linears.items()}
    for name in arch.linears:
        pruned = Sparsity(NM(2, 4), shift="channel", layers=(name,))
        assert np.isnan(logits(model, TOKENS, sparsity=pruned, parameters=poison)).any()
        others = {other: p for other, p in poison.items() if other != name}
        clean = {name: Parameters(shift=jnp.zeros((LAYERS, arch.linears[name][0])))}
        assert np.isfinite(logits(model, TOKENS, sparsity=pruned, parameters=others | clean)).all()
    off = tuple((f"{i}.{name}", None) for i in range(LAYERS) for name in arch.linears)
    all_dense = Sparsity(NM(2, 4), shift="channel", overrides=off)
    np.testing.assert_array_equal(logits(model, TOKENS, sparsity=all_dense, parameters=poison), logits(model, TOKENS))


def test_one_layer_can_have_a_pattern_of_its_own(models):
    _, model = models["llama"]
    mixed = Sparsity(NM(2, 4), layers=("up",), overrides=(("1.up", NM(4, 4)), ("0.q", NM(1, 4))))
    flat = Sparsity(NM(2, 4), layers=(), overrides=(("0.up", NM(2, 4)), ("2.up", NM(2, 4)), ("0.q", NM(1, 4))))
    np.testing.assert_allclose(logits(model, TOKENS, sparsity=mixed), logits(model, TOKENS, sparsity=flat), atol=1e-5)


def test_a_layer_that_the_pattern_does_not_divide_is_refused(tmp_path):
    model = pretrained.load(write(tmp_path, CONFIGS["llama"] | {"intermediate_size": 66}))
    with pytest.raises(ValueError, match="66 inputs is no multiple of 4"):
        logits(model, TOKENS, sparsity=Sparsity(NM(2, 4)))


def test_weights_stay_in_the_type_they_are_stored_in(tmp_path):
    folder = write(tmp_path, CONFIGS["qwen3"], dtype=jnp.bfloat16)
    model = pretrained.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.weights)} == {jnp.dtype(jnp.bfloat16)}
    exact = logits(pretrained.load(folder, jnp.float32), TOKENS)
    assert np.linalg.norm(logits(model, TOKENS) - exact) < 0.05 * np.linalg.norm(exact)


# Folders that cannot be read.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not read; read are llama"),
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not read"),
        ({"hidden_act": "gelu"}, "hidden activation 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_another_model_is_refused_by_name(change, words):
    with pytest.raises(NotImplementedError, match=words):
        from_config(PLAIN | change, "config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 3}, "4 heads are no multiple of 3"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"rms_norm_eps": "small"}, "could not convert"),
        ({"rope_theta": 0}, "cannot be computed"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"rope_scaling": 3}, "wrong kind"),
    ],
)
def test_a_configuration_that_cannot_be_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        from_config(PLAIN | change, "config.json")


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", PLAIN)


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "lack model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}), r"\(3,\), but config.json says \(32,\)"),
        (lambda t: t.update({"model.norm.weight": np.zeros(32, np.int32)}), "stored as I32"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}), "does not have"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=words):
        pretrained.load(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    (folder / "model-2.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"is stored in model-2.safetensors and in model.safetensors"):
        pretrained.load(folder)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no model at"):
        pretrained.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ValueError, match=r"no .safetensors file"):
        pretrained.load(tmp_path)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_safetensors_file_is_named_or_read(folder, data):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    try:
        path.write_bytes(damage(good, data, head=4000))
        assert str(folder) in problem(folder)
    finally:
        path.write_bytes(good)


def problem(source):
    """What reading it says; the source's name where it can be read."""
    try:
        pretrained.load(source)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return str(source)


def damage(good, data, *, head):
    """Cut off somewhere, or with some bytes of its beginning changed."""
    if data.draw(st.booleans()):
        return good[: data.draw(st.integers(0, len(good) - 1))]
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(head, len(bad)) - 1))
        word = data.draw(st.sampled_from([b"\xff", b"\xff" * 8, b"\0" * 4, b"\x7f", b"9", b"\0\0\0\0\0\0\0\x80"]))
        bad[at : at + len(word)] = word
    return bytes(bad[: len(good)])


# GGUF.


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    """(the file's bytes, the folder with what it holds before rounding, its architecture)."""
    folder = write(tmp_path_factory.mktemp("gguf") / "llama", PLAIN | {"vocab_size": 259})
    arch = from_config(json.loads((folder / "config.json").read_text()), "config.json")
    kinds = [gguf_file.Q4_1, gguf_file.Q8_0, gguf_file.F16, gguf_file.F32]
    tensors = gguf_file.of_folder(load_file(folder / "model.safetensors"), arch, kinds)
    return gguf_file.file_bytes(gguf_file.model_values(arch), tensors), folder, arch


def test_a_gguf_holds_the_model_that_was_put_into_it(small_gguf, tmp_path):
    content, folder, arch = small_gguf
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    model = pretrained.load(path)
    expected = pretrained.load(folder)
    assert [rope.base for rope in model.architecture.ropes] == [rope.base for rope in arch.ropes]
    for found, exact in zip(jax.tree.leaves(model.weights), jax.tree.leaves(expected.weights), strict=True):
        assert np.abs(found - exact).max() <= 0.06 * np.abs(exact).max()
    all_f32 = gguf_file.of_folder(load_file(folder / "model.safetensors"), arch, [gguf_file.F32])
    path.write_bytes(gguf_file.file_bytes(gguf_file.model_values(arch), all_f32, version=2))
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(path).weights, expected.weights)


def test_the_tokenizer_of_a_gguf_cuts_digits_and_merges(small_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_gguf[0])
    core = pretrained.load(path).tokenizer
    assert core is not None
    assert core.encode("the 12").tokens == ["the", "Ġ", "1", "2"]
    assert core.decode(core.encode("Thé the 12").ids) == "Thé the 12"
    assert core.encode("<|endoftext|>").ids == [0]


def test_blocks_are_read_as_ggufs_own_program_reads_them(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    rng = np.random.default_rng(1)
    tensors = {
        name: (rng.normal(size=(6, 96)).astype(np.float32), kind)
        for name, kind in (("a", gguf_file.Q4_1), ("b", gguf_file.Q8_0), ("c", gguf_file.F16), ("d", gguf_file.F32))
    }
    path = tmp_path / "blocks.gguf"
    path.write_bytes(gguf_file.file_bytes({"general.architecture": "llama"}, tensors))
    ours, theirs = File(path), gguf.GGUFReader(path)
    assert len(theirs.tensors) == 4
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.read(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def gguf_with(arch, values=None, tensors=None):
    return gguf_file.file_bytes(gguf_file.model_values(arch) | (values or {}), tensors or {})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"general.architecture": "mamba"}, NotImplementedError, "architecture 'mamba' is not read"),
        ({"llama.expert_count": 8}, NotImplementedError, "8 experts"),
        ({"llama.rope.scaling.type": "yarn"}, NotImplementedError, "rope scaling 'yarn'"),
        ({"llama.block_count": 0}, ValueError, "llama.block_count = 0"),
        ({"llama.block_count": "three"}, ValueError, "llama.block_count = 'three'"),
        ({"general.alignment": 7}, ValueError, "general.alignment = 7"),
        ({}, ValueError, "no matrix token_embd.weight"),
    ],
)
def test_a_gguf_that_cannot_be_read_is_named(small_gguf, tmp_path, change, error, words):
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_with(small_gguf[2], change))
    with pytest.raises(error, match=words):
        pretrained.load(path)


def test_other_kinds_tensors_and_tokenizers_are_refused(small_gguf, tmp_path):
    _, folder, arch = small_gguf
    path = tmp_path / "bad.gguf"
    tensors = gguf_file.of_folder(load_file(folder / "model.safetensors"), arch, [gguf_file.F32])
    path.write_bytes(gguf_with(arch, {}, tensors | {"rope_freqs.weight": (np.ones(4, np.float32), 0)}))
    with pytest.raises(ValueError, match=r"rope_freqs.weight, which a plain Llama"):
        pretrained.load(path)
    path.write_bytes(gguf_with(arch, {"tokenizer.ggml.pre": "llama-bpe"}, tensors))
    with pytest.raises(NotImplementedError, match="cutting rules 'llama-bpe'"):
        pretrained.load(path)
    good = gguf_with(arch, {}, {"x": (np.ones((1, 32), np.float32), 0)})
    path.write_bytes(good.replace(struct.pack("<QQIQ", 32, 1, 0, 0), struct.pack("<QQIQ", 32, 1, 12, 0)))
    with pytest.raises(NotImplementedError, match="tensor x is stored as Q4_K"):
        File(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"GGUF\x03", b"GGUX\x03", "does not begin with GGUF"),
        (b"GGUF\x03", b"GGUF\x01", "version 1 is not read"),
        (struct.pack("<QQIQ", 32, 1, 0, 0), struct.pack("<QQIQ", 2**40, 1, 0, 0), "lies outside the file"),
        (struct.pack("<QQIQ", 32, 1, 0, 0), struct.pack("<QQIQ", 32, 1, 0, 2**63), "lies outside the file"),
        (struct.pack("<QQIQ", 32, 1, 0, 0), struct.pack("<QQIQ", 33, 1, 8, 0), "cannot be stored as Q8_0"),
        (gguf_file.text("general.architecture"), struct.pack("<Q", 2**62) + b"general.architecture", "bytes left"),
    ],
)
def test_a_lying_gguf_is_named_with_the_place(tmp_path, old, new, words):
    good = gguf_file.file_bytes({"general.architecture": "llama"}, {"x": (np.ones((1, 32), np.float32), 0)})
    path = tmp_path / "bad.gguf"
    path.write_bytes(good)
    File(path)
    assert old in good
    path.write_bytes(good.replace(old, new))
    with pytest.raises(ValueError, match=words) as caught:
        File(path)
    assert str(path) in str(caught.value)


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_gguf_is_named_or_read(small_gguf, tmp_path, data):
    path = tmp_path / "bad.gguf"
    path.write_bytes(damage(small_gguf[0], data, head=1200))
    assert str(path) in problem(path)
