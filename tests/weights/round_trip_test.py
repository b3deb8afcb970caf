"""Weights converted from timm and back: the same predictions on photos, and the same bits."""

import io

import jax
import numpy as np
from PIL import Image
import pytest
import reference

from benchmarks import input_pipeline, peer
from convit_jax.cli import convert
from convit_jax.data.images.transforms import EvalTransform
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded

# Models of quick tests are less deep; all else is as released.
SHALLOW = {"convit_small": (3, 2), "deit_tiny": (2, 0)}


def photos(number: int) -> list[bytes]:
    """Returns JPEGs of several sizes and shapes, each another part of one of five photos."""
    whole = [Image.open(io.BytesIO(data)) for data in input_pipeline.photos()]
    boxes = [(0, 0, 500, 375), (0, 0, 260, 300), (200, 90, 500, 375), (120, 40, 420, 200)]
    files = []
    for box in boxes:
        for image in whole:
            file = io.BytesIO()
            image.crop(box).save(file, "JPEG", quality=92)
            files.append(file.getvalue())
    return files[:number]


def their_pixels(files: list[bytes], loaded: Loaded, torch):
    from timm.data import create_transform

    transform = create_transform(
        loaded.model.image_size, interpolation="bicubic", mean=loaded.mean, std=loaded.std,
        crop_pct=loaded.crop_pct,
    )  # fmt: skip
    return torch.stack([transform(Image.open(io.BytesIO(data))) for data in files])


def our_pixels(files: list[bytes], loaded: Loaded) -> np.ndarray:
    transform = EvalTransform(loaded.model.image_size, crop_pct=loaded.crop_pct)
    pixels = np.stack([transform(data) for data in files]).astype(np.float32) / 255
    return (pixels - np.float32(loaded.mean)) / np.float32(loaded.std)


def check_round_trip(theirs, torch, folder, files: list[bytes], suffixes: tuple[str, ...]) -> None:
    """Converts a timm model from each kind of file and back: timm's predictions, and its bits."""
    import safetensors.torch

    reference.randomise(theirs, torch, seed=0)
    tensors = {key: value.clone() for key, value in theirs.state_dict().items()}
    save = {".pth": torch.save, ".safetensors": safetensors.torch.save_file}
    params = None
    for suffix in suffixes:
        source, export, back = (folder / f"{n}{suffix}" for n in ("theirs", "export", "back"))
        export = export.with_suffix(".safetensors")
        save[suffix](tensors, source)
        convert.main([str(source), str(export)])
        loaded = read_weights(export)
        if params is None:
            params = loaded.params
            check_predictions(theirs, loaded, files, torch)
        else:
            jax.tree.map(np.testing.assert_array_equal, loaded.params, params)

        convert.main([str(export), str(back), "--to", "torch"])
        read = torch.load if suffix == ".pth" else safetensors.torch.load_file
        returned = read(back)
        theirs.load_state_dict(returned, strict=True)
        for key, value in tensors.items():
            assert torch.equal(returned[key], value), key
        for path in (source, export, back):
            path.unlink()


def check_predictions(theirs, loaded: Loaded, files: list[bytes], torch) -> None:
    with torch.no_grad():
        expected = theirs(their_pixels(files, loaded, torch))
    apply = jax.jit(loaded.model.apply)
    logits = np.asarray(apply({"params": loaded.params}, our_pixels(files, loaded)))
    atol = 1e-4 * float(expected.abs().max())
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=atol)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(best, expected.topk(5).indices.numpy())


def test_predictions_of_convit_tiny_on_20_photos(tmp_path):
    _, torch = reference.import_timm()
    files = photos(20)
    assert len(files) == 20
    check_round_trip(peer.make("convit_tiny"), torch, tmp_path, files, (".pth", ".safetensors"))


@pytest.mark.parametrize("name", SHALLOW)
def test_predictions_of_shallow_models(tmp_path, name):
    _, torch = reference.import_timm()
    from timm.models.convit import ConVit
    from timm.models.vision_transformer import VisionTransformer

    depth, local = SHALLOW[name]
    if local:
        theirs = ConVit(embed_dim=48, num_heads=9, depth=depth, local_up_to_layer=local)
    else:
        theirs = VisionTransformer(embed_dim=192, num_heads=3, depth=depth)
    check_round_trip(theirs.eval(), torch, tmp_path, photos(5), (".pth",))


@pytest.mark.slow
@pytest.mark.parametrize("name", peer.NAMES)
def test_predictions_of_all_models(tmp_path, name):
    _, torch = reference.import_timm()
    # Every model has both kinds of file; slow models have fewer photos.
    files = photos(20 if name.endswith("tiny") else 5 if "base" not in name else 2)
    check_round_trip(peer.make(name), torch, tmp_path, files, (".pth", ".safetensors"))
