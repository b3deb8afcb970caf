"""Weights on huggingface.co, by name: timm's repositories and others with the same layout."""

from collections.abc import Callable
import dataclasses
import json
import logging
import os
import pathlib
import re
from typing import Any

from convit_jax import extras
from convit_jax.model.variants import VARIANTS, structure_of
from convit_jax.weights import files
from convit_jax.weights.infer import Claim

log = logging.getLogger(__name__)

# The "+" sizes were never released.
RELEASED = {
    "convit_tiny": "timm/convit_tiny.fb_in1k",
    "convit_small": "timm/convit_small.fb_in1k",
    "convit_base": "timm/convit_base.fb_in1k",
    "deit_tiny": "timm/deit_tiny_patch16_224.fb_in1k",
    "deit_small": "timm/deit_small_patch16_224.fb_in1k",
    "deit_base": "timm/deit_base_patch16_224.fb_in1k",
}
_REPOSITORY = r"\w[\w.-]*/[\w.-]+"
_NAME = re.compile(rf"(?:(?:hf[-_])?hub:)?({_REPOSITORY})(?:@([\w./-]+))?")
_WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{files.INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{files.INDEX}",
)


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository in the local cache, or in a folder.

    Attributes:
      name: ORGANISATION/NAME, or the path of the folder.
      weights: path of model.safetensors or pytorch_model.bin, or of the list of its shards.
      config: content of config.json; {} if the repository has none.
    """

    name: str
    weights: pathlib.Path
    config: dict[str, Any]


def repository_name(source: str) -> str | None:
    """Returns the repository of a name such as "convit_base" or "hf-hub:ORGANISATION/NAME".

    Returns ORGANISATION/NAME, followed by @REVISION if `source` has a revision. Returns None if
    `source` is not the name of a repository.

    Raises:
      ValueError: if `source` is one of the paper's models whose weights were not released.
    """
    if source in RELEASED:
        return RELEASED[source]
    if source in VARIANTS:
        raise ValueError(
            f"{source}: expected one of {', '.join(RELEASED)}, whose weights were released"
        )
    match = _NAME.fullmatch(source)
    return match and (f"{match[1]}@{match[2]}" if match[2] else match[1])


def destination(text: str) -> str | None:
    """Returns ORGANISATION/NAME of "hub:ORGANISATION/NAME"; None without one of the prefixes.

    Raises:
      ValueError: if another text follows the prefix.
    """
    prefix, colon, name = text.partition(":")
    if not colon or prefix not in ("hub", "hf-hub", "hf_hub"):
        return None
    if not re.fullmatch(_REPOSITORY, name):
        raise ValueError(f"DST: expected hub:ORGANISATION/NAME, got {text}")
    return name


def fetch(name: str, *, offline: bool = False) -> Repository:
    """Fetches the weights of a repository, from the local cache if they are there.

    The cache is that of huggingface_hub, in $HF_HOME. The other variables of huggingface_hub
    ($HF_ENDPOINT, $HF_TOKEN, $HF_HUB_OFFLINE) work too.

    Args:
      name: repository, as returned by `repository_name`.
      offline: whether to look into the cache only.

    Raises:
      ValueError: if the repository does not exist or has no weights.
      OSError: if the weights are not in the cache, and `offline` is set or the network is missing.
    """
    with extras.needed("weights", "a name on huggingface.co"):
        import huggingface_hub
        from huggingface_hub import errors

    repo, _, revision = name.partition("@")

    def download(file: str, offline: bool) -> pathlib.Path:
        path = huggingface_hub.hf_hub_download(
            repo, file, revision=revision or None, local_files_only=offline
        )
        return pathlib.Path(path)

    try:
        weights, missing = _first(download, _WEIGHTS, offline)
        config = None if weights is None else _first(download, ("config.json",), offline)[0]
        if weights is not None and weights.name.endswith(files.INDEX):
            for shard in sorted(set(files.shards(weights).values())):
                download(shard, offline)
    except errors.RepositoryNotFoundError:  # also raised for private ones
        raise ValueError(
            f"{name}: no such file or folder here, and no such repository on {endpoint()} (a "
            "private repository needs $HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: {endpoint()} has no such revision of {repo}") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise OSError(f"{name}: {endpoint()}: {str(error).partition(chr(10))[0]}") from error
    if weights is None and isinstance(missing, errors.LocalEntryNotFoundError):
        offline = offline or huggingface_hub.constants.HF_HUB_OFFLINE
        why = "offline" if offline else f"{endpoint()} cannot be reached"
        raise OSError(
            f"{name}: no such file or folder here, not in the cache "
            f"({huggingface_hub.constants.HF_HUB_CACHE}), and {why}. Fetch it once with a network, "
            "or give the path of a file"
        ) from missing
    if weights is None:
        raise ValueError(
            f"{name}: expected model.safetensors or pytorch_model.bin in it, or the list of its "
            f"shards ({files.INDEX}), found none"
        )
    if config is None:
        log.warning("%s: no config.json; mean, std and crop default to ImageNet's", name)
    return Repository(name, weights, _read_config(config))


def cloned(folder: pathlib.Path) -> Repository | None:
    """Returns the repository that was copied into a folder; None if the folder has no weights."""
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        return None
    config = folder / "config.json"
    return Repository(str(folder), weights, _read_config(config if config.is_file() else None))


def describe(repository: Repository) -> tuple[Claim, dict[str, Any]]:
    """Returns what config.json states: options of the model, and fields of `Loaded`.

    The format of config.json is timm's.
    """
    config = repository.config
    recipe = {**config, **(config.get("pretrained_cfg") or {})}  # older files have one level
    changed = config.get("model_args") or {}
    name = re.fullmatch(r"(convit_\w+|deit_[a-z]+)(_patch16_\d+)?", config.get("architecture", ""))
    options = {}
    if name and name[1] in VARIANTS and not changed:
        options = structure_of(name[1])
    if config.get("num_classes") is not None:
        options["num_classes"] = config["num_classes"]
    if config.get("global_pool") in ("token", "avg"):
        options["global_pool"] = config["global_pool"]
    size = changed.get("img_size")
    _, *rectangle = recipe.get("input_size") or (3, 0, 0)
    if size is None and rectangle[0] != rectangle[1]:  # the weights determine a square one
        size = rectangle
    if size is not None:
        options["image_size"] = size

    known: dict[str, Any] = {key: tuple(recipe[key]) for key in ("mean", "std") if recipe.get(key)}
    if recipe.get("crop_pct"):
        known["crop_pct"] = float(recipe["crop_pct"])
    if recipe.get("label_names"):
        known["class_names"] = tuple(recipe["label_names"])
    for key, ours in (("interpolation", "bicubic"), ("crop_mode", "center")):
        if recipe.get(key, ours) != ours:
            log.warning("%s asks for %s %s; using %s", repository.name, key, recipe[key], ours)
    return Claim(f"config.json of {repository.name}", options), known


def _read_config(path: pathlib.Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def _first(
    download: Callable[[str, bool], pathlib.Path], names: tuple[str, ...], offline: bool
) -> tuple[pathlib.Path | None, Exception | None]:
    """Downloads the first of these files that exists; returns its path, or why none was found."""
    from huggingface_hub import errors

    missing: Exception | None = None
    for name in names:
        try:
            return download(name, offline), None
        except errors.LocalEntryNotFoundError as error:
            missing, offline = error, True  # no network: do not wait for it again
        except errors.EntryNotFoundError as error:
            missing = error
    return None, missing


def files_to_publish(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the paths of weights and configuration of a repository in a folder."""
    return folder / "model.safetensors", folder / "config.json"


def endpoint() -> str:
    """Returns the address of the server: $HF_ENDPOINT, or huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
