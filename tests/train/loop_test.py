"""The training step on one and on eight devices, the loop, and errors before it starts.

Most of the time is compilation, so tests share configurations, and with them compiled programs:
epochs and learning rates are constants of the program.
"""

import functools
import itertools
import json
import logging
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from convit_jax import saved_config
from convit_jax.data.batches.chunks import Share, TrainChunks
from convit_jax.data.batches.workers import iterate
from convit_jax.data.open import open_source
from convit_jax.model import locality
from convit_jax.model.normalise import normalise
from convit_jax.parallel import sharding
from convit_jax.train import loop, optim, setup
from convit_jax.train.step import Program
from convit_jax.train.windows import Windows
from convit_jax.weights.load import read_weights
from convit_jax.workdir.checkpoints import Checkpoints, newest_step
from convit_jax.workdir.folder import Workdir
from convit_jax.workdir.lock import Lock


def small_config(**train_options):
    """A model that compiles in half a second: 4 patches, 2 blocks, width 8."""
    config = digits.get_config()
    config.model.update(patch_size=4, embed_dim=8, num_heads=4, depth=2, local_up_to_layer=1)
    config.train.update(**{"epochs": 1.0, "batch_size": 64, "log_every": 5, **train_options})
    return config


def wide_config(fsdp, **train_options):
    """A model whose arrays are large enough to be split, and an eps above rounding noise."""
    config = small_config(**train_options)
    config.mesh.fsdp = fsdp
    config.model.embed_dim = 64
    config.optim.update(ema_decay=0.9, eps=1e-4)
    return config


def interrupt_evaluations(patch, stop=lambda: True):
    """Ends evaluations as a signal does, while stop() is true."""
    evaluate = loop.evaluation.evaluate
    patch.setattr(loop.evaluation, "evaluate", lambda *args: evaluate(*args[:-1], interrupted=stop))


def make_step(config, num_devices):
    mesh = sharding.make_mesh(config.mesh.fsdp, devices=jax.devices()[:num_devices])
    model = setup.make_model(config, num_classes=10)
    schedule = optim.learning_rate(config.optim, 64, steps_per_epoch=1, total_steps=100)
    optimizer = optim.make_optimizer(config.optim, schedule)
    program = Program(config, model, optimizer, schedule, mesh)
    return program.jitted_step(), program.init_state(), mesh


def digits_batches(number, batch_size=64):
    """Batches of the digits as the training step takes them."""
    source = open_source("digits", "train")
    chunks = TrainChunks(source, lambda image, rng: image, Share(batch_size), seed=0)
    return list(itertools.islice(iterate(chunks), number))


def test_eight_devices_equal_one():
    """With the whole recipe on. Tolerances allow for another order of sums over the batch."""
    config = small_config()
    config.model.update(dropout=0.1, drop_path=0.2)
    config.mixup.update(mixup=0.8, cutmix=1.0, erase_prob=0.25, group_size=24)
    config.optim.ema_decay = 0.9
    # Adam divides a gradient by its size, so gradients that are rounding noise give updates that
    # are noise. With an eps above the noise, only real gradients are compared.
    config.optim.eps = 1e-4
    results = []
    for devices in (1, 8):
        step, state, mesh = make_step(config, devices)
        for batch in digits_batches(3):
            batch = sharding.put_batch(batch, mesh)
            assert len(batch["image"].sharding.device_set) == devices
            before = state
            state, metrics = step(state, batch)
            assert all(x.is_deleted() for x in jax.tree.leaves(before))  # its memory was reused
        assert int(state.step) == 3
        assert len(state.params["cls_token"].sharding.device_set) == devices
        results.append(jax.device_get(((state.params, state.ema), metrics)))
    (one, one_metrics), (eight, eight_metrics) = results
    np.testing.assert_allclose(one_metrics["loss"], eight_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(one_metrics["grad_norm"], eight_metrics["grad_norm"], rtol=1e-5)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_randomness_is_that_of_seed_and_step():
    config = small_config()
    config.model.dropout = 0.3
    step, state, mesh = make_step(config, 1)
    batch = sharding.put_batch(digits_batches(1)[0], mesh)

    def loss_at(number):
        copy = jax.tree.map(jnp.copy, state)  # the step donates its state
        return float(step(copy.replace(step=jnp.asarray(number, jnp.int32)), batch)[1]["loss"])

    assert loss_at(3) == loss_at(3)
    assert loss_at(3) != loss_at(4)


def test_a_run_learns_and_leaves_its_metrics(tmp_path, caplog):
    caplog.set_level(logging.INFO, "convit_jax")
    config = small_config(epochs=6.0, eval_every=2.0)
    config.model.embed_dim = 16
    config.optim.lr = 0.08
    workdir = tmp_path / "new" / "folder"
    run = setup.prepare(config, Workdir(workdir))
    result = loop.train(run)
    assert "starting from random weights" in caplog.text
    assert result["images"] == 360
    assert result["top1"] > 0.3  # chance is 0.1; the 134 steps reach 0.47

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert run.total_steps == int(6 * 1437 / 64) == training[-1]["step"] == 134
    assert [line["step"] for line in evaluations] == [45, 90, 134]
    assert evaluations[-1]["top1"] == result["top1"]
    assert training[-1]["loss"] < training[0]["loss"]
    assert training[0].keys() == {
        "kind", "step", "time", "loss", "grad_norm", "images_per_second", "learning_rate",
        "data_seconds", "data_wait", "skipped_images", "gates",
    }  # fmt: skip
    assert training[0]["gates"] == pytest.approx([1 / (1 + np.exp(-1))], abs=0.01)
    assert training[0]["learning_rate"] < training[3]["learning_rate"]
    assert json.loads((workdir / "config.json").read_text())["model"]["embed_dim"] == 16
    check_probe(evaluations, workdir)

    # The exported weights, and the data stored with them, are those of the checkpoint.
    left = read_weights(workdir / "weights.safetensors")
    there = read_weights(workdir)
    assert left.class_names == there.class_names == tuple("0123456789")
    assert left.mean == there.mean == config.data.mean
    assert (left.std, left.crop_pct) == (there.std, there.crop_pct) == (config.data.std, 1.0)
    assert left.model == there.model
    if result["top1"] == max(line["top1"] for line in evaluations):
        jax.tree.map(np.testing.assert_array_equal, left.params, there.params)

    # Another run can start from them; once it has a checkpoint, it continues from that instead.
    config = small_config(epochs=0.05)
    config.model.embed_dim = 16
    config.optim.update(lr=1e-9, warmup_lr=1e-9, min_lr=1e-9, weight_decay=0.0, ema_decay=0.5)
    config.train.probe_images = 0
    config.init_from = str(workdir / "weights.safetensors")
    for start in (f"starting from {config.init_from}", f"continuing from step 1 of {tmp_path}"):
        caplog.clear()
        again = loop.train(setup.prepare(config, Workdir(tmp_path / "again")))
        assert again["top1"] == again["ema_top1"] == result["top1"]
        assert start in caplog.text
    last = (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last).keys() & {"top1", "nonlocality", "head_gates"} == {"top1"}

    # A finished run returns its result again and does no work.
    before = (workdir / "metrics.jsonl").read_text()
    assert loop.train(run) == result
    assert (workdir / "metrics.jsonl").read_text() == before
    starts = (workdir / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 134]


def check_probe(evaluations, workdir):
    """Asserts that gates and non-locality of the last evaluation are those of the final weights.

    They are measured on 28 of the 360 test images, spread evenly: 1% of the images of the 45 steps
    between two evaluations.
    """
    loaded = read_weights(workdir, ema=False, checkpoint="newest")  # those that are trained
    test = open_source("digits", "test")
    places = np.linspace(0, 359, 28).astype(int)
    images = np.stack([test[int(i)]["image"] for i in places])
    images = normalise(images, loaded.mean, loaded.std)
    measure = jax.jit(functools.partial(locality.image_nonlocality, loaded.model))
    expected = measure({"params": loaded.params}, images)["blended"].mean(axis=(1, 2))
    np.testing.assert_allclose(evaluations[-1]["nonlocality"], expected, rtol=1e-5)
    gates = locality.gates(loaded.params)
    np.testing.assert_allclose(evaluations[-1]["head_gates"], gates, rtol=1e-6)
    assert evaluations[0]["nonlocality"] != evaluations[-1]["nonlocality"]


def test_an_evaluation_that_was_interrupted_is_finished_by_the_next_start(tmp_path, monkeypatch):
    """The evaluation is then stored with its checkpoint, wherever the next start was killed."""
    config = small_config(epochs=2.0, eval_every=1.0)
    config.optim.ema_decay = 0.5
    run = setup.prepare(config, Workdir(tmp_path))
    assert run.total_steps == 44
    folder, stop = tmp_path / "checkpoints", [True]

    def killed(self, step, metrics):
        raise KeyboardInterrupt

    def top1_of(step):
        file = folder / str(step) / "metrics" / "metrics"
        return json.loads(file.read_text())["top1"] if file.exists() else None

    def evaluations():
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["top1"] for line in lines if line["kind"] == "eval"}, len(lines)

    interrupt_evaluations(monkeypatch, lambda: stop[0])
    assert loop.train(run) is None
    assert top1_of(22) is None
    assert evaluations()[0] == {}
    stop[0] = False
    with monkeypatch.context() as patch:  # the line is written, the checkpoint not updated
        patch.setattr(Checkpoints, "_add_metrics", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run)
    assert top1_of(22) is None
    assert evaluations()[0].keys() == {22}
    result = loop.train(run)
    found, lines = evaluations()
    assert found == {22: top1_of(22), 44: top1_of(44)}
    assert found[44] == result["top1"]
    assert lines == 44 // 5 + 1 + 2  # each once


def test_each_step_is_compiled_once(tmp_path, caplog):
    config = small_config(epochs=2.0, eval_every=1.0)
    config.optim.ema_decay = 0.5
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        loop.train(setup.prepare(config, Workdir(tmp_path)))
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    for name in ("train_step", "eval_step"):
        assert sum(name in message for message in compiled) == 1


def test_a_split_state_trains_the_same():
    """fsdp=8 and 4 are compared with 1, on eight devices; sums are in another order."""
    results = {}
    for fsdp in (1, 4, 8):
        step, state, mesh = make_step(wide_config(fsdp), 8)
        kernel = state.params["gpsa_blocks"]["mlp"]["fc1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size / fsdp
        losses = []
        for batch in digits_batches(5):
            state, metrics = step(state, sharding.put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        kernel = state.opt_state[0].mu["gpsa_blocks"]["mlp"]["fc1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size / fsdp
        results[fsdp] = losses, jax.device_get(state.ema)
    for fsdp in (4, 8):
        np.testing.assert_allclose(results[fsdp][0], results[1][0], rtol=1e-6)
        for left, right in zip(*(jax.tree.leaves(results[n][1]) for n in (fsdp, 1)), strict=True):
            np.testing.assert_allclose(left, right, atol=1e-6)


def test_bfloat16_remat_and_accumulation_work_together():
    """All three, with a split state, are compared with plain float32."""
    losses = {}
    for options in ({}, {"dtype": "bfloat16", "remat": "block", "accum_steps": 4}):
        config = wide_config(8 if options else 1, **options)
        assert config.model.drop_path == 0  # parts of a batch would draw it anew
        step, state, mesh = make_step(config, 8)
        if options:
            batch = sharding.put_batch(digits_batches(1)[0], mesh)
            program = str(jax.make_jaxpr(step)(state, batch))
            assert "bf16" in program
            assert "remat" in program
        values = []
        for batch in digits_batches(4):
            state, metrics = step(state, sharding.put_batch(batch, mesh))
            values.append([float(metrics[name]) for name in ("loss", "grad_norm")])
        assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))
        losses[bool(options)] = values
    # bfloat16 has 8 bits of mantissa, 0.4%.
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.02)


def test_compiled_programs_are_kept_where_the_configuration_says(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    config = small_config()
    cases = {
        "workdir": str(tmp_path / "run" / "compilation_cache"),
        str(tmp_path / "shared"): str(tmp_path / "shared"),
        "": None,
    }
    try:
        for value, folder in cases.items():
            config.compilation_cache = value
            jax.config.update("jax_compilation_cache_dir", None)
            setup.use_compilation_cache(config, Workdir(tmp_path / "run"))
            assert jax.config.jax_compilation_cache_dir == folder
        jax.config.update("jax_compilation_cache_dir", "elsewhere")  # $JAX_COMPILATION_CACHE_DIR
        config.compilation_cache = "workdir"
        setup.use_compilation_cache(config, Workdir(tmp_path / "run"))
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_second_start_in_a_workdir_ends_and_harms_nothing(tmp_path):
    workdir = Workdir(tmp_path)
    run = setup.prepare(small_config(), workdir)
    with Lock(workdir):
        before = workdir.lock.read_bytes()
        with pytest.raises(OSError, match=r"process \d+ on host .* trains in this folder"):
            loop.train(run)
        assert workdir.lock.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


@pytest.fixture
def overflow(monkeypatch):
    """A learning rate that is infinite in step 6."""
    schedule = lambda step: jnp.where(step == 5, jnp.inf, 1e-3)  # noqa: E731
    monkeypatch.setattr(optim, "learning_rate", lambda *_: schedule)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, overflow):
    with pytest.raises(FloatingPointError, match=r"the loss of step 7 is (nan|inf); those before"):
        loop.train(setup.prepare(small_config(), Workdir(tmp_path)))


def test_weights_that_are_not_finite_are_not_saved(tmp_path, overflow):
    """The loss of the step itself is finite."""
    config = small_config(log_every=100)
    config.checkpoint.every = 1
    with pytest.raises(FloatingPointError, match="the weights after step 6 are not finite"):
        loop.train(setup.prepare(config, Workdir(tmp_path)))
    run = setup.prepare(config, Workdir(tmp_path))
    newest = newest_step(tmp_path / "checkpoints")
    assert newest == 5
    with Checkpoints(tmp_path / "checkpoints", every=1, also=(), keep=2) as saved:
        step, state, *_ = saved.restore(run.program.abstract_state)
    assert step == newest == int(state.step)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.batch_size": 60}, "multiple of the 8 devices, such as 56 or 64, got 60"),
        ({"train.batch_size": 4}, "multiple of the 8 devices, such as 8, got 4"),
        (
            {"train.batch_size": 64, "train.accum_steps": 16},
            "the 8 devices times train.accum_steps=16, such as 128, got 64",
        ),
        ({"train.batch_size": 1600}, "at most the 1,437 images of digits, got 1600"),
        ({"mesh.fsdp": 3}, "mesh.fsdp: expected a divisor of the 8 devices, got 3"),
        ({"checkpoint.every": 0}, "checkpoint.every: expected more than 0, got 0"),
        ({"train.epochs": 0.0}, "train.epochs: expected more than 0, got 0.0"),
        ({"train.dtype": "half"}, "train.dtype: expected one of .*'bfloat16'.*, got 'half'"),
        ({"data.source": "mnist"}, "data.source: .*mnist"),
        ({"mixup.mixup": -1.0}, "mixup.mixup: expected 0 .*, got -1.0"),
        ({"augment.crop": "centre"}, "crop: expected .*, got 'centre'"),
        ({"optim.ema_decay": 1.0}, "optim.ema_decay: expected less than 1, got 1.0"),
        ({"train.accum_steps": 0}, "train.accum_steps: expected more than 0, got 0"),
        ({"data.mean": (0.1, 0.2)}, r"data.mean: expected 1 values, got \(0.1, 0.2\)"),
        ({"model.num_classes": 7}, "model.num_classes: expected 10 as in digits, got 7"),
        ({"model.image_size": 16}, r"expected 8x8 .* as in digits, got 16x16"),
        ({"model.global_pool": "none"}, "expected model.num_classes > 0 and model.global_pool"),
        ({"model.num_heads": 3}, "num_heads: expected a divisor of embed_dim=8, got 3"),
        ({"model.name": "vit"}, r"model.name: expected one of \('convit_tiny', .* got 'vit'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, overrides, message):
    config = small_config()
    config.update_from_flattened_dict(overrides)
    with pytest.raises(ValueError, match=message):
        setup.prepare(config, Workdir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_older_configuration_continues(tmp_path, caplog, monkeypatch):
    """Missing keys take their defaults; rectangles were lists, and there was no version."""
    caplog.set_level(logging.INFO, "convit_jax")
    config = small_config(epochs=0.2, eval_every=0.1)
    config.mixup.update(mixup=0.5)
    workdir = Workdir(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_evaluations(patch)
        assert loop.train(setup.prepare(config, workdir)) is None
    saved = json.loads(workdir.config.read_text())
    assert saved.pop("format_version") == saved_config.FORMAT_VERSION
    del saved["compilation_cache"], saved["train"]["accum_steps"], saved["init_ema"]
    saved["model"]["image_size"] = [8, 8]
    workdir.config.write_text(json.dumps(saved))

    result = loop.train(setup.prepare(config, workdir))
    assert result["images"] == 360
    assert "continuing from step 2 of" in caplog.text
    assert "last start: mixup.group_size: the run was saved with groups of" in caplog.text
    assert "last start: augment.crop=pad: the random numbers of crops" in caplog.text
    assert json.loads(workdir.config.read_text())["format_version"] == saved_config.FORMAT_VERSION
    read_weights(tmp_path)
    config.optim.b1 = 0.5
    with pytest.raises(ValueError, match=r"(?s)another config.* optim.b1: saved 0.9, now 0.5"):
        setup.prepare(config, workdir)


def test_what_a_checkpoint_carries_is_not_changed_by_later_steps():
    """A checkpoint is written while training continues."""
    windows = Windows(metrics=mock.Mock(), step=3, values=[])
    windows.add({"loss": jnp.float32(0.5)})
    carried = windows.carried()
    windows.add({"loss": jnp.float32(0.25)})
    assert carried == [{"loss": 0.5}]
    assert windows.carried() == [{"loss": 0.5}, {"loss": 0.25}]


def test_a_run_that_has_lost_its_folder_writes_no_evaluation(monkeypatch):
    monkeypatch.setattr(loop, "iterate", lambda *_, **__: mock.Mock())
    monkeypatch.setattr(loop.evaluation, "evaluate", lambda *_: {"top1": 0.5})
    metrics, lock = mock.MagicMock(), mock.Mock()
    lock.check.side_effect = OSError("another process has taken this folder over")
    run = mock.MagicMock()
    run.test_chunks.share.chunks = 1
    with pytest.raises(OSError, match="taken this folder over"):
        loop._evaluate(run, None, mock.Mock(), mock.MagicMock(ema=None), metrics, mock.Mock(), lock)
    metrics.evaluation.assert_not_called()
