"""Reading many parts of objects at a time, and listing what is in a bucket."""

import pickle

import buckets
import pytest

from convit_jax import storage
from convit_jax.storage import ahead


def test_spans_that_were_requested_are_those_that_are_read(bucket, monkeypatch):
    path, empty = f"{bucket}/data", f"{bucket}/empty"
    content = bytes(range(256)) * 4
    storage.as_path(path).write_bytes(content)
    storage.as_path(empty).write_bytes(b"")
    begun = []
    begin = ahead._begin
    monkeypatch.setattr(ahead, "_begin", lambda span: begun.append(span) or begin(span))
    monkeypatch.setattr(ahead, "_MERGED", 30)
    ranges = [(0, 10), (10, 25), (25, 40), (50, 60), (0, 10), (1000, 1100)]
    spans = [*(storage.Span(path, *ends) for ends in ranges), storage.Span(path)]
    reader = storage.ReadAhead()
    reader.request(spans)
    # Neighbours come together, up to 30 bytes, and what is read twice comes once.
    expected = [(0, 25), (25, 40), (50, 60), (1000, 1100), (0, None)]
    assert [(span.start, span.end) for span in begun] == expected
    for span in reversed(spans):
        assert reader.read(span) == content[span.start : span.end]
    assert len(begun) == 5
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(spans[0]) == content[:10]  # without a request
    assert copy.read(storage.Span(empty)) == b""
    assert len(begun) == 7
    reader.request([storage.Span(f"{bucket}/missing")])
    with pytest.raises(FileNotFoundError, match="missing"):
        reader.read(storage.Span(f"{bucket}/missing"))


def test_a_bucket_is_listed(bucket, tmp_path):
    for name in ("a/1.jpg", "a/deep/2.jpg", "a/deep/er/3.jpg", "b/4.jpg", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    buckets.upload(tmp_path, bucket)
    found = storage.children(f"{bucket}/")
    assert (found.folders, [*found.files]) == (("a", "b"), ["c.txt"])
    assert found.files["c.txt"].size == 5
    for folder in (f"{bucket}/a", f"{bucket}/a/"):
        assert storage.below(folder) == ["1.jpg", "deep/2.jpg", "deep/er/3.jpg"]
    names = ("a", "a/", "a/deep", "c.txt", "nowhere")
    assert [storage.is_folder(f"{bucket}/{name}") for name in names] == [True] * 3 + [False] * 2
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.children(f"{bucket}/nowhere")
    for root in (bucket, str(tmp_path)):
        paths = [f"{root}/{name}" for name in ("a/1.jpg", "c.txt", "a", "nowhere/x")]
        one, other, *none = storage.versions(paths)
        assert (one.size, other.size, none) == (7, 5, [None, None])
        storage.write_text(paths[0], "changed")  # of the same size
        changed, *others = storage.versions(paths)
        assert changed.size == one.size
        assert changed.mark != one.mark
        assert others == [other, None, None]
