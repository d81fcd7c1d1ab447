"""Cuts the fixtures of this directory from full arrays: python tests/data/make.py ARRAYS [--out DIR]

ARRAYS holds what README.md describes, uncut: `tiny378` and `tiny70` as .config.json and .safetensors,
`tiny378_640x480`, `tiny378_64x64`, `tiny378_text`, `tiny70_masks` and `improc` as .npz. The same arrays give the same
bytes with the numpy and the Pillow that wrote them, and the same values with any. vlmkern is not used, as the arrays
judge it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

Arrays = Mapping[str, np.ndarray]

COPIED = (
    "tiny378.config.json",
    "tiny378.safetensors",
    "tiny378_text.npz",
    "tiny70.config.json",
    "tiny70.safetensors",
    "tiny70_masks.npz",
)
# of the larger picture every seventh row of these, for the files' size; of the smaller one every row is kept
EVERY = 7
THINNED = (
    *("hs_a", "hs_b", "query", "attn_ctx", "pooled", "projected"),
    *("embeds", "logits", "final_hidden", "layer0_out"),
)

SIDE, PATCH, PATCHES = 378, 14, 27
CORNERS_AND_MIDDLE = (0, 26, 27, 364, 702, 728)
# of the picture that is stored in part: its size after the resize that comes first in "B" and its tiling (heights and
# rows first), and the pixels between tiles and those that neighbours share
PARTIAL, WORK, TILING, STRIDE, MARGIN = "1920x1080", (742, 1330), (3, 4), 266, 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arrays", type=Path, metavar="ARRAYS")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="default: beside this")
    options = parser.parse_args()
    for name in COPIED:
        shutil.copyfile(options.arrays / name, options.out / name)
    for name, thinned in (("tiny378_640x480", THINNED), ("tiny378_64x64", ())):
        arrays = load(options.arrays / f"{name}.npz")
        save_picture(arrays["image"], options.out / f"{name}.png")
        np.savez_compressed(options.out / f"{name}.npz", **stages(arrays, thinned))
    arrays = load(options.arrays / "improc.npz")
    for size in ("64x64", "640x480", PARTIAL):
        image = arrays[f"{size}/image"]
        if size == PARTIAL:
            image = image * pixels_read(arrays[f"{size}/B/patch_sel"], image.shape[:2])[:, :, None]
        save_picture(image, options.out / f"improc_{size}.png")
    np.savez_compressed(options.out / "improc.npz", **image_processing(arrays))


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)


def save_picture(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, optimize=True)


def levels(crops: np.ndarray) -> np.ndarray:
    """The pixels that crops are made of; crops that are not u / 255 * 2 - 1 of some pixels u are an error."""
    pixels = np.rint((crops + 1) / 2 * 255).astype(np.uint8)
    if not np.array_equal(pixels.astype(np.float32) / 255 * 2 - 1, crops):
        raise ValueError("crops: got values that are no 8-bit levels, expected u / 255 * 2 - 1")
    return pixels


def stages(arrays: Arrays, thinned: tuple[str, ...]) -> dict[str, np.ndarray]:
    """One case end to end: without its picture, crops as pixels, every `EVERY`-th row of the arrays `thinned`."""
    result = {}
    for name, array in arrays.items():
        if name == "crops":
            result["crops_uint8"] = levels(array)
        elif name in thinned:
            result[f"{name}@{EVERY}"] = array.reshape(-1, array.shape[-1])[::EVERY]
        elif name != "image":
            result[name] = array
    return result


def image_processing(arrays: Arrays) -> dict[str, np.ndarray]:
    """The image processor's outputs without the pictures. Whole crops are reduced: one that is of whole levels to its
    pixels, as thumbnail and tile are the same there, else to the patches of `SMALL_SELECTION`."""
    result = {}
    for name, array in arrays.items():
        prefix, leaf = name.rsplit("/", 1)
        if leaf == "image":
            continue
        if leaf != "crops":
            result[name] = array
        elif prefix.endswith("/A"):
            if not np.array_equal(array[0], array[1]):
                raise ValueError(f"{name}: got a tile that is not the thumbnail, expected the same pixels")
            result[f"{prefix}/thumbnail_levels"] = levels(array[0])
        else:
            result[f"{prefix}/patch_sel"] = SMALL_SELECTION
            result[f"{prefix}/patch_val"] = array[tuple(SMALL_SELECTION.T)]
    return result


SMALL_SELECTION = np.array(
    [(1, patch) for patch in range(0, PATCHES**2, 5)] + [(0, patch) for patch in CORNERS_AND_MIDDLE], np.int32
)
"""(crop, patch): every fifth of the tile and six of the thumbnail."""


def pixels_read(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which pixels [H, W] of a picture some (crop, patch) depend on, through both resizes, and one more around each."""
    mask = np.zeros(size, bool)
    canvas = [STRIDE * tiles + MARGIN for tiles in TILING]
    for crop, patch in patches:
        resized, start = (SIDE, SIDE), (0, 0)
        if crop:
            resized, start = canvas, tuple(STRIDE * index for index in divmod(crop - 1, TILING[1]))
        axes = []
        for axis, index in enumerate(divmod(patch, PATCHES)):
            wanted = start[axis] + PATCH * index + np.arange(PATCH)
            read = taps(taps(wanted, resized[axis], WORK[axis]), WORK[axis], size[axis])
            axes.append(np.unique(np.clip(read[:, None] + [-1, 0, 1], 0, size[axis] - 1)))
        mask[np.ix_(*axes)] = True
    return mask


def taps(wanted: np.ndarray, to: int, of: int) -> np.ndarray:
    """The samples of `of` that a bilinear resize with half-pixel centres reads for those `wanted` of `to`."""
    # (wanted + 1/2) * of / to - 1/2 in integers, so that a sample of weight 0 is not read
    numerator, denominator = np.maximum((2 * wanted + 1) * of - to, 0), 2 * to
    first = numerator // denominator
    second = first + (numerator % denominator > 0)
    return np.unique(np.minimum([first, second], of - 1))


if __name__ == "__main__":
    main()
