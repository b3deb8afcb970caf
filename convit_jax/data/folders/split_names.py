"""What the names of folders say about splits: train/, Training/, training_set/, val/, seg_test/."""

import re

# What the name of a folder says about it, in lower case and without "_", "-" and spaces.
_ROLES = {
    **dict.fromkeys(("train", "training", "trainset", "trainingset"), "train"),
    **dict.fromkeys(("traindata", "trainingdata"), "train"),
    **dict.fromkeys(("val", "validation", "valid"), "val"),
    **dict.fromkeys(("valset", "validationset", "validset"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "testingset", "testdata"), "test"),
}
# The first of these that holds labelled images is evaluated, else test/.
_EVALUATED = ("val", "validation", "valid", "valset", "validationset", "validset")


def key(name: str) -> str:
    """Returns a name in the form of the tables above."""
    return re.sub(r"[\W_]+", "", name.casefold())


def role(name: str) -> str:
    """Returns "train", "val" or "test" if a folder of this name is usually one; else ""."""
    return _ROLES.get(key(name), "")


def role_within(name: str) -> str:
    """Returns the role of the first word of a name that has one, such as seg_train, val2017."""
    words = re.findall(r"[a-z]+", name.casefold())
    return next((_ROLES[word] for word in words if word in _ROLES), "")


def place(name: str) -> int:
    """Sort key of the splits to evaluate on, the first choice first."""
    return (*_EVALUATED, key(name)).index(key(name))
