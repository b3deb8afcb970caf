"""Writes docs/configuration.md from the keys of convit_jax/recipe.py.

python docs/make_configuration.py
"""

import pathlib
from typing import Any

from convit_jax import recipe

PATH = pathlib.Path(__file__).with_name("configuration.md")

_BEGIN = """# Configuration keys

A configuration is a file of `configs/` and what the command line changes of it:
`--config.train.batch_size=256` sets `train.batch_size`. A key that does not exist, a value of
another type and a value out of bounds are refused before anything is compiled.

The default "open" leaves a key of the model to what the model's name stands for. Other keys say
what it means. The last column says whether a key may differ between two starts of a run. A run
whose other keys have changed is refused.

This page is written from `convit_jax/recipe.py` by this command, in a checkout:

<!-- not run: needs the checkout, whose page it would overwrite -->
```bash
python docs/make_configuration.py
```
"""

_TITLES = {
    "": "The run",
    "mesh": "Devices",
    "checkpoint": "Checkpoints",
    "model": "The model",
    "data": "Data",
    "augment": "Augmentation on the host",
    "mixup": "Augmentation on the device",
    "train": "Training",
    "distill": "Distillation",
    "optim": "The optimiser",
}


def text() -> str:
    """Returns the page."""
    sections: dict[str, list[str]] = {}
    for name, key in recipe.KEYS.items():
        section = name.rpartition(".")[0]
        may_change = "yes" if key.may_change else "no"
        row = f"| `{name}` | {_shown(key.default)} | {key.doc} | {may_change} |\n"
        sections.setdefault(section, []).append(row)
    parts = [_BEGIN]
    for section, rows in sections.items():
        parts.append(
            f"\n## {_TITLES[section]}\n\n"
            "| key | default | meaning | may change |\n|---|---|---|---|\n" + "".join(rows)
        )
    return "".join(parts)


def _shown(value: Any) -> str:
    """Returns a default as it is written on the command line."""
    if value is None:
        return "open"
    if value == "":
        return "empty"
    if isinstance(value, tuple):
        return f"`({', '.join(map(_number, value))})`"
    return f"`{_number(value)}`"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value != int(value) else f"{value:.1f}"
    return str(value)


if __name__ == "__main__":
    PATH.write_text(text())
