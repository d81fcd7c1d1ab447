"""From one picture to what jina-vlm reads: normalised patches, masks, target positions and a block of tokens.

The scheme is Molmo's overlap-and-resize (Deitke et al. 2024, section 2) with SigLIP patches, as in jina-vlm
(Koukounas et al. 2025, section 3). The geometry is :mod:`.tiling`'s; here is only the work on pixels and ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from ..._files import read_json_object, reason
from ...images import rgb_array
from .._shared.section import shown
from .tiling import (
    MAX_ID,
    MAX_PIXELS,
    Span,
    TilePlan,
    TilingGeometry,
    checked_int,
    plan_tiles,
)

if TYPE_CHECKING:
    import os

    from ...images import ImageSource

DROPPED = -10_000
"""Target position of a pooled window that becomes no token."""

CONFIG_FILE = "preprocessor_config.json"

# whatever the caller's default dtype and device are
_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}

# what the processor does, as preprocessor_config.json spells it; another value there would mean other pixels
_FIXED_SETTINGS: dict[str, Any] = {
    "cropping_method": "overlap-and-resize",
    "normalization_method": "minmax",
    "interpolation": "bilinear",
    "antialias": False,
    "random_interpolation": False,
    "preserve_aspect_ratio": False,
    "resize_in_float32": False,
    "use_column_tokens": True,
}


class ImageInputs(NamedTuple):
    """What the model needs of one picture. T crops (thumbnail first), N patches and M windows each, L tokens.

    Attributes:
        crops: float32 [T, N, P * P * 3], values in [-1, 1]. Patches row by row; in a patch pixels row by row,
            the RGB channel fastest.
        image_masks: float32 [T, N]. 1, except -1 for every patch of the last tile.
        image_input_idx: int64 [T, M]. For each pooled window, row by row, the position in ``tokens`` that its
            feature is added to; -10000 for windows that are dropped.
        tokens: int64 [L]. The block of ids that stands for the picture in the prompt.
    """

    crops: torch.Tensor
    image_masks: torch.Tensor
    image_input_idx: torch.Tensor
    tokens: torch.Tensor


class JinaVLMImageProcessor:
    """Cuts a picture into a thumbnail and overlapping tiles, and writes the tokens that stand for them.

    Args:
        do_resize: first bring the picture to whole patches and to an area between ``min_pixels`` and
            ``max_pixels``.
        max_crops: most tiles, the thumbnail not counted.
        patch_size: side of a patch, pixels.
        base_size: side of a crop, pixels.
        overlap_margins: patches shared with the tile before and the tile after.
        pooling: rows and columns of patches that are pooled into one token.
        min_pixels, max_pixels: limits of the area with ``do_resize``; without effect otherwise.
        im_start_token_id, im_end_token_id, im_patch_token_id, im_col_token_id: ids written into the block.
        image_token_id: the id that a prompt uses for "a picture goes here"; never part of the block.
        im_slice_token_id: reserved by the released vocabulary, not used.
        bos_token_id, eos_token_id: ids that open and end a text; kept here so that all ids are in one place.

    Raises:
        ValueError: an argument of a wrong type or value, named.
    """

    def __init__(
        self,
        do_resize: bool = False,
        max_crops: int = 12,
        *,
        patch_size: int = 14,
        base_size: int = 378,
        overlap_margins: Span = (4, 4),
        pooling: Span = (2, 2),
        min_pixels: int = 3136,
        max_pixels: int = 1_003_520,
        im_start_token_id: int = 151936,
        im_end_token_id: int = 151937,
        im_patch_token_id: int = 151938,
        im_col_token_id: int = 151939,
        image_token_id: int = 151940,
        im_slice_token_id: int = 151941,
        bos_token_id: int = 151643,
        eos_token_id: int = 151643,
    ) -> None:
        if not isinstance(do_resize, bool):
            raise ValueError(f"do_resize must be True or False, got {do_resize!r}")
        self.do_resize = do_resize
        self.geometry = TilingGeometry(patch_size, base_size, overlap_margins, pooling, max_crops)
        self.min_pixels = checked_int("min_pixels", min_pixels, 1, MAX_PIXELS)
        self.max_pixels = checked_int("max_pixels", max_pixels, self.min_pixels)
        self.im_start_token_id = checked_int("im_start_token_id", im_start_token_id, 0, MAX_ID)
        self.im_end_token_id = checked_int("im_end_token_id", im_end_token_id, 0, MAX_ID)
        self.im_patch_token_id = checked_int("im_patch_token_id", im_patch_token_id, 0, MAX_ID)
        self.im_col_token_id = checked_int("im_col_token_id", im_col_token_id, 0, MAX_ID)
        self.image_token_id = checked_int("image_token_id", image_token_id, 0, MAX_ID)
        self.im_slice_token_id = checked_int("im_slice_token_id", im_slice_token_id, 0, MAX_ID)
        self.bos_token_id = checked_int("bos_token_id", bos_token_id, 0, MAX_ID)
        self.eos_token_id = checked_int("eos_token_id", eos_token_id, 0, MAX_ID)
        ids = self.image_token_ids
        if len(set(ids)) < len(ids):
            raise ValueError(
                "im_start_token_id, im_end_token_id, im_patch_token_id, im_col_token_id, image_token_id and "
                f"im_slice_token_id must differ from each other, got {ids}"
            )

    @property
    def max_crops(self) -> int:
        """Most tiles a picture is cut into, the thumbnail not counted."""
        return self.geometry.max_crops

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """The six special ids: im_start, im_end, im_patch, im_col, image, im_slice."""
        return (
            self.im_start_token_id,
            self.im_end_token_id,
            self.im_patch_token_id,
            self.im_col_token_id,
            self.image_token_id,
            self.im_slice_token_id,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: Any) -> JinaVLMImageProcessor:
        """Build from the contents of a ``preprocessor_config.json``.

        Read are ``do_resize``, ``max_crops``, ``patch_size``, ``base_input_size``, ``overlap_margins``,
        ``pooling_h``, ``pooling_w``, ``min_pixels``, ``max_pixels`` and every keyword argument of this class
        by its own name. Absent or null keys keep their defaults. Keys that do not matter here, the image mean
        and standard deviation among them, are ignored.

        Args:
            config: the parsed file.
            **overrides: keyword arguments of this class that win over the file.

        Raises:
            ValueError: a value this class refuses, or a setting that asks for other pixel work than it does.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"config must be a mapping, got {type(config).__name__}")
        config = {key: value for key, value in config.items() if value is not None}
        for key, expected in _FIXED_SETTINGS.items():
            if config.get(key, expected) != expected:
                raise ValueError(f"{key} must be {expected!r}, the only one implemented, got {shown(config[key])}")
        own = cls.__init__.__kwdefaults__.keys() | {"do_resize", "max_crops"}
        arguments = {key: value for key, value in config.items() if key in own}
        if "base_input_size" in config:
            arguments["base_size"] = _square("base_input_size", config["base_input_size"])
        if "pooling_h" in config or "pooling_w" in config:
            arguments["pooling"] = (config.get("pooling_h", 2), config.get("pooling_w", 2))
        return cls(**{**arguments, **overrides})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **overrides: Any) -> JinaVLMImageProcessor:
        """Build from a checkpoint directory; the defaults hold where it has no ``preprocessor_config.json``.

        Raises:
            FileNotFoundError: no such directory.
            ValueError: the file is not a JSON object, or as for :meth:`from_dict`.
        """
        config = read_json(directory, CONFIG_FILE)
        with naming(directory, overrides):
            return cls.from_dict(config, **overrides)

    def plan(self, width: int, height: int) -> TilePlan:
        """The tiles of a ``width`` x ``height`` pixel picture, for counting or drawing; touches no pixels.

        Raises:
            ValueError: a side below 1, or one side more than 200 times the other.
        """
        return plan_tiles(
            width,
            height,
            self.geometry,
            do_resize=self.do_resize,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )

    def describe(self, width: int, height: int) -> dict[str, int | list[int]]:
        """The counts of a ``width`` x ``height`` pixel picture: what ``vlmkern tokens --json`` prints.

        Keys: width, height, tiling ([rows, cols]), crops, pooled_windows (of all crops), kept_windows,
        patch_tokens, total_tokens (the length of ``ImageInputs.tokens``; a prompt adds one BOS).

        Raises:
            ValueError: as for :meth:`plan`.
        """
        return self.plan(width, height).describe()

    def preprocess(self, image: ImageSource) -> ImageInputs:
        """Turn one picture into model inputs.

        Args:
            image: PIL image, uint8 array or tensor [H, W, 3], or anything else that
                :func:`vlmkern.images.load_image` takes.

        Returns:
            ImageInputs with T = 1 + tiles, positions relative to the picture's own block.

        Raises:
            ValueError: an unusable picture (:class:`vlmkern.images.ImageError`), or as for :meth:`plan`.
            TypeError: not a picture, or an array that is not uint8.
        """
        pixels = torch.from_numpy(rgb_array(image))
        plan = self.plan(width=pixels.shape[1], height=pixels.shape[0])
        masks = torch.ones(plan.crops, self.geometry.patches_per_crop, **_FLOATS)
        # the released model was trained with its mask rows one crop off: the row meant as batch padding falls
        # on the last tile, so that all its patches carry the connector's "partly padded" embedding
        masks[-1] = -1.0
        return ImageInputs(self._crops(pixels, plan), masks, self._positions(plan), self._tokens(plan))

    def _crops(self, pixels: torch.Tensor, plan: TilePlan) -> torch.Tensor:
        geometry = self.geometry
        if self.do_resize:
            # from here on in float, so that the second resize rounds no more
            (pixels,) = _resize(pixels, [(plan.work_height, plan.work_width)])
            pixels = pixels / 255
        base, canvas_size = (geometry.base_size,) * 2, (plan.canvas_height, plan.canvas_width)
        sizes = [base] if canvas_size == base else [base, canvas_size]
        resized = _resize(pixels, sizes)
        for picture in resized:
            if not self.do_resize:
                picture.div_(255)
            picture.mul_(2).sub_(1)
        thumbnail, canvas = resized[0], resized[-1]

        side, patch = geometry.patches_per_side, geometry.patch_size
        crops = torch.empty(plan.crops, side, side, patch, patch, 3, **_FLOATS)
        views = [thumbnail]
        for tile in plan.tiles():
            left, top, right, bottom = tile.canvas_box
            views.append(canvas[top:bottom, left:right])
        for crop, view in zip(crops, views, strict=True):
            # [H, W, 3] -> [side, patch, side, patch, 3] -> patches outside, pixels inside
            crop.copy_(view.unflatten(1, (side, patch)).unflatten(0, (side, patch)).transpose(1, 2))
        return crops.view(plan.crops, geometry.patches_per_crop, -1)

    def _positions(self, plan: TilePlan) -> torch.Tensor:
        rows, cols = self.geometry.window_grid
        # each row of a grid ends in a column token, and a start token comes before it
        thumbnail = torch.arange(rows * (cols + 1), device="cpu").view(rows, cols + 1)[:, :-1]
        grid_rows, grid_cols = plan.grid
        grid = torch.arange(grid_rows * (grid_cols + 1), device="cpu").view(grid_rows, grid_cols + 1)[:, :-1]

        positions = torch.full((plan.crops, rows, cols), DROPPED, device="cpu")
        positions[0] = thumbnail + 1
        for target, tile in zip(positions[1:], plan.tiles(), strict=True):
            (row, height), (col, width) = tile.kept_rows, tile.kept_cols
            kept = grid[tile.grid_row :, tile.grid_col :][:height, :width]
            target[row : row + height, col : col + width] = kept + self.geometry.thumbnail_tokens + 1
        return positions.flatten(1)

    def _tokens(self, plan: TilePlan) -> torch.Tensor:
        tokens: list[int] = []
        for rows, cols in (self.geometry.window_grid, plan.grid):
            tokens.append(self.im_start_token_id)
            tokens += ([self.im_patch_token_id] * cols + [self.im_col_token_id]) * rows
            tokens.append(self.im_end_token_id)
        return torch.tensor(tokens, device="cpu")


@contextmanager
def naming(directory: str | os.PathLike[str], overrides: Mapping[str, Any]) -> Iterator[None]:
    """Puts the name of a checkpoint's file in front of what is wrong with its values."""
    try:
        yield
    except ValueError as error:
        given = f" with {', '.join(overrides)} given" if overrides else ""
        raise ValueError(f"{Path(directory) / CONFIG_FILE}{given}: {error}") from None


def read_json(directory: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """The JSON object in a checkpoint's file, or {} where the file is absent.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: the file cannot be read, is no regular file, or holds no JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    path = directory / name
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {reason(error)}") from None


def _resize(image: torch.Tensor, sizes: Sequence[Span]) -> list[torch.Tensor]:
    """Resize [H, W, 3] to each (height, width): bilinear, half-pixel centres, no antialiasing.

    Returns:
        float32 [height, width, 3] each. A uint8 image gives whole levels 0 to 255, halves rounded to even;
        a float image in [0, 1] stays unrounded.
    """
    results = [torch.empty(*size, 3, **_FLOATS) for size in sizes]
    for channel in range(3):
        # one float plane at a time: a third of the memory, and bit for bit the same as all three at once
        plane = image[None, None, :, :, channel].float()
        for result in results:
            size = result.shape[:2]
            if size != plane.shape[2:]:
                result[:, :, channel] = F.interpolate(plane, size=tuple(size), mode="bilinear", align_corners=False)
            else:
                result[:, :, channel] = plane
    for result in results:
        if image.dtype == torch.uint8:
            result.round_().clamp_(0, 255)
        else:
            result.clamp_(0, 1)
    return results


def _square(name: str, value: object) -> object:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2 or value[0] != value[1]:
            raise ValueError(f"{name} must be one size or two equal ones, got {shown(value)}")
        return value[0]
    return value
