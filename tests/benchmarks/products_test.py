"""The benchmark of a step's matrix products: which they are, and what it prints."""

import functools
import re
import types

import pytest

from benchmarks import contenders, products
from convit_jax import create_model
from convit_jax.model import flops

OPTIONS = {
    "image_size": 16, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "depth": 4,
    "local_up_to_layer": 2, "num_classes": 5,
}  # fmt: skip


def work(product):
    """FLOPs of a product: two for each combination of its axes, in the times that a step has it."""
    _, einsum, first, second, times = product
    sizes = dict(zip(einsum.partition("->")[0].replace(",", ""), first + second, strict=True))
    return 2 * times * functools.reduce(int.__mul__, sizes.values())


def test_all_products_of_the_layers_are_there():
    """What is not: the patches, the head, and the last block's products with the class token."""
    model = create_model("convit_tiny", **OPTIONS)
    found = products.products(model, batch=3)
    patches = 16 * 16 * 3 * 8
    token = 2 * 17 * 8 + 8 * 8 + 2 * 8 * 32  # scores and averages, projection, MLP
    missing = 3 * 2 * (patches + token + 8 * 5)
    assert sum(map(work, found)) == 3 * (flops.training_flops(model) - missing)
    assert len({name for name, *_ in found}) == len(found) == 2 * (4 * 3 + 3) + 3


def test_products_and_step_are_timed_beside_pytorchs(monkeypatch, capsys):
    pytest.importorskip("torch")
    ran = []
    step = types.SimpleNamespace(run=lambda: ran.append("step"))
    monkeypatch.setattr(contenders, "warmed", lambda spec: step)
    command = ["--variants", "convit_tiny", "--batch", "3", "--repetitions", "2", "--options"]
    command += [f"{key}={value}" for key, value in OPTIONS.items()]
    products.main([*command, "--peer", "torch"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "GFLOP/s" in line]
    assert "convit_tiny, 3 images" in lines
    assert len(rows) == 33 + 3  # each product, and the sums below
    ratio = r"[\d.]+ \([\d.]+ to [\d.]+\)"
    first = rf"GPSA MLP, first, forward +[\d.]+ ms +\d+ GFLOP/s +{ratio}$"
    assert re.search(first, rows[6])
    sums = ["all products, alone", "all products, alone, in PyTorch", "the step"]
    assert [row[:56].strip() for row in rows[-3:]] == sums
    assert re.search(rf"step / products: {ratio}$", lines[-1])
    assert ran == ["step"] * 2
    with pytest.raises(SystemExit):
        products.main(["--variants", "resnet"])
