"""Images in, plain 8-bit RGB out: files, bytes, PIL images and arrays, read as a person would see them.

What "as a person would see them" means is decided here once: rotation tags are applied, transparency is put
on white, 16-bit greys keep their full range, and anything that is not a whole, sane picture is refused.
"""

from __future__ import annotations

import io
import os
import threading
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from ._files import open_regular, reason

if TYPE_CHECKING:
    import torch

    ImageSource: TypeAlias = (
        str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray | torch.Tensor
    )

DEFAULT_MAX_PIXELS = 89_478_485
"""Most pixels read from a file: Pillow's own warning level, a quarter of a GiB at 24 bits a pixel."""

# four 32-bit channels, and what formats keep beside the pixels: decoders read parts of any size that a file claims
_MOST_BYTES_PER_PIXEL, _MOST_OTHER_BYTES = 16, 64 << 20

# pillow keeps its bomb limit in a module global, so only one thread at a time may lift it
_PILLOW_LIMIT_LOCK = threading.Lock()

# 16-bit greys to 8-bit, rounded to nearest: 0 -> 0, 65535 -> 255
_GREY16_TO_8 = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


class ImageError(ValueError):
    """An image that cannot be used; the message is one line that names the source and says why."""


def load_image(source: ImageSource, *, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Read one picture as 8-bit RGB.

    Files are decoded fully, so a truncated file fails here and not later. Of an animation the first frame
    is taken. EXIF rotation is applied. Transparency is composited over white. CMYK, palette, bilevel and
    greyscale pictures become RGB. 16-bit greys are divided by 257. For 32-bit integers and floats, which
    carry no range of their own, values within [0, 1] (floats), [0, 255] or [0, 65535] (integers) are taken to
    use that range; anything else is stretched from its minimum and maximum. NaN and minus infinity are black,
    infinity is white.

    Args:
        source: path, encoded bytes, binary file object, PIL image, or uint8 array or tensor of shape [H, W],
            [H, W, 1], [H, W, 3] or [H, W, 4] (RGBA).
        max_pixels: largest width * height accepted from a file or from encoded bytes, None for no limit.
            Pictures that are already in memory are not limited.

    Returns:
        A PIL image of mode "RGB" that shares nothing with ``source``.

    Raises:
        ImageError: missing, unreadable, empty, truncated, too large or not an image; array of a wrong shape.
        TypeError: a source of an unknown type, or an array that is not uint8.
    """
    if isinstance(source, Image.Image):
        # images still tied to a file hold no pixels yet: decoding them is where a bomb would go off
        limit = max_pixels if isinstance(source, ImageFile.ImageFile) else None
        name = getattr(source, "filename", None) or f"<PIL image of {_size(source)}>"
        return _decode(source, os.fsdecode(name), limit)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode_bytes(bytes(source), f"<{len(source)} bytes>", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _load_path(source, max_pixels)
    if hasattr(source, "__array__"):
        return Image.fromarray(_checked_array(source))
    if hasattr(source, "read"):
        data = source.read()
        if not isinstance(data, bytes):
            raise TypeError(f"image file object must be opened in binary mode, its read() gave {type(data).__name__}")
        return _decode_bytes(data, str(getattr(source, "name", "<file object>")), max_pixels)
    raise TypeError(
        f"image must be a path, bytes, a binary file object, a PIL image or a uint8 array, not {type(source).__name__}"
    )


def rgb_array(source: ImageSource, *, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Read one picture as an array.

    Takes and raises what :func:`load_image` does.

    Returns:
        uint8 [H, W, 3], C-contiguous and writable. An RGB array or CPU tensor that already is so is returned
        as it is, not copied.
    """
    if isinstance(source, (Image.Image, bytes, bytearray, memoryview)) or not hasattr(source, "__array__"):
        return np.array(load_image(source, max_pixels=max_pixels))
    return np.require(_checked_array(source), requirements=["C", "W"])


def _load_path(path: str | os.PathLike[str], max_pixels: int | None) -> Image.Image:
    name = os.fsdecode(path) or "''"
    if name.startswith(("http://", "https://")):
        raise ImageError(f"{name}: addresses are not fetched; download the image and give its path")
    try:
        stream = open_regular(path)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: cannot be read ({reason(error)})") from error
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if size == 0:
            raise ImageError(f"{name}: is empty (0 bytes)")
        if max_pixels is not None and size > _MOST_BYTES_PER_PIXEL * max_pixels + _MOST_OTHER_BYTES:
            raise ImageError(
                f"{name}: holds {size} bytes, more than a picture of {max_pixels} pixels takes; "
                "pass a larger max_pixels if you trust it"
            )
        return _decode(_open(stream, name, max_pixels), name, max_pixels)


def _decode_bytes(data: bytes, name: str, max_pixels: int | None) -> Image.Image:
    if not data:
        raise ImageError(f"{name}: is empty (0 bytes)")
    return _decode(_open(io.BytesIO(data), name, max_pixels), name, max_pixels)


def _open(stream: BinaryIO, name: str, max_pixels: int | None) -> Image.Image:
    """Read the header; Pillow's own limit stays in force unless the caller asked for more."""
    raised = max_pixels is None or max_pixels > DEFAULT_MAX_PIXELS
    try:
        return _open_unlimited(stream) if raised else Image.open(stream)
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: is not an image in a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: too large for the limit of {max_pixels} pixels ({reason(error)}); "
            "pass a larger max_pixels if you trust it"
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: cannot be decoded ({reason(error)})") from error


def _open_unlimited(stream: BinaryIO) -> Image.Image:
    with _PILLOW_LIMIT_LOCK:
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream)
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit


def _decode(image: Image.Image, name: str, max_pixels: int | None) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({_size(image)})")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(
            f"{name}: {_size(image)} is {width * height} pixels, over the limit of {max_pixels}; "
            "pass a larger max_pixels if you trust it"
        )
    try:
        # decoded before rotation is looked at: damaged pixels must not pass for a damaged tag
        image.load()
        return _to_rgb(_upright(image), image.format)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # decoders raise nearly anything on damaged data: OSError, SyntaxError, struct.error, IndexError, ...
        raise ImageError(f"{name}: cannot be decoded ({reason(error)})") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:
        # a damaged tag block says nothing about the pixels: viewers show such a picture unrotated
        return image


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey_to_8bit(np.asarray(image), image.mode, file_format))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        page = Image.new("RGB", layer.size, "white")
        page.paste(layer, mask=layer)
        return page
    return image.convert("RGB")


def _grey_to_8bit(values: np.ndarray, mode: str, file_format: str | None) -> np.ndarray:
    """Bring one-channel values [H, W] of more than 8 bits to uint8; rules in :func:`load_image`."""
    if mode.startswith("I;16"):
        return _GREY16_TO_8[values]
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ValueError("no pixel has a finite value")
    low, high = finite.min(), finite.max()
    if mode == "I":
        # pillow versions differ in whether 16-bit PNG and PGM come as "I;16" or "I"; both are full-range
        from_16_bit_file = file_format in ("PNG", "PPM")
        if low >= 0 and high <= 255 and not from_16_bit_file:
            return values.astype(np.uint8)
        if low >= 0 and high <= 65535:
            return _GREY16_TO_8[values]
    black, white = float(low), float(high) if high > low else float(low) + 1
    if mode == "F" and low >= 0 and high <= 255:
        black, white = 0.0, 1.0 if high <= 1 else 255.0
    values = np.nan_to_num(values.astype(np.float64), nan=black, posinf=white, neginf=black)
    return np.rint((values - black) * (255 / (white - black))).astype(np.uint8)


def _checked_array(source: Any) -> np.ndarray:
    """A uint8 [H, W, 3] view or copy of an array or tensor."""
    if hasattr(source, "detach"):
        # bfloat16 has no numpy counterpart: its name is all that the message below needs
        source = source.detach().cpu() if str(source.dtype) == "torch.uint8" else source
    else:
        source = np.asarray(source)
    if str(source.dtype) not in ("uint8", "torch.uint8"):
        raise TypeError(f"image array must be uint8 with values 0 to 255, got {source.dtype}")
    array = np.asarray(source)
    shape = tuple(array.shape)
    if array.size == 0:
        raise ImageError(f"image array has no pixels (shape {shape})")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        hint = "; channels come last" if len(shape) == 3 and shape[0] in (1, 3, 4) else ""
        raise ImageError(f"image array must have shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {shape}{hint}")
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 4:
        return np.asarray(_to_rgb(Image.fromarray(np.ascontiguousarray(array)), None))
    return array


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
