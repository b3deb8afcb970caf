"""The benchmark of the model: it runs, measures memory, and draws its stored results."""

import json
import re

import jax
import numpy as np
import pytest
import reference

from benchmarks import contenders, memory, model, peer, scaling, timing
from convit_jax import create_model

TINY = ["depth=2", "embed_dim=32", "local_up_to_layer=1", "num_classes=10"]


def test_the_peak_of_a_known_allocation():
    def run():
        array = np.ones(100 * 2**20, np.uint8)  # written to, and freed when the call ends
        return int(array[-1])

    # Linux counts pages on each core and sums them only every few dozen pages: not quite exact.
    assert memory.peak_bytes(lambda: None) == pytest.approx(0, abs=2**20)
    for _ in range(2):
        assert memory.peak_bytes(run) == pytest.approx(100 * 2**20, abs=2**20)


def test_a_fresh_process_measures_what_a_pass_takes():
    """The peak cannot be less than what the compiler plans, and takes a few megabytes besides."""
    options = {"depth": 2, "embed_dim": 32, "local_up_to_layer": 1, "image_size": (256, 128)}
    spec = contenders.Spec(contenders.OURS, contenders.FORWARD, "convit_tiny", options, 32)
    found = memory.in_fresh_process(spec)
    assert found.planned > 32 * 128 * 32 * 4  # the patches of the batch
    assert found.planned < found.peak < found.planned + 60e6
    wrong = contenders.Spec(contenders.OURS, "forward", "convit_tiny", {"num_heads": 5}, 8)
    assert "num_heads: expected a divisor" in memory.in_fresh_process(wrong)


@pytest.mark.parametrize("name", ["convit_tiny_plus", "deit_small"])
def test_the_peer_has_our_sizes(name):
    reference.import_timm()
    ours = create_model(name, depth=3, local_up_to_layer=2 if "convit" in name else 0)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), np.zeros((1, 224, 224, 3)))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert sum(x.numel() for x in peer.like(ours).parameters()) == count


def test_the_peer_says_what_it_cannot_be():
    reference.import_timm()
    with pytest.raises(ValueError, match="square images only, not 32 x 64"):
        peer.like(create_model("convit_tiny", image_size=(32, 64)))


def rows(capsys):
    """Returns the header that a command printed, and the rows of each part."""
    header, *parts = capsys.readouterr().out.split("\n\n")
    return header, [re.findall(r"^convit_tiny {5}.*", part, re.MULTILINE) for part in parts]


RATIO = re.compile(r" \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)$")
COMMAND = ["--variants", "convit_tiny", "--batch", "8", "--image_size", "32", "--repetitions", "2"]


def test_the_command_prints_a_row_for_each_contender(capsys):
    reference.import_timm()
    model.main([*COMMAND, "--parts", "speed", "--no-memory", "--options", *TINY])
    header, (found,) = rows(capsys)
    assert "float32, jax " in header
    assert "timm 1." in header
    for row, start in zip(found, ("forward, timm", "forward, ours", "step, timm"), strict=False):
        assert row.split(maxsplit=3)[3].startswith(start)
    assert [bool(RATIO.search(row)) for row in found] == [False, True, False, True]


def test_deit_and_resolutions_by_the_command(tmp_path, capsys):
    reference.import_timm()
    picture = tmp_path / "curves.png"
    forms = ["--options", *TINY, "--options", *TINY, "positional=contract"]
    flags = ["--parts", "deit", "scaling", "--work", "forward", *forms, "--no-memory"]
    model.main([*COMMAND, *flags, "--picture", str(picture)])
    _, (ratios, curve) = rows(capsys)
    assert [bool(RATIO.search(row)) for row in ratios] == [True] * 3
    assert [bool(RATIO.search(row)) for row in curve] == [False, True, True]
    assert [row.count("positional=contract") for row in curve] == [0, 0, 1]
    records = json.loads(picture.with_suffix(".json").read_text())
    assert sorted(r["who"].split(",")[0] for r in records) == ["ours", "ours", "timm"]
    assert all(len(r["seconds"]) == 3 and r["image_size"] == [32, 32] for r in records)


def test_what_is_no_option_of_the_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        model.main(["--peer", "none", "--options", "atention=chunked"])
    assert "unknown options of convit_tiny" in capsys.readouterr().err


def record(size, who="ours", **measured):
    subject = {"variant": "convit_small", "batch": 1, "dtype": "float32", "device": "2 cores"}
    return subject | {"who": who, "image_size": [size, size]} | measured


def test_records_add_up_over_runs_and_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.json"
    first = [record(512, seconds=[0.9, 1, 1.1]), record(224, seconds=[0.1, 0.2, 0.3])]
    scaling.merge(path, first)
    second = [record(512, peak_bytes=5e8), record(224, "timm", seconds=[1, 2, 3], peak_bytes=3e7)]
    kept = scaling.merge(path, second)
    assert kept == json.loads(path.read_text())
    assert kept == [first[1], first[0] | {"peak_bytes": 5e8}, second[1]]
    picture = tmp_path / "curves.png"
    scaling.draw(kept, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected one model"):
        scaling.draw([*kept, record(224) | {"batch": 2}], picture)


def test_ratios_are_within_a_repetition():
    slow, fast = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.0, 2.0])
    assert timing.speed_ratio(fast, slow) == "2.00 (2.00 to 2.00)"
    turns = []
    runs = {name: lambda name=name: turns.append(name) for name in "ab"}
    times = timing.measure(runs, 3)
    assert turns == list("ababab")
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
