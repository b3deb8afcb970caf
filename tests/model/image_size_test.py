"""The syntax of an image size, which is the same everywhere."""

import pytest

from convit_jax.model import image_size


@pytest.mark.parametrize(
    ("text", "size"), [("224", 224), (384, 384), ("224x320", (224, 320)), (" 96x96 ", 96)]
)
def test_a_size_is_read_and_written(text, size):
    assert image_size.parse(text) == size
    assert image_size.parse(image_size.text(size)) == size


@pytest.mark.parametrize(
    "text", ["", "x", "224x", "224,320", "224x224x3", "-8", "8.0", "0", "8x0", True, None, (8, 8)]
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"--size: expected a number of pixels such as 224, or HE"):
        image_size.parse(text, "--size")


def test_pairs():
    assert image_size.pair(8) == image_size.pair((8, 8)) == (8, 8)
    assert image_size.single([8, 8]) == 8
    assert image_size.single([8, 9]) == (8, 9)
