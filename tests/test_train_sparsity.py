"""train.sparsify: the trainer's own model as a subject, grids, what is saved, learning, tasks and text."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pretrained_models import CONFIGS, write
from tests.trainer import three_phases
from train.evaluation import harness
from train.evaluation.validation import restore
from train.model.decoder import assemble
from train.sparsity import grid, report, saved, usage
from train.sparsity.run import Texts, run
from train.sparsity.subject import architecture_of, load_subject
from train.sparsity.texts import cut_windows, find_texts
from venom_jax import Recipe, pretrained
from venom_jax.activation import NM, Sparsity, Unstructured
from venom_jax.pretrained import calibration, comparison, hidden, logits

ITEMS = Path(__file__).parent / "data" / "eval"
WORDS = tuple("the cat sees a dog and my house is near the old tree where birds sing all day".split())  # noqa: SIM905
MIXED = (("1.up", None), ("2.q", NM(1, 4)))
LEARNED = Sparsity(NM(1, 4), shift="learned", learn_bias=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(held-out files, calibration files)."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name in ("held-out", "calibration"):
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(WORDS, 600)))
    return [folder / "held-out.txt"], [folder / "calibration.txt"]


@pytest.fixture(scope="module")
def subject():
    return load_subject(str(three_phases()[1]))


@pytest.fixture(scope="module")
def windows(subject, texts):
    """(held-out, calibration)."""
    return tuple(cut_windows(paths, subject.tokenizer, length=16, count=6) for paths in texts)


def cells_of(text, base=None):
    return grid.parse_grid(text, base or Sparsity(NM(2, 4)))


def start(subject, windows, cells, output, **options):
    lines = []
    text, calibrated = windows
    return grid.run_grid(subject, cells, text, calibrated, output, grid.Options(**options), say=lines.append), lines


def test_a_checkpoint_computes_what_the_trainer_computes(subject, windows):
    restored = restore(three_phases()[1])
    decoder = assemble(restored.graphdef, restored.dense_params(), restored.state.method)
    tokens = windows[0].tokens
    expected, _ = decoder(jnp.asarray(tokens), recipe=Recipe.dense())
    states, _ = hidden(subject.architecture, subject.weights, jnp.asarray(tokens))
    np.testing.assert_allclose(logits(subject.architecture, subject.weights, states), expected, atol=1e-4)
    assert list(subject.hashes) == [f"step {restored.step}"]


def test_attention_that_stops_at_documents_is_refused():
    config = replace(restore(three_phases()[1]).config.model, document_start=0)
    with pytest.raises(NotImplementedError, match="document_start=0"):
        architecture_of(config, 16, 0)


def test_a_grid_is_all_combinations():
    cells = cells_of("pattern=2:4,50%;criterion=act,magnitude;mitigation=none,channel+var;layers=all,q+up")
    assert [cell.name for cell in cells[:6]] == [
        "2:4 act",
        "2:4 act q+up",
        "2:4 act channel+var",
        "2:4 act channel+var q+up",
        "2:4 weights magnitude",
        "2:4 q+up weights magnitude",
    ]
    assert len(cells) == 2 * 6
    assert cells_of("")[0].sparsity == Sparsity(NM(2, 4))
    for text, words in (
        ("patern=2:4", "write each of pattern, criterion"),
        ("pattern=2:4;pattern=4:8", "at most once"),
        ("pattern=", "gives no value"),
        ("mitigation=none,none", "twice"),
        ("criterion=best", "use one of act"),
    ):
        with pytest.raises(ValueError, match=words):
            cells_of(text)


def test_a_grid_continues_where_it_stopped(subject, windows, tmp_path):
    cells = cells_of("pattern=2:4;criterion=act,rms,magnitude,wanda;mitigation=none,channel+var")
    rows, lines = start(subject, windows, cells, tmp_path)
    assert [row["cell"] for row in rows] == ["dense", *(cell.name for cell in cells)]
    assert sum("calibrating" in line for line in lines) == 1
    dense = rows[0]
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    assert dense["agree"] == 1
    assert all(row["loss"] != dense["loss"] and row["kl"] > 0 for row in rows[1:])
    content = (tmp_path / grid.CELLS).read_text()
    (tmp_path / grid.CELLS).write_text(content[: content.rindex("\n", 0, -1) + 20])  # the last line, cut off
    again, lines = start(subject, windows, cells, tmp_path)
    assert again == rows
    assert len(lines) == 1, "one cell computed, with the calibration of before"
    assert (tmp_path / grid.CELLS).read_text() == content


def test_the_loss_is_that_of_the_tokens(subject, windows, tmp_path):
    rows, _ = start(subject, windows, [], tmp_path)
    tokens = windows[0].tokens
    states, _ = hidden(subject.architecture, subject.weights, jnp.asarray(tokens))
    logp = jax.nn.log_softmax(logits(subject.architecture, subject.weights, states))
    picked = np.take_along_axis(np.asarray(logp)[:, :-1], tokens[:, 1:, None], axis=2)
    assert rows[0]["loss"] == pytest.approx(-picked.mean(), abs=1e-5)
    size = windows[0].bytes.sum()
    assert rows[0]["bits_per_byte"] == pytest.approx(-picked.sum() / np.log(2) / size, rel=1e-5)
    text = subject.tokenizer.decode(tokens[0][1:].tolist())
    assert windows[0].bytes[0] == len(text.encode())


def test_rows_of_unlike_windows_do_not_share_a_table(subject, windows, tmp_path):
    rows, _ = start(subject, windows, cells_of(""), tmp_path / "a")
    other = windows[1], windows[0]
    with pytest.raises(ValueError, match="of other windows of text and another calibration text; such rows do not"):
        start(subject, other, cells_of(""), tmp_path / "a")
    with pytest.raises(ValueError, match="of another model"):
        start(replace(subject, hashes={"x": "y"}), windows, cells_of(""), tmp_path / "a")
    theirs, _ = start(subject, other, [], tmp_path / "b")
    with pytest.raises(ValueError, match="do not belong in one table"):
        report.table([*rows, *theirs])
    with pytest.raises(ValueError, match="computed with other settings"):
        start(subject, windows, [grid.Cell("2:4 act", Sparsity(NM(1, 4)))], tmp_path / "a")
    (tmp_path / "a" / grid.CELLS).write_text("{}\n")
    with pytest.raises(ValueError, match=r"cells.jsonl, line 1 is no cell"):
        start(subject, windows, [], tmp_path / "a")


def test_what_is_saved_computes_the_same_bits(subject, windows, tmp_path):
    sparsity = Sparsity(NM(2, 4), "rms", "channel", "variance", low_rank=2, overrides=(("0.up", None),))
    rows, _ = start(subject, windows, [grid.Cell("cell", sparsity)], tmp_path)
    found = saved.read(tmp_path, subject.architecture, subject.hashes)
    assert found.sparsity == sparsity
    tokens = jnp.asarray(windows[0].tokens[0])
    states = comparison.dense_states(subject.architecture, subject.weights, tokens)
    again = comparison.compare(subject.architecture, subject.weights, tokens, states, *found)
    assert np.asarray(again.nll).mean(dtype=np.float64) == rows[1]["losses"][0]
    scorer = usage.scorer(usage.Model(subject, *found))
    ids = windows[0].tokens[0].tolist()
    assert scorer([(ids[:1], ids[1:])])[0][0] == pytest.approx(-float(again.nll.sum()), rel=1e-4)


def test_saved_settings_of_something_else_are_refused(subject, windows, tmp_path):
    start(subject, windows, [grid.Cell("cell", Sparsity(NM(2, 4), shift="channel"))], tmp_path)
    arch, settings = subject.architecture, tmp_path / saved.SETTINGS

    def read(hashes=subject.hashes, arch=arch, **options):
        return saved.read(tmp_path, arch, hashes, **options)

    with pytest.raises(ValueError, match=r"made for other weights: step \d+, model.safetensors differ"):
        read({"model.safetensors": "0"})
    assert read({"model.safetensors": "0"}, other_weights=True).sparsity.shift == "channel"
    with pytest.raises(ValueError, match=r"for 2 of 3 layers|of another model"):
        read(arch=replace(arch, layers=3, windows=(None,) * 3, ropes=arch.ropes[:1] * 3))
    with pytest.raises(ValueError, match="of another model"):
        read(arch=replace(arch, width=arch.width * 2))
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match="format 2 is not read by this version"):
        read()
    settings.write_text(json.dumps(content | {"settings": {}}))
    with pytest.raises(ValueError, match="cannot be used"):
        read()
    settings.write_text(json.dumps(content))
    parameters = tmp_path / saved.PARAMETERS
    parameters.write_bytes(parameters.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"is not the file that sparsity.json was written with"):
        read()
    parameters.unlink()
    with pytest.raises(ValueError, match="cannot be used"):
        read()


def test_learning_lowers_the_divergence_of_other_text(subject, windows, tmp_path):
    start_row, _ = start(
        subject, windows, [grid.Cell("plain", replace(LEARNED, shift="channel", learn_bias=False))], tmp_path / "a"
    )
    rows, lines = start(
        subject, windows, [grid.Cell("learned", LEARNED)], tmp_path / "b", learn_steps=40, learn_rate=2e-3
    )
    assert rows[1]["kl"] < 0.8 * start_row[1]["kl"]
    assert sum("learned" in line and "steps" in line for line in lines) == 3
    assert not (tmp_path / "b" / grid.LEARNING).exists()


def test_learning_continues_with_the_same_bits(subject, windows, tmp_path):
    options = {"learn_steps": 20, "learn_rate": 0.01}
    whole, _ = start(subject, windows, [grid.Cell("learned", LEARNED)], tmp_path / "a", **options)

    class StoppedError(Exception):
        pass

    def stop(line):
        if "learned 16" in line:
            raise StoppedError

    cells = [grid.Cell("learned", LEARNED)]
    with pytest.raises(StoppedError):
        grid.run_grid(subject, cells, windows[0], windows[1], tmp_path / "b", grid.Options(**options), say=stop)
    assert (tmp_path / "b" / grid.LEARNING).exists()
    continued, lines = start(subject, windows, [grid.Cell("learned", LEARNED)], tmp_path / "b", **options)
    assert not any("learned 16" in line for line in lines)
    assert continued[1]["losses"] == whole[1]["losses"]
    for name in (saved.PARAMETERS, saved.SETTINGS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_to_learn_is_said():
    with pytest.raises(ValueError, match="nothing to learn"):
        comparison.start_learning(Sparsity(), {})


def test_the_first_token_is_left_out_of_statistics(subject, windows):
    arch, weights, tokens = subject.architecture, subject.weights, windows[1].tokens
    other = tokens.copy()
    found = calibration.calibrate(arch, weights, tokens)
    assert found[0]["q"].tokens == tokens[:, 1:].size
    other[:, 0] = (other[:, 0] + 1) % 50
    again = calibration.calibrate(arch, weights, other)
    np.testing.assert_array_equal(found[0]["q"].squares, again[0]["q"].squares)
    whole = calibration.calibrate(arch, weights, tokens, skip_first=0)
    assert (whole[0]["q"].squares > found[0]["q"].squares).any()
    with pytest.raises(ValueError, match="too short a calibration text"):
        calibration.calibrate(arch, weights, tokens[:, :1])


def test_statistics_are_those_of_the_inputs(subject, windows):
    arch, weights, tokens = subject.architecture, subject.weights, windows[1].tokens
    found = calibration.calibrate(arch, weights, tokens, skip_first=0)[0]["q"]
    embedded = np.asarray(weights["embedding"], np.float64)[tokens.reshape(-1)]
    scale = np.asarray(weights["blocks"]["norms"]["attention_norm"][0])
    x = embedded / np.sqrt((embedded**2).mean(-1, keepdims=True) + arch.norm_epsilon) * scale
    np.testing.assert_allclose(found.rms, np.sqrt((x**2).mean(0)), rtol=1e-4)
    np.testing.assert_allclose(found.sample[0], np.median(x, axis=0), atol=1e-5)
    np.testing.assert_allclose(found.largest, np.abs(x).max(0), rtol=1e-4)
    middle = np.sort(x, axis=1)[:, (x.shape[1] - 1) // 2]
    assert found.medians / found.tokens == pytest.approx(middle.mean(), abs=1e-5)


def test_a_budget_takes_the_layers_of_the_least_error(subject, windows):
    arch, weights = subject.architecture, subject.weights
    sparsity = Sparsity(NM(2, 4))
    found = calibration.layer_parameters(arch, weights, sparsity, None)
    errors = calibration.errors(arch, weights, windows[1].tokens, sparsity, found)
    assert {name: one.shape for name, one in errors.items()} == dict.fromkeys(arch.linears, (arch.layers,))
    half = calibration.within_budget(arch, sparsity, errors, 0.5)
    share = 2 * grid.pruned_share(arch, half)
    assert 0.25 < share <= 0.5
    dense = {name for name, _ in half.overrides}
    kept = [errors[n][i] for i in range(arch.layers) for n in arch.linears if f"{i}.{n}" not in dense]
    assert min(kept) == min(e.min() for e in errors.values())
    assert not calibration.within_budget(arch, sparsity, errors, 1.0).overrides
    with pytest.raises(ValueError, match=r"budget = 0: .* lies in \(0, 1\]"):
        calibration.within_budget(arch, sparsity, errors, 0)


def test_shared_masks_have_one_channel_weight(subject):
    arch, weights = subject.architecture, subject.weights
    own, shared = (
        calibration.layer_parameters(arch, weights, Sparsity(NM(2, 4), "wina", shared_mask=on), None)
        for on in (False, True)
    )
    assert (np.asarray(own["q"].channel_weight) != np.asarray(own["k"].channel_weight)).any()
    np.testing.assert_array_equal(shared["q"].channel_weight, shared["v"].channel_weight)


def test_bytes_are_arithmetic(subject):
    arch = subject.architecture
    inputs = arch.layers * sum(i for i, _ in arch.linears.values())
    dense, half = grid.modelled_bytes(arch, None), grid.modelled_bytes(arch, Sparsity(NM(8, 16)))
    assert dense == {"activation_bytes": 2 * inputs, "decode_weight_bytes": 2 * arch.linear_weights}
    assert half["activation_bytes"] == inputs * (1 + 14 / 16 / 8)
    assert half["decode_weight_bytes"] == arch.linear_weights
    assert grid.pruned_share(arch, Sparsity(Unstructured(0.7))) == pytest.approx(0.7)


@pytest.mark.parametrize("stage", ["both", "prefill", "decode"])
def test_text_is_what_one_pass_after_another_gives(subject, windows, stage):
    model = usage.Model(subject, Sparsity(NM(1, 4), "clact_causal", "token", stage=stage))
    prompt = windows[0].tokens[0][:5].tolist()
    found = usage.generate(model, prompt, new_tokens=3, temperature=0.0)
    arch, weights, sparsity = subject.architecture, subject.weights, model.sparsity
    if stage == "both":
        ids = list(prompt)
        for _ in range(3):
            states, _ = hidden(arch, weights, jnp.asarray([ids]), sparsity=sparsity)
            best = int(logits(arch, weights, states)[0, -1, : subject.tokenizer.vocab_size].argmax())
            if best == subject.tokenizer.eos_id:
                break
            ids.append(best)
        assert found == ids[5:]
    used = usage.language_model(arch, sparsity, weights["embedding"].dtype)
    buffer = jnp.asarray([*prompt, 3, 3, 3])
    first, cache = used.start((weights, {}), buffer, jnp.int32(4))
    expected, _ = hidden(arch, weights, jnp.asarray([prompt]), sparsity=None if stage == "decode" else sparsity)
    np.testing.assert_allclose(first, logits(arch, weights, expected)[0, -1], atol=1e-4)
    second, _ = used.extend((weights, {}), cache, jnp.int32(7), jnp.int32(5))
    assert np.isfinite(second).all()


def test_tasks_are_scored_and_text_is_written_for_those_that_ask(subject):
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra eval)")
    dense, pruned = usage.Model(subject), usage.Model(subject, Sparsity(NM(1, 4)))
    texts = [usage.run_tasks(one, ["piqa"], data_dir=ITEMS, limit=6) for one in (dense, pruned)]
    assert all("piqa" in json.loads(text)["results"] for text, _ in texts)
    calls = []

    def generate(prompt, *, new_tokens, temperature, top_p, ended):
        calls.append((list(prompt), new_tokens, temperature, top_p))
        drawn = subject.tokenizer.encode("the cat\n\nsees")
        assert ended(drawn)
        assert not ended(subject.tokenizer.encode("the"))
        return drawn

    settings = {"until": ["\n\n", "dog"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.7}
    assert harness._write(generate, subject.tokenizer, "a dog", settings) == "the cat"
    assert (
        harness._write(generate, subject.tokenizer, "", {"until": "cat", "do_sample": True, "temperature": 0.7})
        == "the "
    )
    assert calls[0] == (subject.tokenizer.encode("a dog"), 9, 0.0, 1.0)
    assert calls[1] == ([subject.tokenizer.eos_id], harness.MOST_NEW_TOKENS, 0.7, 1.0)


def test_texts_are_cut_as_asked(subject, texts):
    whole = cut_windows(texts[0], subject.tokenizer, length=16)
    ids = subject.tokenizer.encode(texts[0][0].read_text())
    np.testing.assert_array_equal(whole.tokens.ravel(), ids[: whole.tokens.size])
    skipped = cut_windows(texts[0], subject.tokenizer, length=16, skip=5, each=2, begin=0)
    np.testing.assert_array_equal(skipped.tokens[:, 1:], [ids[6:21], ids[22:37]])
    assert (skipped.tokens[:, 0] == 0).all()
    assert len({whole.sha256, skipped.sha256}) == 2
    assert len(cut_windows(texts[0], subject.tokenizer, length=16, count=3).tokens) == 3
    with pytest.raises(ValueError, match=r"too short for a window of 100000 tokens"):
        cut_windows(texts[0], subject.tokenizer, length=100_000)
    with pytest.raises(ValueError, match="no file"):
        find_texts(["nothing*.txt"])


def test_held_out_text_is_not_calibrated_on(subject, texts, tmp_path):
    same = Texts([str(texts[0][0])], [str(texts[0][0])], 16, 4, 0, None)
    with pytest.raises(ValueError, match="both in --text and --calibration"):
        run(subject, [], same, tmp_path, grid.Options(), calibration_windows=4, tasks=[], data_dir=None, limit=None)


def test_a_model_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--tokenizer"):
        load_subject(str(write(tmp_path, CONFIGS["llama"])))


@pytest.mark.parametrize(
    ("family", "sparsity"),
    [
        ("llama", Sparsity(NM(2, 4), "wina", "channel", "variance", dense_prefix=2)),
        ("mistral", Sparsity(NM(8, 16), "clact", "token", "energy")),
        ("qwen2", Sparsity(Unstructured(0.6), "rms", "tensor", low_rank=3, overrides=MIXED)),
        ("qwen3", Sparsity(NM(4, 8), "clact_causal", "token_mean", "variance", layers=("k", "v", "gate", "down"))),
        ("gemma3", Sparsity(NM(2, 4), "pcs", "channel_mean", "variance", learn_bias=True, learn_scale=True)),
        ("arcee", Sparsity(NM(2, 4), "amber")),
    ],
)
def test_transformers_with_the_hooks_computes_the_same_logits(tmp_path, family, sparsity):
    torch = pytest.importorskip("torch", reason="needs torch (extra export)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra export)")
    from train.sparsity.torch_hooks import apply

    model = pretrained.load(write(tmp_path, CONFIGS[family]))
    arch, weights = model.architecture, model.weights
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, arch.vocab_size, (4, 24)).astype(np.int32)
    found = calibration.layer_parameters(arch, weights, sparsity, calibration.calibrate(arch, weights, tokens))
    for name, p in found.items():  # what is learned starts at 0
        zeros = {field: v for field, v in p._asdict().items() if field in ("bias", "scale") and v is not None}
        drawn = {field: jnp.asarray(0.1 * rng.normal(size=v.shape), jnp.float32) for field, v in zeros.items()}
        found[name] = p._replace(**drawn)
    saved.write(tmp_path / "out", sparsity, found, model={}, calibration={}, seed=0)
    states, _ = hidden(arch, weights, jnp.asarray(tokens[:1]), sparsity=sparsity, parameters=found)
    ours = np.asarray(logits(arch, weights, states))[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").float().eval()
    pruned = sum(sparsity.of(i, name) is not None for i in range(arch.layers) for name in arch.linears)
    assert apply(theirs, tmp_path / "out") == pruned
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens[:1]).long(), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(ours / expected.std(), expected / expected.std(), atol=1e-3)


def call(program, *flags):
    command = [sys.executable, "-m", f"train.{program}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def test_a_report_has_the_table_the_tasks_and_a_picture(subject, texts, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra eval)")
    cut = Texts([str(texts[0][0])], [str(texts[1][0])], 16, 4, 0, None)
    tasks = {"tasks": ["piqa"], "data_dir": ITEMS, "limit": 3}
    rows = run(
        subject, cells_of("mitigation=channel+var"), cut, tmp_path, grid.Options(), calibration_windows=4, **tasks
    )
    page = (tmp_path / "report.md").read_text()
    assert "| 2:4 act channel+var |" in page
    assert "Bytes, modelled" in page
    assert (tmp_path / report.LAYERS_PICTURE).exists()
    values = [row["tasks"]["piqa"] for row in rows]
    assert report.drop(rows[1], rows[0]) == pytest.approx((values[0] - values[1]) / values[0])
    assert json.loads((tmp_path / "report.json").read_text())["rows"][1]["tasks"]["piqa"] == values[1]
    again = run(
        subject, cells_of("mitigation=channel+var"), cut, tmp_path, grid.Options(), calibration_windows=4, **tasks
    )
    assert again == rows
    assert "| 2:4 act channel+var |" in capsys.readouterr().out


def test_the_commands(texts, tmp_path, capsys):
    source, out = f"{three_phases()[1]}@12", tmp_path / "out"
    flags = [f"--model={source}", f"--text={texts[0][0]}", f"--calibration={texts[1][0]}", "--window=16"]
    done = call("sparsify", *flags, f"--output={out}", "--pattern=2:4", "--windows=4")
    assert done.returncode == 0, done.stderr
    assert "| 2:4 act channel+var |" in done.stdout
    usage.report_text(usage.load_model(source, str(out)), texts[0][0])
    assert "(step 12), 2:4 act channel+var: " in capsys.readouterr().out
    shutil.move(out / saved.SETTINGS, out / "away.json")
    refused = call("generate", f"--model={source}", f"--sparsity={out}", "--new_tokens=2")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
