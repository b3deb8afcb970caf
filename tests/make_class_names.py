"""ImageNet's classes as convit_jax/imagenet_classes.txt has them.

    python tests/make_class_names.py > convit_jax/imagenet_classes.txt

A line a class, in the order of the labels: the WordNet id, as tfds lists it for imagenet2012, a
tab, and the name that torchvision shows for it. Needs both packages.
"""

from benchmarks import peer


def make() -> str:
    from tensorflow_datasets.core.utils import resource_utils

    peer.import_timm()  # torchvision can be imported afterwards, whatever build it is
    from torchvision.models import ResNet50_Weights

    ids = resource_utils.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    names = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    return "".join(f"{i}\t{name}\n" for i, name in zip(ids, names, strict=True))


if __name__ == "__main__":
    print(make(), end="")
