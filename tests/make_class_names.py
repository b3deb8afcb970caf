"""Makes the file of ImageNet's classes. Needs tfds and torchvision.

    python tests/make_class_names.py > convit_jax/data/imagenet_classes.txt

The file has a line for each class, in the order of the labels: the WordNet id from tfds' list for
imagenet2012, a tab, and torchvision's name of the class.
"""

from benchmarks import peer


def make() -> str:
    from tensorflow_datasets.core.utils import resource_utils

    peer.import_timm()  # afterwards any build of torchvision can be imported
    from torchvision.models import ResNet50_Weights

    ids = resource_utils.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    names = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    return "".join(f"{i}\t{name}\n" for i, name in zip(ids, names, strict=True))


if __name__ == "__main__":
    print(make(), end="")
