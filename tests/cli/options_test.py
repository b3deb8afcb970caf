"""Parsing that all commands share: configurations, overrides, and values of flags."""

import argparse

import pytest

from convit_jax.cli import options


def test_a_configuration_by_path_and_by_name(tmp_path, monkeypatch):
    shipped = options.configuration("digits", [])
    path = tmp_path / "mine.py"
    path.write_text(
        "from convit_jax import recipe\ndef get_config():\n    return recipe.paper('convit_tiny')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert options.configuration("mine.py", []).model.name == "convit_tiny"
    assert shipped.data.source == "digits"
    assert {"convit_b", "deit_ti_plus", "finetune"} <= set(options.shipped_configs())


def test_keys_of_the_command_line(monkeypatch):
    config = options.configuration(
        "convit_ti",
        [
            "--config.train.batch_size=8",
            "--config.model.depth",
            "4",
            "--config.init_ema",
            "--config.model.image_size=224x320",
            "--config.data.mean=(0.5,0.5,0.5)",
        ],
    )
    assert (config.train.batch_size, config.model.depth, config.init_ema) == (8, 4, True)
    assert (config.model.image_size, config.data.mean) == ("224x320", (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("base", "override", "message"),
    [
        ("digits", "--config.model.embed_dm=96", 'Did you mean "embed_dim" instead of "embed_dm"'),
        ("digits", "--config.train.batch_size=few", "config.train.batch_size=few: invalid literal"),
        ("digits", "--config.model.image_size=8,12", "HEIGHTxWIDTH such as 224x320"),
        ("digits", "--config.train.epochs=0", "train.epochs: expected more than 0, got 0"),
        ("configs/nothing.py", "", "--config: no file configs/nothing.py; expected a file, or one"),
        ("README.md", "", "--config: expected a Python file"),
    ],
)
def test_mistakes_are_named(base, override, message, tmp_path, monkeypatch):
    (tmp_path / "README.md").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"(?s).*" + message.replace("(", r"\(")):
        options.configuration(base, [override] if override else [])


def test_flags_and_keys_are_told_apart(capsys):
    parser = options.make_parser("convit train", "Trains.")
    options.add_config(parser)
    parser.add_argument("--workdir")
    argv = ["--config=x.py", "--config.a.b", "3", "--workdir", "runs", "--config.c=4"]
    args, overrides = options.parse(parser, argv)
    assert (args.config, args.workdir) == ("x.py", "runs")
    assert overrides == ["--config.a.b", "3", "--config.c=4"]
    for argv in (["--wrkdir=runs"], ["--config=x.py", "stray"]):
        with pytest.raises(SystemExit):
            options.parse(parser, argv)
        assert f"unrecognized arguments: {argv[-1]}" in capsys.readouterr().err


def test_values_of_flags():
    assert options.size("384") == 384
    assert options.sizes("160, 224x320") == ((160, 160), (224, 320))
    assert options.positive("3") == 3
    for parse, text in [
        (options.sizes, "224,,160"),
        (options.sizes, ""),
        (options.size, "8,12"),
        (options.positive, "0"),
        (options.positive, "-1"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            parse(text)
