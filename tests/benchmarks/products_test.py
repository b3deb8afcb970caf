"""The benchmark of the matrix products: every product and their sum, beside PyTorch's."""

import pytest

from benchmarks import products


def test_every_product_is_timed_beside_pytorchs(capsys):
    pytest.importorskip("torch")
    options = ["depth=3", "embed_dim=32", "local_up_to_layer=1", "image_size=32", "num_classes=5"]
    products.main([
        "--variants", "convit_tiny", "--batch", "2", "--repetitions", "2", "--peer", "torch",
        "--options", *options,
    ])  # fmt: skip
    rows = capsys.readouterr().out.splitlines()
    beside = [row for row in rows if "GFLOP/s" in row and " to " in row]
    names = [row[:56].strip() for row in rows if "GFLOP/s" in row]
    # 3 for each of the 4 linear layers and 3 of the attention; GPSA, plain; 3 of the last block.
    assert len(beside) == 2 * (3 * 4 + 3) + 3
    assert names[-3:] == ["all products, alone", "all products, alone, in PyTorch", "the step"]
