"""Predicts the classes of image files, and compares them with timm's transform and model."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import reference
from runs import ROOT
from sklearn import datasets

import convit_jax
from convit_jax import predict
from convit_jax.cli import predict as command
from convit_jax.data import class_names
from convit_jax.data.images import transforms
from convit_jax.predict import attention
from convit_jax.weights import digest, safetensors
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded

PHOTOS = [
    pathlib.Path(datasets.__file__).with_name("images") / name
    for name in ("china.jpg", "flower.jpg")
]


def save(path, num_classes=1000, names=None, **options):
    """Saves small random weights in our own format."""
    model = convit_jax.ConViT(
        embed_dim=32, depth=2, local_up_to_layer=1, num_classes=num_classes,
        **{"image_size": 32, **options},
    )  # fmt: skip
    images, rng = jnp.zeros((1, *model.image_shape)), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    safetensors.save_weights(path, Loaded(model, params, class_names=names))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """Good images of several kinds, and a bad one."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for photo in PHOTOS:
        (folder / photo.name).write_bytes(photo.read_bytes())
    photo = Image.open(PHOTOS[0])
    photo.resize((90, 70)).convert("L").save(folder / "deeper" / "grey.png")
    photo.resize((70, 90)).convert("CMYK").save(folder / "deeper" / "inks.JPEG")
    (folder / "broken.jpg").write_bytes(PHOTOS[0].read_bytes()[:3000])
    (folder / "notes.txt").write_text("no image")
    return folder


def test_top_5_and_probabilities_are_timms(tmp_path):
    timm, torch = reference.import_timm()
    from timm.models.convit import ConVit

    theirs = ConVit(img_size=64, embed_dim=8, num_heads=4, depth=2, local_up_to_layer=1).eval()
    reference.randomise(theirs, torch, seed=1)
    path = tmp_path / "theirs.pth"
    torch.save(theirs.state_dict(), path)
    config = timm.data.resolve_data_config({"crop_pct": 0.875, "input_size": (3, 64, 64)})
    assert config["interpolation"] == "bicubic"
    transform = timm.data.create_transform(**config)

    predictor = predict.Predictor(read_weights(path), batch_size=2)
    for (name, ours), photo in zip(
        predict.predict_files(predictor, map(str, PHOTOS)), PHOTOS, strict=True
    ):
        assert name == str(photo)
        with torch.inference_mode():
            logits = theirs(transform(Image.open(photo).convert("RGB"))[None])
        best = logits.softmax(-1)[0].topk(5)
        assert [p.index for p in ours] == best.indices.tolist()
        np.testing.assert_allclose([p.probability for p in ours], best.values, rtol=2e-5)


def test_the_rest_is_predicted_and_the_unreadable_are_reported(exported, photos, capsys):
    status = command.main(
        ["--weights", exported, str(photos), str(photos / "none*.jpg"), "nope.jpg", "--batch=3"]
    )
    out, err = capsys.readouterr()
    assert status == 1
    shown = [line for line in out.splitlines() if not line.startswith(" ")]
    assert [pathlib.Path(line).name for line in shown] == [
        "china.jpg", "grey.png", "inks.JPEG", "flower.jpg",
    ]  # fmt: skip
    assert len(out.splitlines()) == 4 * 6
    lines = err.splitlines()
    start = lines.index("error: 3 of 7 not read:")
    assert lines[start + 1] == f"  {photos / 'none*.jpg'}: no file matches this pattern"
    assert lines[start + 2].startswith(f"  {photos / 'broken.jpg'}: not a readable image")
    assert lines[start + 3] == "  nope.jpg: No such file or directory"


def test_json_lines(exported, photos, capsys):
    good = [str(photos / "china.jpg"), str(photos / "deeper")]
    assert command.main(["--weights", exported, *good, "--json", "--top=3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [pathlib.Path(line["file"]).name for line in lines] == [
        "china.jpg", "grey.png", "inks.JPEG",
    ]  # fmt: skip
    names = list(class_names.imagenet().values())
    for line in lines:
        first, second, third = line["predictions"]
        assert 1 > first["probability"] > second["probability"] > third["probability"] > 0
        assert first["name"] == names[first["index"]]
    assert command.main(["--weights", exported, str(photos / "broken.jpg"), "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "not a readable image" in json.loads(line)["error"]


def test_batches_change_nothing_and_order_is_kept(exported, photos):
    paths, _ = predict.find_images([str(photos)])
    found = [
        dict(predict.predict_files(predict.Predictor(read_weights(exported), batch), paths))
        for batch in (1, 3)
    ]
    assert [list(result) for result in found] == [paths] * 2
    for path in paths:
        if path.endswith("broken.jpg"):
            assert found[0][path] == found[1][path]
            continue
        one, three = found[0][path], found[1][path]
        assert [p.index for p in one] == [p.index for p in three]
        np.testing.assert_allclose(
            [p.probability for p in one], [p.probability for p in three], rtol=1e-5
        )


def test_names_size_and_channels_are_the_weights(tmp_path, photos, capsys):
    path = str(tmp_path / "grey.safetensors")
    save(path, 3, ("cat", "dog", "n01440764"), in_channels=1, image_size=(32, 48))
    image = str(photos / "china.jpg")
    assert command.main(["--weights", path, image, "--size=48x32", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    predictions = json.loads(line)["predictions"]
    assert {p["name"] for p in predictions} == {"cat", "dog", "tench"}
    assert sum(p["probability"] for p in predictions) == pytest.approx(1, abs=1e-6)
    model = read_weights(path, image_size=(48, 32)).model
    assert model.image_shape == (48, 32, 1)
    predictor = predict.Predictor(read_weights(path), 1)
    pixels = predictor.pixels(PHOTOS[0].read_bytes())
    grey = np.asarray(Image.open(PHOTOS[0]).convert("L"))[..., None]
    np.testing.assert_array_equal(pixels, transforms.EvalTransform((32, 48))(grey))
    orientation = Image.Exif()
    orientation[0x0112] = 3  # upside down
    Image.fromarray(grey[::-1, ::-1, 0]).save(tmp_path / "turned.png", exif=orientation)
    turned = predictor.pixels((tmp_path / "turned.png").read_bytes())
    np.testing.assert_array_equal(turned, pixels)
    with pytest.raises(ValueError, match="needs one vector of logits an image"):
        predict.Predictor(read_weights(path, num_classes=0), 1)


def test_preprocessing_belongs_to_the_weights(tmp_path, photos):
    model = convit_jax.ConViT(
        embed_dim=32, depth=2, local_up_to_layer=1, image_size=(32, 48), in_channels=3
    )
    loaded = Loaded(model, {}, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), crop_pct=0.9)
    preprocess, photo = predict.Preprocess(loaded), PHOTOS[0]
    pixels = transforms.EvalTransform((32, 48), 0.9)(photo.read_bytes()).astype(np.float32)
    expected = (pixels / 255 - np.float32(loaded.mean)) / np.float32(loaded.std)
    picture = Image.open(photo)
    found = preprocess(photo, str(photo), photo.read_bytes(), picture, np.asarray(picture))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack([expected] * 5), rtol=1e-5, atol=1e-5)
    grey = np.asarray(picture.convert("L"))
    np.testing.assert_array_equal(*preprocess(grey[..., None], np.stack([grey] * 3, axis=2)))
    with pytest.raises(ValueError, match="expected one or more"):
        preprocess()
    with pytest.raises(ValueError, match="not a readable image"):
        preprocess(photos / "broken.jpg")
    with pytest.raises(FileNotFoundError, match="nothing"):
        preprocess(tmp_path / "nothing.jpg")
    five = Loaded(model.clone(in_channels=5), {}, "five.pth")
    with pytest.raises(ValueError, match=r"five\.pth: expected 1 or 3 input channels, got 5"):
        predict.Preprocess(five)


def imagesize(path):
    with Image.open(path) as image:
        return image.size


def test_attention_and_what_json_was_made_with(exported, photos, tmp_path, capsys):
    loaded = read_weights(exported)
    good = [str(photos / "china.jpg"), str(photos / "deeper" / "grey.png")]
    shutil.copy(photos / "flower.jpg", photos / "deeper" / "china.jpg")
    folder = tmp_path / "new" / "maps"
    arguments = ["--weights", exported, *good, str(photos / "deeper" / "china.jpg"), "--json"]
    assert command.main([*arguments, "--attention", str(folder), "--heads", "--batch=2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["china.jpg.attention.png", "grey.png.attention.png", "china.jpg-2.attention.png"]
    assert [line["attention"] for line in lines] == [str(folder / name) for name in names]
    gate = 1 / (1 + np.exp(-loaded.params["gpsa_blocks"]["attn"]["gate"]))
    for line in lines:
        np.testing.assert_allclose(line["gates"], gate, rtol=1e-5)
        weights = {"source": exported, "sha256": digest.digest(loaded.params)}
        assert (line["weights"], line["preprocessing"]) == (weights, loaded.preprocessing)
        # One layer with a class token: the picture, the mean and 4 heads of 4 x 32 pixels.
        assert imagesize(line["attention"]) == (6 * 128 + 5 * 4, 128)
    assert command.main(["--weights", exported, good[0], "--attention", str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "gates (share of the positional attention in each head)"
    assert out[1].startswith("  layer  1  ")
    assert out[-1] == f"  {folder / names[0]}"
    assert imagesize(out[-1].strip()) == (2 * 128 + 4, 128)
    with pytest.raises(SystemExit):
        command.main(["--weights", exported, good[0], "--heads"])
    assert "--heads: expected with --attention" in capsys.readouterr().err

    pixels = np.zeros((112, 168, 1), np.uint8)
    for dark in (0.0, np.nan):  # no attention to any patch; weights that are not finite
        drawn = np.asarray(attention.draw(pixels, np.full((1, 4, 2, 3), dark)))
        assert drawn[:, 172:].max() < 10
    maps = np.full((1, 4, 2, 3), 0.01)
    maps[0, :, 1, 2] = 0.5  # the lower right patch
    drawn = np.asarray(attention.draw(pixels, maps)).sum(axis=-1)
    assert drawn.shape == (112, 2 * 168 + 4)
    hottest = np.unravel_index(drawn[:, 172:].argmax(), (112, 168))
    assert hottest[0] >= 56
    assert hottest[1] >= 112


def test_memory_does_not_grow_with_the_number_of_files(photos):
    """Files are taken from the list as they are needed: at most three batches are under way."""

    class Stub:
        batch_size = 2

        def pixels(self, data):
            return np.zeros((1, 1, 3), np.uint8)

        batch = staticmethod(np.stack)

        def top(self, images, count):
            return [[predict.Prediction("x", 0, 1.0)] for _ in images]

    taken = []

    def paths():
        for number in range(50):
            taken.append(number)
            yield str(photos / "china.jpg")

    for number, (_, predictions) in enumerate(predict.predict_files(Stub(), paths())):
        assert predictions[0].name == "x"
        assert len(taken) - number <= 3 * Stub.batch_size
    assert number == 49


def test_what_is_found(photos):
    names = lambda found: [pathlib.Path(path).name for path in found[0]]  # noqa: E731
    whole = ["broken.jpg", "china.jpg", "grey.png", "inks.JPEG", "flower.jpg"]
    assert names(predict.find_images([str(photos)])) == whole
    twice = [str(photos / "flower.jpg"), str(photos)]
    assert names(predict.find_images(twice)) == ["flower.jpg", *whole[:4]]
    assert names(predict.find_images([str(photos / "*.jpg")])) == [
        "broken.jpg", "china.jpg", "flower.jpg",
    ]  # fmt: skip
    assert names(predict.find_images([str(photos / "**" / "*.png")])) == ["grey.png"]
    assert names(predict.find_images([str(photos / "notes.txt")])) == ["notes.txt"]
    odd = photos / "[1].jpg"
    odd.write_bytes(PHOTOS[0].read_bytes())
    assert names(predict.find_images([str(odd)])) == ["[1].jpg"]
    for left_behind in ("._china.jpg", "__MACOSX/china.jpg", ".cache/china.jpg"):
        (photos / "empty" / left_behind).parent.mkdir(parents=True, exist_ok=True)
        (photos / "empty" / left_behind).write_bytes(b"")
    paths, reasons = predict.find_images([str(photos / "empty")])
    assert paths == []
    assert reasons[str(photos / "empty")].startswith("no images in this folder (.jpg,")


def run(*arguments):
    command = [sys.executable, "-W", "error", "-m", "convit_jax", "predict", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)


def test_the_command(exported, photos):
    done = run("--help")
    assert done.returncode == 0
    for text in ("--weights SRC", "--json", "--size PIXELS", "the workdir of", "Exit status"):
        assert text in done.stdout
    done = run("--weights", exported, str(photos / "china.jpg"), "--timing")
    assert done.returncode == 0, done.stderr
    assert "%  " in done.stdout
    assert "load " in done.stderr.splitlines()[-1]


def test_mistakes_are_named(tmp_path, exported, capsys):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x08\0\0\0")
    image = str(PHOTOS[0])
    for arguments, message in (
        (["--weights", str(bad), image], "bad.safetensors: not a readable safetensors file"),
        (["--weights", str(tmp_path / "no.pth"), image], "no such file or folder"),
        (["--weights", exported, image, "--size=33"], "image_size: expected a multiple of"),
    ):
        with pytest.raises(SystemExit, match=message):
            command.main(arguments)
    for arguments, message in (
        ([image], "--weights"),
        (
            ["--weights", exported, image, "--size=big"],
            "expected a number of pixels such as 224, or",
        ),
        (["--weights", exported, image, "--top=0"], "expected 1 or more, got 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
