"""Pictures of the class token's attention: the library behind `convit predict --attention`.

Shapes: B batch, H heads, L layers with a class token, G GPSA layers, R and C rows and columns of
patches.
"""

from collections.abc import Sequence
import os
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax import storage
from convit_jax.model.attention_maps import class_attention
from convit_jax.model.normalise import normalise
from convit_jax.weights.loaded import Loaded

if TYPE_CHECKING:
    from PIL import Image

_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])
_SMALLEST = 112  # pixels of a panel's shorter side; smaller images are enlarged
_GAP = 4  # white pixels between two panels


class AttentionPictures:
    """Draws the class token's attention over images, and writes a PNG for each.

    Attributes:
      gates: (G, H), the share of the positional attention in each head of the GPSA layers; known
        after the first batch.
    """

    def __init__(self, loaded: Loaded, folder: str | os.PathLike, *, every_head: bool = False):
        """Makes the folder.

        Args:
          loaded: weights of a model with images of 1 or 3 channels.
          folder: folder of the pictures, on a disk or in a bucket; made if missing.
          every_head: whether to draw every head of every layer with a class token. Else the picture
            has one map, the mean of the last layer's heads.

        Raises:
          OSError: if the folder cannot be made.
        """
        self.gates = np.zeros((0, loaded.model.num_heads))
        self._folder = storage.as_path(folder)
        storage.make_folder(self._folder)
        self._every_head = every_head
        self._names: set[str] = set()

        def maps(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            images = normalise(images, loaded.mean, loaded.std)
            return class_attention(loaded.model, {"params": params}, images)

        self._params, self._maps = jax.device_put(loaded.params), jax.jit(maps)

    def write(self, paths: Sequence[str], images: np.ndarray) -> list[str]:
        """Writes the pictures of a batch.

        Args:
          paths: files of the images.
          images: (B, height, width, channels) uint8, B at least the number of paths. Batches of one
            size are compiled once.

        Returns:
          The files written: NAME.attention.png in the folder, with a number where the name is
          taken by another image of this run.

        Raises:
          OSError: if a picture cannot be written.
        """
        maps, gates = self._maps(self._params, jnp.asarray(images))
        self.gates = np.asarray(gates)
        files = []
        for i, path in enumerate(paths):
            file = self._folder / self._name(os.path.basename(path))
            picture = draw(images[i], np.asarray(maps[:, i]), every_head=self._every_head)
            with storage.whole_file(file) as unfinished:
                picture.save(unfinished, "PNG")
            files.append(str(file))
        return files

    def _name(self, base: str) -> str:
        number, name = 1, f"{base}.attention.png"
        while name in self._names:
            number += 1
            name = f"{base}-{number}.attention.png"
        self._names.add(name)
        return name


def draw(
    pixels: np.ndarray,
    maps: np.ndarray,
    *,
    every_head: bool = False,
    query: tuple[int, int] | None = None,
) -> "Image.Image":
    """Draws the picture beside its attention maps.

    The colours of each map run from black, no attention, to light yellow, the map's maximum.

    Args:
      pixels: (height, width, 1 or 3) uint8.
      maps: (L, H, R, C), of one image.
      every_head: whether to draw a row for each layer: the picture, the mean of the heads, and
        every head. Else there is one row: the picture, and the mean of the last layer's heads.
      query: row and column of the patch that attends, counted from 0, to frame in the picture.
    """
    from PIL import Image, ImageDraw

    height, width = pixels.shape[:2]
    enlarge = -(-_SMALLEST // min(height, width))
    size = width * enlarge, height * enlarge
    rgb = np.broadcast_to(pixels, (height, width, 3))
    photo = Image.fromarray(np.ascontiguousarray(rgb)).resize(size, Image.Resampling.NEAREST)

    def panel(values: np.ndarray) -> "Image.Image":
        # A class token that looks at itself alone has a map of zeros.
        values = values / values.max() if values.max() > 0 else np.zeros(values.shape)
        share = Image.fromarray(values.astype(np.float32))
        heat = np.clip(np.asarray(share.resize(size, Image.Resampling.BILINEAR)), 0, 1)
        at = np.linspace(0, 1, len(_COLOURS))
        colours = np.stack([np.interp(heat, at, column) for column in _COLOURS.T], axis=-1)
        return Image.blend(photo, Image.fromarray(colours.astype(np.uint8)), 0.65)

    first = photo.copy()
    if query is not None:
        ImageDraw.Draw(first).rectangle(_box(query, maps.shape[-2:], size), outline="red", width=2)
    rows = [[first, panel(layer.mean(0))] for layer in (maps if every_head else maps[-1:])]
    if every_head:
        for row, layer in zip(rows, maps, strict=True):
            row += [panel(head) for head in layer]
    across, down = size[0] + _GAP, size[1] + _GAP
    canvas = Image.new("RGB", (len(rows[0]) * across - _GAP, len(rows) * down - _GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(image, (x * across, y * down))
    return canvas


def _box(
    patch: tuple[int, int], grid: Sequence[int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom pixel of a patch in a picture of size (width, height)."""
    (row, column), (rows, columns), (width, height) = patch, grid, size
    return (
        column * width // columns,
        row * height // rows,
        (column + 1) * width // columns - 1,
        (row + 1) * height // rows - 1,
    )
