"""Publishing weights on huggingface.co, for timm and for this project.

A repository has model.safetensors, config.json (see `timm_config`) and a model card, README.md.
"""

import json
import logging
import pathlib
import tempfile
from typing import Any

import jax

from convit_jax import __version__, extras
from convit_jax.model.variants import variant_of
from convit_jax.storage import write_text
from convit_jax.weights import hub
from convit_jax.weights.digest import digest
from convit_jax.weights.loaded import Loaded
from convit_jax.weights.safetensors import save_weights
from convit_jax.weights.timm_config import timm_config, why_timm_cannot

log = logging.getLogger(__name__)

# Packages by which versions of huggingface_hub talk to the server. Not all of their errors are
# OSErrors; a failed upload of a large file is a RuntimeError.
_HTTP = ("httpx", "httpx2", "requests")
_README = "README.md"  # the model card
_CARD = """---
library_name: {library}
pipeline_tag: image-classification
tags:
{tags}
---
# {title}

{model}, {parameters:.1f} million parameters, for images of {height} x {width} pixels and {classes}
classes. {kind}: {paper}.

## Results

{results}

## Use

{use}

Images: resized, keeping their ratio, until they just cover the image size divided by {crop_pct}
(bicubic). The centre is cut out, and pixels in [0, 1] are normalised by mean {mean} and standard
deviation {std}.

SHA-256 of the weights: `{digest}` (by `convit predict --json` of convit-jax {version}).
"""
_PAPERS = {
    "ConViT": "[d'Ascoli et al. 2021](https://arxiv.org/abs/2103.10697)",
    "DeiT": "[Touvron et al. 2021](https://arxiv.org/abs/2012.12877)",
}
_TIMM = """```python
import timm

model = timm.create_model("hf-hub:{name}", pretrained=True).eval()
```

"""
_OURS = """```python
from convit_jax import load

model, variables = load("hf-hub:{name}")
```"""


def check_token() -> None:
    """Raises PermissionError if no token of huggingface.co is set or stored."""
    with extras.needed("weights", "publishing"):
        import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise PermissionError(
            f"{hub.endpoint()}: no token: set $HF_TOKEN to one that may write, or run "
            "`hf auth login`"
        )


def push(name: str, loaded: Loaded, *, private: bool = False) -> str:
    """Commits weights, configuration and model card to a repository, which is made if missing.

    A model card that is there already stays: its owner may have edited it.

    Args:
      name: ORGANISATION/NAME.
      loaded: the weights; their `metrics` become the table of the model card.
      private: whether a repository that is made now is private. An existing one stays as it is.

    Returns:
      Address of the commit.

    Raises:
      PermissionError: if there is no token, or it may not write there.
      OSError: if the server cannot be reached, or refuses the commit for another reason.
    """
    check_token()
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi(library_name="convit-jax", library_version=__version__)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_repository(pathlib.Path(folder), name, loaded)
            api.create_repo(name, private=private or None, exist_ok=True)
            kept = [_README] if api.file_exists(name, _README) else []
            done = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message="Weights of convit-jax",
                ignore_patterns=kept,
            )
    except errors.HfHubHTTPError as error:
        raise _refused(name, error) from error
    except Exception as error:
        network = type(error).__module__.partition(".")[0] in _HTTP
        if not network and not isinstance(error, (OSError, RuntimeError)):
            raise
        raise OSError(f"{name}: {hub.endpoint()}: {str(error).partition(chr(10))[0]}") from error
    if kept:
        log.warning("%s: its model card stays as it was, without results of these weights; delete "
                    "%s there to get a new one", name, _README)  # fmt: skip
    return done.commit_url


def write_repository(folder: pathlib.Path, name: str, loaded: Loaded) -> None:
    """Writes the files of a repository into a folder, which timm reads as "local-dir:FOLDER".

    Args:
      folder: an existing folder.
      name: ORGANISATION/NAME, for the model card.
      loaded: the weights.

    Raises:
      OSError: if a file cannot be written.
    """
    reason = why_timm_cannot(loaded.model)
    if reason is not None:
        log.warning("%s: timm cannot read it: %s", name, reason)
    weights, config = hub.files_to_publish(folder)
    save_weights(weights, loaded)
    write_text(config, json.dumps(timm_config(loaded), indent=2) + "\n")
    write_text(folder / _README, _card(name, loaded))


def _card(name: str, loaded: Loaded) -> str:
    """Returns the model card: YAML that the site reads, and the text."""
    model, for_timm = loaded.model, why_timm_cannot(loaded.model) is None
    tags = ["image-classification", "convit", "jax", "flax", *(["timm"] if for_timm else [])]
    kind = "DeiT" if model.cls_pos_embed else "ConViT"
    sizes = f"{model.depth} layers of width {model.embed_dim} with {model.num_heads} heads"
    return _CARD.format(
        library="timm" if for_timm else "convit-jax",
        tags="\n".join(f"- {tag}" for tag in tags),
        title=name.partition("/")[2],
        model=f"`{variant_of(model)}`" if variant_of(model) else f"{kind} of {sizes}",
        parameters=sum(array.size for array in jax.tree.leaves(loaded.params)) / 1e6,
        kind=kind,
        paper=_PAPERS[kind],
        height=model.image_shape[0],
        width=model.image_shape[1],
        classes=model.num_classes or "no",
        results=_results(loaded),
        use=((_TIMM if for_timm else "") + _OURS).format(name=name),
        crop_pct=loaded.crop_pct,
        mean=", ".join(f"{x:g}" for x in loaded.mean),
        std=", ".join(f"{x:g}" for x in loaded.std),
        digest=digest(loaded.params),
        version=__version__,
    )


def _results(loaded: Loaded) -> str:
    """Returns the table of what the run measured of these weights, with the source of each."""
    metrics = loaded.metrics
    if not metrics:
        return "These weights have not been evaluated."
    shown = {
        "images": lambda x: f"{x:.0f}",
        "top1": lambda x: f"{x:.2%}",
        "top5": lambda x: f"{x:.2%}",
        "loss": lambda x: f"{x:.4f}",
    }
    titles = {"images": "held-out images", "top1": "top-1", "top5": "top-5", "loss": "loss"}
    keys = [key for key in shown if isinstance(metrics.get(key), (int, float))]
    rows = ([titles[k] for k in keys], ["---"] * len(keys), [shown[k](metrics[k]) for k in keys])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    kind = "averaged weights" if loaded.ema else "weights"
    return f"{table}\n\nMeasured during training, of these {kind} (step {loaded.step})."


def _refused(name: str, error: Any) -> OSError:
    """Returns the error of a request that the server refused, with what mends it."""
    status = error.response.status_code if error.response is not None else None
    where, organisation = hub.endpoint(), name.partition("/")[0]
    if status == 401:
        return PermissionError(
            f"{name}: {where} does not know the token (401): it is wrong or has expired; set "
            "$HF_TOKEN to another, or run `hf auth login`"
        )
    if status == 403:
        return PermissionError(
            f"{name}: {where} does not let this token write there (403): it needs write access "
            f"to the repositories of {organisation}"
        )
    first = str(error).partition("\n")[0]
    return OSError(f"{name}: {where} refused the commit ({status}): {first}")
