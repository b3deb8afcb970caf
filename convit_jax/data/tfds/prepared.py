"""Finds prepared tfds data sets, and names the command that prepares one."""

import difflib
import os
import pathlib
import shlex

from convit_jax import storage


def find_root(data_dir: str) -> pathlib.Path:
    """Returns the folder of the tfds data sets.

    Args:
      data_dir: the folder; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      ValueError: if it is a URL of another kind than gs://BUCKET/NAME and s3://BUCKET/NAME.
      ModuleNotFoundError: if the package is missing that reads such a bucket.
    """
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        path = storage.as_path(data_dir)
    except ValueError as error:
        raise ValueError(f"data.dir: {error}") from None
    return path if storage.is_bucket(data_dir) else path.absolute()


def find_version(spec: str, root: pathlib.Path) -> pathlib.Path:
    """Returns the folder ROOT/NAME[/CONFIG]/VERSION, by default of the highest prepared version.

    Args:
      spec: NAME, NAME:VERSION or NAME/CONFIG.
      root: folder of the tfds data sets.

    Raises:
      FileNotFoundError: if the data set is not there; names the command that prepares it.
      ValueError: if it has several configurations.
    """
    name, _, version = spec.partition(":")
    folder = root / name
    versions = _versions(folder)
    configs = [child for child in _folders(folder) if not versions and _versions(child)]
    if not versions and len(configs) == 1:
        folder = configs[0]
        versions = _versions(folder)
    elif not versions and configs:
        fitting = [child for child in configs if version in ("", *_versions(child))] or configs
        raise ValueError(
            f"data.source: {folder} holds several configurations; name one of "
            f"{[f'tfds:{name}/{child.name}' for child in fitting]}"
        )
    if version in versions:
        return folder / version
    if versions and not version:
        return folder / versions[-1]
    if versions:
        found = f"versions {', '.join(versions)} alone (data.source=tfds:{name}:{versions[-1]})"
    elif (root / "dataset_info.json").is_file() or _versions(root):
        found = f"a data set in {root} itself: data.dir is the folder above NAME/VERSION"
    elif root.is_dir():
        found = f"in {root}: {', '.join(child.name for child in _folders(root)) or 'nothing'}"
    else:
        found = f"no folder {root}: set data.dir or TFDS_DATA_DIR"
    raise FileNotFoundError(
        f"data.source: expected tfds:{spec} prepared in {folder / (version or 'VERSION')}, got "
        f"{found}. {how_to_prepare(spec, root)}"
    )


def file_format_for(folder: pathlib.Path) -> str:
    """Returns the format to prepare shards in, by tfds' name. Only TFRecord is read in a bucket."""
    return "tfrecord" if storage.is_bucket(folder) else "array_record"


def how_to_prepare(spec: str, root: pathlib.Path) -> str:
    """Returns a sentence with the command that prepares a data set, or that there is none.

    Args:
      spec: NAME, NAME:VERSION or NAME/CONFIG.
      root: folder of the tfds data sets.
    """
    name, data_dir = spec.partition(":")[0].partition("/")[0], shlex.quote(str(root))
    if name == "imagenet2012":
        latest = ", with data.source=tfds:imagenet2012" if ":" in spec else ""
        return f"To prepare it: convit data prepare --tars DIR --data_dir {data_dir}{latest}"
    try:
        import tensorflow_datasets as tfds

        known = tfds.list_builders(with_community_datasets=False)
    except ImportError:
        known = [name]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f": did you mean tfds:{close[0]}?" if close else "; its own script prepares it"
        return f"tensorflow-datasets {tfds.__version__} has no data set {name!r}{hint}"
    file_format = file_format_for(root)
    return (
        f"To prepare it: tfds build {shlex.quote(spec)} --file_format={file_format} --data_dir "
        f"{data_dir} (after pip install tensorflow tensorflow-datasets)"
    )


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    if storage.is_bucket(path):
        try:
            return [path / name for name in storage.children(os.fspath(path)).folders]
        except FileNotFoundError:
            return []
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []


def _versions(path: pathlib.Path) -> list[str]:
    """Returns the prepared versions in a folder, in rising order.

    A version that is not fully prepared has no dataset_info.json and is left out.
    """
    names = [
        child.name
        for child in _folders(path)
        if child.name.replace(".", "").isdigit() and (child / "dataset_info.json").is_file()
    ]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".") if part])
