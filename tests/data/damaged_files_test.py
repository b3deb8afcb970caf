"""Files damaged at random are read or refused by name: no crash, no hang, little memory."""

import json
import subprocess
import sys

from runs import ROOT


def test_damaged_files_are_read_or_refused_by_name(tmp_path):
    """A process of its own reads 30 damaged files of each kind; an unnamed error ends it."""
    command = [sys.executable, str(ROOT / "tests/damaged_files.py"), str(tmp_path), "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for kind in (".jpg", ".png", ".tfrecord", ".array_record"):
        counts = [found["outcomes"].get(f"{kind} {what}", 0) for what in ("read", "refused")]
        assert sum(counts) == 30
        assert counts[1] > 5
    assert found["memory"] < 2 * 2**30
