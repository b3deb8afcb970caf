"""The benchmark of the matrix products: every product and their sum, beside PyTorch's."""

import types

import pytest

from benchmarks import contenders, products


def test_every_product_is_timed_beside_pytorchs(capsys, monkeypatch):
    pytest.importorskip("torch")
    step = types.SimpleNamespace(run=lambda: None)
    monkeypatch.setattr(contenders, "warmed", lambda spec: step)
    options = ["depth=2", "embed_dim=32", "local_up_to_layer=1", "image_size=32", "num_classes=5"]
    products.main([
        "--variants", "convit_tiny", "--batch", "2", "--repetitions", "2", "--peer", "torch",
        "--options", *options,
    ])  # fmt: skip
    rows = [row for row in capsys.readouterr().out.splitlines() if "GFLOP/s" in row]
    # 3 for each of the 4 linear layers and 3 of the attention; 3 of the last block.
    assert len([row for row in rows if " to " in row]) == 3 * 4 + 3 + 3
    sums = ["all products, alone", "all products, alone, in PyTorch", "the step"]
    assert [row[:56].strip() for row in rows[-3:]] == sums
