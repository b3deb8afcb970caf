"""The digits, the order of the batches and what is done to an image."""

import itertools

import numpy as np
import pytest

from convit_jax import augment, data

DIGITS = data.open_source("digits", "train")


def batches(count, **options):
    options = {"batch_size": 32, "seed": 0, "pad_crop": 1, **options}
    return list(itertools.islice(data.train_batches(DIGITS, **options), count))


def assert_equal(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_digits_are_split_without_overlap():
    test = data.open_source("digits", "test")
    assert (len(DIGITS), len(test)) == (1437, 360)
    assert DIGITS.images.shape == (1437, 8, 8, 1)
    assert DIGITS.images.dtype == np.uint8
    assert (DIGITS.images.min(), DIGITS.images.max()) == (0, 255)
    assert np.bincount(test.labels).min() >= 34  # 360 over 10 classes, in their shares
    images = [image.tobytes() for source in (DIGITS, test) for image in source.images]
    assert len(set(images)) == len(images) == 1797
    example = test[3]
    np.testing.assert_array_equal(example["image"], test.images[3])


def test_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r"data\.source: expected 'digits', got 'mnist'"):
        data.open_source("mnist", "train")


def test_every_epoch_has_every_image_once_in_a_new_order():
    epochs = [batches(2 * 1437 // 3, batch_size=3, pad_crop=0)]
    images = [image.tobytes() for batch in epochs[0] for image in batch["image"]]
    everything = sorted(image.tobytes() for image in DIGITS.images)
    first, second = images[:1437], images[1437:]
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_order_and_augmentation_depend_on_the_seed_alone():
    assert_equal(batches(3), batches(3))
    assert (batches(1)[0]["label"] != batches(1, seed=1)[0]["label"]).any()


def test_a_run_started_late_sees_what_it_would_have_seen():
    assert_equal(batches(100)[97:], batches(3, start_step=97))  # beyond the second epoch


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(count):
    shares = [batches(3, process_index=i, process_count=count) for i in range(count)]
    assert shares[0][0]["label"].shape == (32 // count,)
    for step, batch in enumerate(batches(3)):
        # Draw k of the batch belongs to process k mod count.
        for key in ("image", "label"):
            joined = np.stack([share[step][key] for share in shares], axis=1)
            np.testing.assert_array_equal(joined.reshape(batch[key].shape), batch[key])


def test_eval_batches_pad_and_mask_the_last():
    seen = list(data.eval_batches(DIGITS, 500))
    assert [batch["mask"].sum() for batch in seen] == [500, 500, 437]
    assert {batch["image"].shape for batch in seen} == {(500, 8, 8, 1)}
    labels = np.concatenate([batch["label"][batch["mask"] == 1] for batch in seen])
    np.testing.assert_array_equal(labels, DIGITS.labels)


def test_pad_and_crop_shifts_by_up_to_the_padding():
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(augment.pad_and_crop(image, rng, 0), image)
    seen = set()
    for _ in range(400):
        out = augment.pad_and_crop(image, rng, 2)
        assert out.shape == image.shape
        assert out.dtype == np.uint8
        y, x = np.argwhere(out[..., 0] == image[4, 4, 0])[0] - 4
        shifted = np.zeros((12, 12, 1), np.uint8)
        shifted[2 + y : 10 + y, 2 + x : 10 + x] = image
        np.testing.assert_array_equal(out, shifted[2:10, 2:10])
        seen.add((int(y), int(x)))
    assert seen == set(itertools.product(range(-2, 3), repeat=2))
