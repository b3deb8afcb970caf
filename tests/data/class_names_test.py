"""Names of classes: ImageNet's are compared with those of the packages they come from."""

import pytest
import reference

from convit_jax.data import class_names


def test_imagenets_names_are_tfds_ids_and_torchvisions_names():
    reference.import_timm()
    import make_class_names

    lines = make_class_names.make().splitlines()
    assert [tuple(line.split("\t")) for line in lines] == list(class_names.imagenet().items())


def test_imagenets_order_is_timms():
    reference.import_timm()
    from timm.data import ImageNetInfo

    assert list(class_names.imagenet()) == ImageNetInfo().label_names()


def test_names_to_show():
    imagenet = class_names.readable(None, 1000)
    assert len(set(imagenet)) == 1000
    assert (imagenet[0], imagenet[134], imagenet[999]) == ("tench", "crane bird", "toilet tissue")
    assert class_names.readable(None, 2) == ("class 0", "class 1")
    assert class_names.readable(["cat", "n02123045"], 2) == ("cat", "tabby")
    with pytest.raises(ValueError, match=r"class names: expected 3, as many as .*, got 2"):
        class_names.readable(["cat", "dog"], 3)
