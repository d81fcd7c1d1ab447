"""Reading images: every mode looks as it should, every bad input is one clear error."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmkern.images import DEFAULT_MAX_PIXELS, ImageError, load_image, rgb_array

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (9, 14, 3), dtype=np.uint8))


def encoded(image, file_format, **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def pixel(image, x=0, y=0):
    return load_image(image).getpixel((x, y))


def png_header(width, height):
    """A PNG that declares a size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_picture(picture, tmp_path):
    data = encoded(picture, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    array = np.array(picture)
    with open(path, "rb") as stream, Image.open(path) as opened:
        sources = [path, str(path), data, bytearray(data), memoryview(data), stream, io.BytesIO(data), opened]
        sources += [picture, array, torch.from_numpy(array)]
        for source in sources:
            image = load_image(source)
            assert image.mode == "RGB" and np.array_equal(image, array), type(source)
            image.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(picture, array)


def test_rgb_array_is_writable_and_copies_only_if_it_must(picture):
    array = np.array(picture)
    assert rgb_array(array) is array
    frozen = array.copy()
    frozen.flags.writeable = False
    for source in (picture, frozen, array[::-1], array.transpose(1, 0, 2), torch.from_numpy(array)):
        result = rgb_array(source)
        assert result.dtype == np.uint8 and result.flags.c_contiguous and result.flags.writeable
        assert np.array_equal(result, np.asarray(source))


def test_bilevel_palette_and_colour_spaces(picture):
    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert pixel(palette) == (40, 50, 60)
    assert pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)
    assert pixel(encoded(Image.new("CMYK", (16, 16), (255, 0, 255, 0)), "JPEG")) == pytest.approx((0, 255, 0), abs=3)
    assert pixel(Image.new("YCbCr", (2, 2), (128, 128, 128))) == (128, 128, 128)
    assert pixel(Image.new("L", (2, 2), 77)) == (77, 77, 77)


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (200, 100, 0, 51)), ("LA", (200, 51)), ("RGBA", (9, 9, 9, 0))])
def test_transparency_shows_white_paper(mode, colour):
    *channels, alpha = colour
    expected = [round(value * alpha / 255 + 255 * (255 - alpha) / 255) for value in channels]
    image = Image.new(mode, (3, 3), colour)
    assert pixel(image) == pytest.approx(tuple(expected if len(expected) == 3 else expected * 3), abs=1)
    assert pixel(encoded(image, "PNG")) == pixel(image)


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for file_format in ("PNG", "GIF"):
        data = encoded(image, file_format, transparency=0)
        assert pixel(data) == (255, 255, 255) and pixel(data, x=1) == (40, 50, 60)


def test_premultiplied_alpha():
    assert pixel(Image.new("RGBA", (2, 2), (200, 100, 0, 51)).convert("RGBa")) == pytest.approx((244, 224, 204), abs=2)
    assert pixel(Image.new("LA", (2, 2), (200, 51)).convert("La")) == pytest.approx((244, 244, 244), abs=2)


@pytest.mark.parametrize(("level", "expected"), [(0, 0), (257, 1), (32768, 128), (65278, 254), (65535, 255)])
def test_16_bit_grey_is_scaled_not_clipped(level, expected):
    image = Image.fromarray(np.full((4, 5), level, dtype=np.uint16))
    assert image.mode == "I;16"
    for source in (image, encoded(image, "PNG"), encoded(image, "TIFF")):
        assert pixel(source) == (expected,) * 3


def test_dark_16_bit_files_stay_dark_whatever_mode_pillow_gives_them():
    levels = np.array([[0, 255]], dtype=np.uint16)
    for data in (encoded(Image.fromarray(levels), "PNG"), b"P5 2 1 65535\n" + levels.astype(">u2").tobytes()):
        assert np.asarray(load_image(data)).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 200], [0, 200]),
        ([0, 65535], [0, 255]),
        ([257, 32768], [1, 128]),
        ([-100, 100], [0, 255]),
        ([0, 1_000_000], [0, 255]),
        ([-7, -7], [0, 0]),
    ],
)
def test_32_bit_integers(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert image.mode == "I"
    assert np.asarray(load_image(image))[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 500.0, 1000.0], [0, 128, 255]),
        ([0.5, np.nan, -np.inf], [128, 0, 0]),
        ([0.0, 0.5, np.inf], [0, 128, 255]),
    ],
)
def test_floats(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F"
    assert np.asarray(load_image(image))[0, :, 2].tolist() == expected


def test_floats_that_are_all_nan_are_refused():
    with pytest.raises(ImageError, match="finite"):
        load_image(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(picture, orientation, file_format):
    tag = Image.Exif()
    tag[0x0112] = orientation
    stored = picture.transpose(TRANSPOSES[orientation]) if orientation > 1 else picture
    loaded = load_image(encoded(stored, file_format, exif=tag, lossless=True))
    assert np.array_equal(loaded, picture)
    assert np.array_equal(load_image(loaded), picture)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_spoil_the_picture(picture):
    data = encoded(picture, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert load_image(data).size == picture.size


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(file_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True)
    assert pixel(data) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_refused(picture, file_format, tmp_path):
    data = encoded(picture.resize((64, 64)), file_format)
    assert load_image(data).size == (64, 64)
    path = tmp_path / "broken.bin"
    for length in (len(data) // 2, len(data) // 4, 30):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=r"broken\.bin: [^\n]+$"):
            load_image(path)


def test_unusable_paths_are_named(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.png").write_text("not a picture")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "missing.png": "no such file",
        "empty.png": "0 bytes",
        "notes.png": "not an image",
        "folder": "directory",
        "pipe": "not a regular file",
        "notes.png/inside": "cannot be read",
        "nul\0byte": "cannot be read",
    }
    for name, reason in cases.items():
        with pytest.raises(ImageError) as caught:
            load_image(tmp_path / name)
        message = str(caught.value)
        assert name in message and reason in message and "\n" not in message


def test_a_truncated_file_with_a_rotation_is_refused_too(picture):
    tag = Image.Exif()
    tag[0x0112] = 6
    for file_format in ("JPEG", "TIFF"):
        data = encoded(picture.resize((64, 64)), file_format, exif=tag)
        with pytest.raises(ImageError, match="truncated"):
            load_image(data[:-200])


def test_addresses_are_not_taken_for_paths():
    with pytest.raises(ImageError, match="not fetched"):
        load_image("https://example.com/picture.png")


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"not a picture", "not an image")])
def test_unusable_bytes(data, reason):
    for source in (data, io.BytesIO(data)):
        with pytest.raises(ImageError, match=reason):
            load_image(source)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_bombs_are_refused_with_size_and_limit(side, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    assert side * side > DEFAULT_MAX_PIXELS
    with pytest.raises(ImageError) as caught:
        load_image(path)
    message = str(caught.value)
    assert all(text in message for text in ("bomb.png", str(side * side), str(DEFAULT_MAX_PIXELS), "max_pixels"))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_warning_turned_into_an_error_is_still_an_image_error():
    with pytest.raises(ImageError, match="100000000"):
        load_image(png_header(10_000, 10_000))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("max_pixels", [DEFAULT_MAX_PIXELS + 1, None])
def test_a_raised_limit_wins_over_pillows_own(picture, monkeypatch, max_pixels):
    for pillow_limit in (50, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
        data = encoded(picture, "PNG")
        with pytest.raises(ImageError, match="126 pixels"):
            load_image(data)
        assert load_image(data, max_pixels=max_pixels).size == picture.size
        assert pillow_limit == Image.MAX_IMAGE_PIXELS


def test_max_pixels_is_exact_and_only_for_encoded_images(picture):
    data = encoded(picture, "PNG")
    assert load_image(data, max_pixels=126).size == (14, 9)
    with pytest.raises(ImageError, match=r"14x9 is 126 pixels, over the limit of 125"):
        load_image(data, max_pixels=125)
    with pytest.raises(ImageError, match="limit"):
        load_image(Image.open(io.BytesIO(data)), max_pixels=125)
    assert load_image(load_image(data), max_pixels=125).size == (14, 9)
    assert load_image(np.array(picture), max_pixels=125).size == (14, 9)


def test_array_shapes(picture):
    array = np.array(picture)
    grey = array[:, :, 0]
    for source in (grey, grey[:, :, None]):
        assert np.array_equal(load_image(source), np.stack([grey] * 3, axis=2))
    opaque = np.dstack([array, np.full_like(grey, 255)])
    assert np.array_equal(load_image(opaque), array)
    assert np.array_equal(load_image(np.dstack([array, np.zeros_like(grey)])), np.full_like(array, 255))


@pytest.mark.parametrize("shape", [(4,), (5, 5, 2), (2, 5, 5, 3), (5, 5, 5), (0, 4, 3), (4, 0, 3), (4, 0)])
def test_array_shapes_that_are_no_image(shape):
    for source in (np.zeros(shape, np.uint8), torch.zeros(shape, dtype=torch.uint8)):
        with pytest.raises(ImageError, match=r"\(" + ", ".join(map(str, shape))):
            rgb_array(source)


def test_channels_first_gets_a_hint():
    with pytest.raises(ImageError, match="channels come last"):
        load_image(np.zeros((3, 8, 9), np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "int8", "uint16"])
def test_array_dtypes(dtype):
    with pytest.raises(TypeError, match=f"uint8.*{dtype}"):
        rgb_array(np.zeros((4, 4, 3), dtype))
    with pytest.raises(TypeError, match=f"uint8.*{dtype}"):
        rgb_array(torch.zeros(4, 4, 3, dtype=getattr(torch, dtype)))


def test_bfloat16_tensors_get_the_same_message():
    with pytest.raises(TypeError, match="bfloat16"):
        load_image(torch.zeros(4, 4, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("source", [None, 3, object(), io.StringIO("text"), ["a", "list"]])
def test_other_types_are_refused(source):
    with pytest.raises(TypeError):
        load_image(source)


def test_empty_pil_images_are_refused():
    with pytest.raises(ImageError, match="0x5"):
        load_image(Image.new("RGB", (0, 5)))


def test_fixture_images_are_readable():
    for path in sorted((Path(__file__).parent / "data").glob("improc_*.png")):
        assert "{}x{}".format(*load_image(path).size) in path.name


def test_files_larger_than_the_picture_they_may_hold_are_not_read(picture, tmp_path):
    path = tmp_path / "long.png"
    path.write_bytes(encoded(picture, "PNG"))
    with path.open("r+b") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ImageError, match=r"long\.png: holds 1099511627776 bytes, more than a picture of 126"):
        load_image(path, max_pixels=126)
    assert load_image(path, max_pixels=None).size == picture.size


def test_links_to_devices_are_refused(tmp_path):
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(ImageError, match=r"zero\.png: cannot be read \(is not a regular file\)"):
        load_image(tmp_path / "zero.png")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX"])
def test_mutated_files(picture, file_format, tmp_path):
    """Bytes of a good file changed at random: a picture, or one line that names the file."""
    data = encoded(picture.resize((40, 30)), file_format)
    rng, path = np.random.default_rng(1), tmp_path / "mutated.bin"
    for case in range(60):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 5)):
            # most of what can go wrong is said in the first bytes
            damaged[rng.integers(min(len(data), 64) if case % 2 else len(data))] = rng.choice([0, 1, 127, 128, 255])
        path.write_bytes(damaged[: len(damaged) if case % 3 else rng.integers(1, len(damaged))])
        try:
            assert load_image(path).mode == "RGB"
        except ImageError as error:
            assert "mutated.bin: " in str(error) and "\n" not in str(error)
