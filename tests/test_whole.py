# SPDX-License-Identifier: Apache-2.0

"""Files that lack a part of their picture although they have their full size, and files of several pictures."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from anomalib_stfpm_ext.data.images import check_file, read_image

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (120, 160, 3), np.uint8)
PICTURE = Image.fromarray(NOISE)
HALF_BLACK = Image.fromarray(np.concatenate([NOISE, np.zeros_like(NOISE)]))
PREVIEW = Image.fromarray(NOISE[:32, :32])


def encode(picture: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.copy().save(buffer, file_format, **options)  # a save leaves settings in it
    return buffer.getvalue()


def encode_tiff(compression: str, rows: int) -> bytes:
    """Make a TIFF whose directory is in front, as cameras do; with Pillow's at the end, a half has none."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, NOISE, photometric="rgb", compression=compression, rowsperstrip=rows)
    return buffer.getvalue()


def exif_with_preview() -> bytes:
    exif, preview = Image.Exif(), encode(PREVIEW, "JPEG")
    exif[0x010E] = "a camera's"
    return exif.tobytes() + preview  # where its end must not be taken for the picture's


FILES = {
    "baseline": encode(PICTURE, "JPEG", quality=95),
    "optimised": encode(PICTURE, "JPEG", optimize=True),
    "progressive": encode(PICTURE, "JPEG", progressive=True),
    "gray": encode(PICTURE.convert("L"), "JPEG", quality=95),
    "CMYK": encode(PICTURE.convert("CMYK"), "JPEG"),
    "restart markers": encode(PICTURE, "JPEG", restart_marker_blocks=4),
    "preview": encode(PICTURE, "JPEG", exif=exif_with_preview()),
    "half black": encode(HALF_BLACK, "JPEG", optimize=True),  # zeros belong to it
    "half black, progressive": encode(HALF_BLACK, "JPEG", progressive=True),
    "PNG": encode(PICTURE, "PNG"),
    "PNG of 16 bits": encode(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"),
    "PNG, palette": encode(PICTURE.convert("P"), "PNG"),
    **{
        f"TIFF, {name}, {rows}": encode_tiff(name, rows)
        for name in ("lzw", "zlib", "packbits", "jpeg")
        for rows in (16, 120)
    },
}


def is_accepted(content: bytes, path: Path) -> bool:
    """Tell whether a file is scored; what looks at it before training must not refuse what is."""
    path.write_bytes(content)
    try:
        read_image(path)
    except ValueError:
        return False
    check_file(path)
    return True


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_half_a_file_of_full_size_is_refused_and_what_is_appended_does_no_harm(content, tmp_path):
    path = tmp_path / "a.jpg"  # whatever its name says
    film = RNG.bytes(3000)
    for appendix in (b"", bytes(1000), b"\xff" * 1000, film, FILES["preview"], FILES["PNG"]):
        assert is_accepted(content + appendix, path)
    for percent in range(5, 100, 5):
        half = content[: len(content) * percent // 100]
        missing = len(content) - len(half)
        for fill in (b"\0", b"\xff", b""):
            assert not is_accepted(half + fill * missing, path)
            with pytest.raises(ValueError, match="data: wanted images that can be read"):
                check_file(path)


@pytest.mark.parametrize("name", ["baseline", "gray", "CMYK", "restart markers", "PNG", "PNG of 16 bits"])
def test_a_hole_is_found_where_the_format_can_tell(name, tmp_path):
    content = FILES[name]
    for percent in range(20, 80, 5):
        start = len(content) * percent // 100
        assert not is_accepted(content[:start] + bytes(400) + content[start + 400 :], tmp_path / "a.jpg")


def test_a_picture_all_of_one_value_is_whole(tmp_path):
    for value in (0, 128, 255):
        picture = Image.new("L", (640, 480), value)
        for options in ({}, {"optimize": True}, {"progressive": True}):
            assert is_accepted(encode(picture, "JPEG", **options), tmp_path / "a.jpg")
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", None):
            assert is_accepted(encode(picture, "TIFF", compression=compression), tmp_path / "a.tif")
        assert is_accepted(encode(picture.convert("RGB"), "WEBP", quality=100), tmp_path / "a.webp")


SEVERAL = {
    "TIFF": encode(PICTURE, "TIFF", save_all=True, append_images=[PREVIEW]),
    "PNG": encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(180)]),
    "GIF": encode(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
    "WebP": encode(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)]),
    "MPO": encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)]),
}


@pytest.mark.parametrize("content", SEVERAL.values(), ids=SEVERAL)
def test_several_pictures_in_a_file_are_refused(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    message = (
        r"got .*a\.png: ValueError: wanted one picture, got 2 \(pages or frames\): save them as files of their own"
    )
    for read in (read_image, check_file):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.png")


def test_previews_masks_and_smaller_copies_are_no_pictures_of_their_own(tmp_path):
    phone = encode(PICTURE, "MPO", save_all=True, append_images=[PREVIEW])
    edited = phone[: phone.index(b"\xff\xd9") + 2]  # the list of previews is left, the preview is not
    for content in (phone, edited):
        assert is_accepted(content, tmp_path / "a.jpg")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(NOISE, photometric="rgb", subifds=1)
        file.write(NOISE[::2, ::2], photometric="rgb", subfiletype=1)  # a tag's
        file.write(NOISE[::4, ::4], photometric="rgb", subfiletype=1)  # a page
        file.write(NOISE[..., 0] > 99, photometric="minisblack", subfiletype=4)  # a mask
    assert is_accepted((tmp_path / "a.tif").read_bytes(), tmp_path / "a.tif")
