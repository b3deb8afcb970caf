"""Contact sheets of images with their labels."""

import numpy as np
from PIL import ImageFont
import pytest

from convit_jax.data.pictures import _shortened, contact_sheet


@pytest.mark.parametrize(("channels", "side", "factor"), [(3, 224, 1), (1, 8, 14)])
def test_every_image_is_on_the_sheet_in_order(channels, side, factor):
    values = [20, 60, 100, 140, 180]
    images = np.stack([np.full((side, side, channels), value, np.uint8) for value in values])
    sheet = np.asarray(
        contact_sheet([("first", images, "abcde"), ("second", images[:1], "f")], columns=2)
    )
    assert sheet.shape[1] == 2 * (side * factor + 6) + 6
    counts = {value: int((sheet == value).all(-1).sum()) for value in values}
    area = (side * factor) ** 2
    for value, count in counts.items():  # some pixels of the text have the same grey
        assert 0 <= count - (2 * area if value == 20 else area) < area / 10
    places = [np.argwhere((sheet == value).all(-1))[0] for value in values[1:]]
    assert places[0][0] < places[1][0] == places[2][0] < places[3][0]
    assert places[1][1] < places[2][1]


def test_a_long_label_is_shortened_and_never_fails():
    font = ImageFont.load_default()
    assert _shortened("cat", 100, font) == "cat"
    assert _shortened("a very long name of a class", 60, font).endswith("..")
    assert font.getlength(_shortened("a very long name of a class", 60, font)) <= 60
    contact_sheet([("猫", np.zeros((1, 8, 8, 3), np.uint8), ["猫"])])
