"""Distillation: DeiT's losses, teachers of several kinds and formats, and what is refused."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import small_models

from convit_jax import ConViT, from_torch, recipe, to_torch
from convit_jax.cli import options
from convit_jax.parallel import sharding
from convit_jax.train import distillation, same_run, setup, teacher
from convit_jax.train.step import Program, TrainState
from convit_jax.weights import safetensors, stablehlo
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.folder import Workdir

NAMES = tuple("abcde")
# Wide enough that some of its parameters are split over devices.
WIDE = ConViT(**{**small_models.SMALL, "embed_dim": 64}, depth=2, local_up_to_layer=1)
# The run's own normalisation differs from the teachers'.
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)
THEIR_MEAN, THEIR_STD = (0.5, 0.45, 0.4), (0.5, 0.4, 0.3)


def make_config(source, **keys):
    config = recipe.get_config()
    config.data.update(mean=MEAN, std=STD)
    config.mixup.update(mixup=0.0, cutmix=0.0, erase_prob=0.0)
    config.train.batch_size = 32
    config.distill.update({"teacher": str(source), **keys})
    return config


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(256, size=(32, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(5, size=32, dtype=np.int32),
        "skipped": np.zeros(32, np.int32),
    }


def save_model(path, params, model=small_models.MODEL, names=NAMES):
    safetensors.save_weights(
        path, Loaded(model, params, class_names=names, mean=THEIR_MEAN, std=THEIR_STD)
    )
    return path


def fitted(config, mesh, student=small_models.MODEL, names=NAMES):
    found = teacher.read(config)
    return distillation.fit(found, config, student, names, mesh)


def step_of(config, model, mesh, params):
    """Loss and parameters after a step of stochastic gradient descent at rate 1."""
    program = Program(
        config, model, optax.sgd(1.0), lambda _: 1.0, mesh,
        distillation=fitted(config, mesh, model),
    )  # fmt: skip
    params = jax.tree.map(jnp.array, params)  # a copy: the step takes it over
    state = TrainState(jnp.zeros((), jnp.int32), params, program.optimizer.init(params))
    state = jax.device_put(state, program.state_shardings)
    batch = sharding.put_batch(make_batch(), mesh)
    state, metrics = program.jitted_step()(state, batch, program.distillation.on_devices())
    return float(metrics["loss"]), jax.device_get(state.params)


def torch_conv(torch):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5),
    )  # fmt: skip
    with torch.no_grad():
        net[4].weight.mul_(9)  # answers that are not all alike
    return net.eval()


def conv(params, images):
    """`torch_conv` in JAX."""
    kernel, bias, out_kernel, out_bias = params
    x = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(x + bias).mean((1, 2)) @ out_kernel + out_bias


def conv_params(net):
    kernel, bias, out_kernel, out_bias = (p.detach().numpy() for p in net.parameters())
    return [kernel.transpose(2, 3, 1, 0), bias, out_kernel.T, out_bias]


def save_conv(path, params, batch=None):
    stablehlo.save_network(
        path, conv, params, (16, 16, 3),
        class_names=NAMES[::-1], mean=THEIR_MEAN, std=THEIR_STD, batch=batch,
    )  # fmt: skip
    return path


def deits_loss(torch, of_labels, logits, theirs, kind, alpha, tau):
    """The end of the forward pass of DistillationLoss in DeiT's losses.py."""
    functional = torch.nn.functional
    if kind == "soft":
        ours, theirs = (functional.log_softmax(x / tau, dim=1) for x in (logits, theirs))
        of_teacher = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
        of_teacher = of_teacher * (tau * tau) / logits.numel()
    else:
        of_teacher = functional.cross_entropy(logits, theirs.argmax(dim=1))
    return of_labels * (1 - alpha) + of_teacher * alpha


def test_answers_and_losses_equal_pytorchs(tmp_path):
    """On eight devices, with a program of two images a call and the classes in another order."""
    torch = pytest.importorskip("torch")
    net, pixels, mesh = (
        torch_conv(torch),
        make_batch()["image"] / np.float32(255),
        sharding.make_mesh(),
    )
    theirs = reference.timm_images((pixels - np.float32(THEIR_MEAN)) / np.float32(THEIR_STD), torch)
    answers = net(theirs).detach().flip(1)
    assert len(set(answers.argmax(1).tolist())) > 1
    logits = np.random.default_rng(0).normal(size=(32, 5)).astype("f")
    path = save_conv(tmp_path / "teacher.stablehlo", conv_params(net), batch=2)
    for kind, tau in (("hard", 1.0), ("soft", 3.0)):
        fit = fitted(make_config(path, kind=kind, tau=tau, alpha=0.7), mesh)
        batch = sharding.put_batch({"image": (pixels - np.float32(MEAN)) / np.float32(STD)}, mesh)
        found = jax.jit(fit.logits)(fit.on_devices(), batch["image"])
        assert found.sharding.shard_shape(found.shape) == (4, 5)
        np.testing.assert_allclose(found, answers, atol=1e-5)
        loss = fit.loss(2.0, logits, np.asarray(found))
        expected = deits_loss(torch, 2.0, torch.from_numpy(logits), answers, kind, 0.7, tau)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_distilled_step_equals_pytorchs(tmp_path):
    """timm's DeiT learns from a wider ConViT, and from a convolutional network as a program."""
    _, torch = reference.import_timm()
    from timm.loss import LabelSmoothingCrossEntropy

    student, ours, variables = reference.timm_pair("deit", (16, 16))
    first = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    wide, net = reference.timm_like(WIDE).eval(), torch_conv(torch)
    reference.randomise(wide, torch, seed=1)
    model = save_model(tmp_path / "teacher.safetensors", from_torch(wide.state_dict()), WIDE)
    program = save_conv(tmp_path / "teacher.stablehlo", conv_params(net), batch=2)
    batch, mesh = make_batch(), sharding.make_mesh(2)
    labels, pixels = torch.from_numpy(batch["label"]).long(), batch["image"] / np.float32(255)
    images, theirs = (
        reference.timm_images((pixels - np.float32(mean)) / np.float32(std), torch)
        for mean, std in ((MEAN, STD), (THEIR_MEAN, THEIR_STD))
    )
    with torch.no_grad():
        of_model, of_program = wide(theirs), net(theirs).flip(1)  # its classes are E to A
    assert len(set(of_program.argmax(1).tolist())) > 1
    for source, answers, kind, alpha, tau, accum_steps in (
        (model, of_model, "soft", 0.8, 3.0, 1),
        (program, of_program, "hard", 0.5, 1.0, 2),
    ):
        student.load_state_dict(first)
        student.zero_grad()
        logits = student(images)
        loss = LabelSmoothingCrossEntropy(0.1)(logits, labels)
        loss = deits_loss(torch, loss, logits, answers, kind, alpha, tau)
        loss.backward()
        config = make_config(source, kind=kind, alpha=alpha, tau=tau)
        config.train.accum_steps = accum_steps
        found, stepped = step_of(config, ours, mesh, variables["params"])
        np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
        stepped = to_torch(stepped)
        for name, tensor in student.named_parameters():
            np.testing.assert_allclose(
                stepped[name], (tensor - tensor.grad).detach().numpy(), atol=2e-5, err_msg=name
            )


def test_a_teacher_is_split_like_its_student_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "convit_jax")
    params = small_models.random_params(WIDE)
    path = save_model(tmp_path / "teacher.safetensors", params, WIDE)
    config = make_config(path)
    fit = fitted(config, sharding.make_mesh(2))
    for names, same in ((NAMES, True), (NAMES[::-1], False)):
        other = make_config(save_model(tmp_path / "other.safetensors", params, WIDE, names))
        teacher.read(other)
        assert (other.distill.sha256 == config.distill.sha256) == same
    kernel = fit.on_devices()["gpsa_blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.nbytes == kernel.nbytes // 2
    count = sum(x.size for x in jax.tree.leaves(params))
    for text in (
        f"teacher: {path}, {count:,} parameters, hard labels, distill.alpha=0.5",
        "GFLOPs an image, ",
        f"normalised by mean {THEIR_MEAN} and std {THEIR_STD}, the student's by {MEAN} and {STD}",
    ):
        assert text in caplog.text


def test_classes_are_matched_by_name_and_what_does_not_fit_is_refused(tmp_path):
    mesh, model = sharding.make_mesh(), small_models.MODEL
    path = save_model(tmp_path / "teacher.safetensors", small_models.random_params())
    fit = fitted(make_config(path), mesh, names=("d", "b"))
    assert fit.classes.logits == (3, 1)
    program = tmp_path / "teacher.stablehlo"
    loaded = Loaded(model, small_models.random_params(), class_names=NAMES)
    for keys, student, names, message in (
        ({}, model.clone(image_size=20), NAMES, "network for images of 20, as model.image_size, "
         r"got 16 in .*safetensors \(convit convert --image_size=20 adapts one"),
        ({}, model.clone(in_channels=1), NAMES, "network of 1 channels, .* got 3 in .*safetensors"),
        ({}, model, ("a", "z"), "1 of the 2 classes .* not among the 5 of the teacher .*: 'z'"),
        ({"sha256": "0"}, model, NAMES, "SHA-256 0 .distill.sha256., got .* in .*safetensors"),
        ({"tau": 2.0}, model, NAMES, "distill.tau=2: expected distill.kind=soft with it"),
        ({"teacher": "no"}, model, NAMES, "distill.teacher: weights: no such file or folder: no"),
        ({"teacher": "", "alpha": 0.1}, model, NAMES, "distill.alpha=0.1: expected distill.teach"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=message):
            fitted(make_config(path, **keys), mesh, student, names)
    stablehlo.save_exported(program, loaded, uint8=True)
    with pytest.raises(ValueError, match=r"takes uint8 pixels, .*convert without --uint8"):
        teacher.read(make_config(program))
    params = [np.zeros(shape, "f") for shape in ((3, 3, 3, 8), (8,), (8, 5), (5,))]
    save_conv(program, params, batch=3)
    with pytest.raises(ValueError, match="takes 3 images in a call, but a device has 4 at a time"):
        fitted(make_config(program), mesh)
    config = recipe.get_config()
    config.distill.alpha = 1.5
    with pytest.raises(ValueError, match=r"distill.alpha: expected at most 1, got 1.5"):
        recipe.check(config)


def test_the_teacher_of_a_run_may_move_but_not_change(tmp_path, caplog):
    caplog.set_level(logging.INFO, "convit_jax")
    config, workdir = options.configuration("digits", []), Workdir(tmp_path / "run")
    model = setup.make_model(config, 10)
    digits = tuple(map(str, range(10)))
    paths = [tmp_path / f"{name}.safetensors" for name in ("teacher", "moved", "other")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        params = small_models.random_params(model, seed)
        safetensors.save_weights(path, Loaded(model, params, "", digits, (0.305,), (0.376,)))
    config.distill.teacher = str(paths[0])
    run = setup.prepare(config, workdir)
    assert run.program.distillation.classes.is_identity
    same_run.record_start(workdir, run.config, run.data, 0)
    config.distill.teacher = str(paths[1])
    setup.prepare(config, workdir)
    assert f"distill.teacher: saved '{paths[0]}', now '{paths[1]}'" in caplog.text
    config.distill.teacher = str(paths[2])
    with pytest.raises(ValueError, match=r"another configuration: [^:]*:\n  distill.sha256: saved"):
        setup.prepare(config, workdir)
