"""Weights to files and back, and what may change on the way into another model."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from convit_jax import ConViT, to_torch, weights

MODEL = ConViT(
    image_size=16, patch_size=4, num_classes=5, embed_dim=16, depth=3, local_up_to_layer=2
)


def random_params(model=MODEL):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.image_shape)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype("f"), shapes["params"])


def test_safetensors_there_and_back(tmp_path):
    params = random_params()
    path = tmp_path / "weights.safetensors"
    weights.save_weights(path, params)
    jax.tree.map(np.testing.assert_array_equal, weights.load_weights(path), params)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_pytorch_files(tmp_path):
    _, torch = reference.import_timm()
    params = random_params()
    state_dict = {k: torch.from_numpy(v) for k, v in to_torch(params).items()}
    wrapped = {"model": state_dict, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    for name, content in (("bare.pth", state_dict), ("training.pt", wrapped)):
        torch.save(content, tmp_path / name)
        loaded = weights.load_weights(tmp_path / name)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_are_not_weights_are_refused(tmp_path):
    _, torch = reference.import_timm()
    ran = tmp_path / "ran"
    torch.save({"model": Malicious(ran)}, tmp_path / "bad.pth")
    (tmp_path / "short.safetensors").write_bytes(b"\x08\0\0\0")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "weights.npz").touch()
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    cases = {
        "bad.pth": r"bad\.pth: not a readable PyTorch file",
        "short.safetensors": r"short\.safetensors: not a readable safetensors file",
        "empty.pth": r"empty\.pth: not a readable PyTorch file",
        "weights.npz": r"expected a \.safetensors, \.pth or \.pt file, got .*weights\.npz",
        "resnet.pth": r"resnet\.pth: not the state dict of a ConViT or DeiT",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            weights.load_weights(tmp_path / name)
    assert not ran.exists()
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nope\.pth"):
        weights.load_weights(tmp_path / "nope.pth")


@pytest.mark.parametrize("grid", [(14, 14), (7, 9), (24, 24), (3, 5)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_position_embedding_is_resampled_as_by_timm(grid, prefix):
    _, torch = reference.import_timm()
    from timm.layers import resample_abs_pos_embed

    pos_embed = np.random.default_rng(0).normal(size=(1, prefix + 196, 8)).astype("f")
    expected = resample_abs_pos_embed(
        torch.from_numpy(pos_embed), list(grid), num_prefix_tokens=prefix
    )
    out = weights.resample_pos_embed(pos_embed, grid, num_prefix_tokens=prefix)
    np.testing.assert_allclose(out, expected.numpy(), atol=2e-6)


def test_fitting_changes_what_it_names_and_nothing_else():
    params = random_params()
    options = {"new_head": False, "resize_pos_embed": False, "seed": 0}
    same = weights.fit_params(params, MODEL, **options)
    jax.tree.map(np.testing.assert_array_equal, same, params)

    other = MODEL.clone(num_classes=3, image_size=(16, 24))
    with pytest.raises(ValueError, match="the weights do not fit the model") as error:
        weights.fit_params(params, other, **options)
    assert str(error.value).splitlines()[1:] == [
        "  head/bias: expected (3,), got (5,)",
        "  head/kernel: expected (16, 3), got (16, 5)",
        "  pos_embed: expected (1, 24, 16), got (1, 16, 16)",
    ]
    options |= {"new_head": True, "resize_pos_embed": True}
    fitted = weights.fit_params(params, other, **options)
    assert fitted["head"]["kernel"].shape == (16, 3)
    assert 0 < np.abs(fitted["head"]["kernel"]).max() < 0.1
    assert fitted["pos_embed"].shape == (1, 24, 16)
    for key in params.keys() - {"head", "pos_embed"}:
        jax.tree.map(np.testing.assert_array_equal, fitted[key], params[key])
    deeper = MODEL.clone(depth=4)
    with pytest.raises(
        ValueError, match=r"blocks/attn/proj/bias: expected \(2, 16\), got \(1, 16\)"
    ):
        weights.fit_params(params, deeper, **options)
