"""Evaluation: every image counts once, for any batch size and any number of devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convit_jax.data.batches.chunks import EvalChunks, Share
from convit_jax.data.batches.workers import iterate
from convit_jax.data.corrupt import CorruptImageError
from convit_jax.data.open import open_source
from convit_jax.data.source import Subset
from convit_jax.parallel import sharding
from convit_jax.train import evaluation


class Brightness(nn.Module):
    """A model without parameters whose logits are a known function of the image."""

    def __call__(self, images):
        value = images.reshape(len(images), -1).sum(-1, keepdims=True)
        return jnp.sin(value * jnp.arange(1, 11))


def evaluate_digits(model, batch_size, devices, num_images=360):
    source = open_source("digits", "test")
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    step = evaluation.make_eval_step(model, (0.3,), (0.4,), mesh)
    chunks = EvalChunks(source, lambda image: image, Share(batch_size))
    return source, evaluation.evaluate(step, {"": {}}, iterate(chunks), mesh, num_images)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [40, 64, 360, 400])
def test_counts_every_image_once(devices, batch_size):
    source, result = evaluate_digits(Brightness(), batch_size, devices)
    images = (source.images / np.float32(255) - np.float32(0.3)) / np.float32(0.4)
    logits = np.asarray(Brightness().apply({}, jnp.asarray(images)), np.float64)
    order = np.argsort(-logits, axis=-1)
    hits = order == source.labels[:, None]
    own = np.take_along_axis(logits, source.labels[:, None], -1)[:, 0]
    loss = np.log(np.exp(logits).sum(-1)) - own
    assert result["images"] == 360
    assert result["top1"] == pytest.approx(hits[:, :1].any(-1).mean(), abs=1e-6)
    assert result["top5"] == pytest.approx(hits[:, :5].any(-1).mean(), abs=1e-6)
    assert result["loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert 0 < result["top1"] < result["top5"] < 1


def test_only_the_logits_of_the_datas_classes_count():
    """Class i of the data is the logit classes[i]; -1 and logits of no class are left out."""
    classes = (7, 2, -1, 0, 9, 4, 3)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 10)).astype(np.float32)
    labels = np.array([0, 1, 3, 4, 5, 6, 0, 1], np.int32)

    class Table(nn.Module):
        def __call__(self, images):
            return jnp.asarray(logits)

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    step = evaluation.make_eval_step(Table(), (0.3,), (0.4,), mesh, True, classes)
    images = np.zeros((8, 2, 2, 1), np.uint8)
    batch = {"image": images, "label": labels, "mask": np.ones(8, np.float32)}
    found = jax.device_get(step({}, batch))

    kept = np.array([0, 1, 3, 4, 5, 6])
    only = logits[:, [classes[i] for i in kept]]
    order = np.argsort(-only, axis=-1)
    shares = np.asarray(jax.nn.softmax(only))
    own = shares[np.arange(8), [kept.tolist().index(label) for label in labels]]
    assert found["predictions"].tolist() == kept[order[:, :5]].tolist()
    assert found["rank"].tolist() == ((shares >= own[:, None]).sum(-1)).tolist()
    assert found["top1"] == (found["rank"] == 1).sum() > 0
    assert found["loss"] == pytest.approx(-np.log(own).sum(), rel=1e-5)
    best = np.take_along_axis(shares, order[:, :5], -1)
    np.testing.assert_allclose(found["probabilities"], best, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_model_that_says_nothing_gets_nothing_right(value):
    class Constant(nn.Module):
        def __call__(self, images):
            return jnp.full((len(images), 10), value)

    _, result = evaluate_digits(Constant(), 100, devices=1)
    assert result["top1"] == result["top5"] == 0


def test_a_wrong_count_is_an_error():
    with pytest.raises(RuntimeError, match="evaluated 360 images: expected 361"):
        evaluate_digits(Brightness(), 40, devices=1, num_images=361)


@pytest.mark.parametrize("devices", [1, 8])
def test_corrupt_images_are_left_out_and_counted(devices, caplog):
    """The results are those of the other images; rows of corrupt images cannot be confused."""
    source, bad = open_source("digits", "test"), [0, 41, 42, 359]
    read = {source.images[i].tobytes(): i for i in range(360)}

    def transform(image):
        if read[image.tobytes()] in bad:
            raise CorruptImageError("not an image")
        return image

    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    step = evaluation.make_eval_step(Brightness(), (0.3,), (0.4,), mesh, predictions=True)

    def evaluate(chunks):
        batches = iterate(chunks)
        return evaluation.evaluate(step, {"": {}}, batches, mesh, len(chunks.source))

    result = evaluate(EvalChunks(source, transform, Share(80), skip_corrupt=True))
    assert "4 of 360 images are corrupt and left out: the results are over the other 356" in (
        caplog.text
    )
    good = Subset(source, np.setdiff1d(np.arange(360), bad), "the others")
    expected = evaluate(EvalChunks(good, lambda image: image, Share(80)))
    assert "corrupt_images" not in expected
    assert expected["evaluated"].all()
    assert (result["images"], result["corrupt_images"]) == (356, 4)
    for name in ("loss", "top1", "top5"):
        assert result[name] == pytest.approx(expected[name], rel=1e-6)
    assert np.flatnonzero(~result["evaluated"]).tolist() == bad
    for name in ("label", "predictions"):
        np.testing.assert_array_equal(result[name][result["evaluated"]], expected[name])
        assert np.all(result[name][bad] == -1)


def test_an_evaluation_of_corrupt_images_alone_is_an_error():
    parts = [{"images": np.float32(0), "corrupt": np.float32(n)} for n in (4, 2)]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batch = {"image": np.zeros((1, 2)), "label": np.zeros(1), "mask": np.zeros(1)}
    for number, kind, message in (
        (6, CorruptImageError, "all 6 images to evaluate are corrupt"),
        (7, RuntimeError, "evaluated 0 images and left out 6 corrupt ones: expected 7"),
    ):
        steps = iter(parts)
        with pytest.raises(kind, match=message):
            evaluation.evaluate(
                lambda *_, steps=steps: next(steps), {"": {}}, [batch, batch], mesh, number
            )
