# SPDX-License-Identifier: Apache-2.0

"""Whether a file holds one picture, and the whole of it.

Programs that copy may give a file its full size first. Decoders silently turn what is missing into gray or smooth
areas, so that half a picture would be scored. In JPEG, PNG and compressed TIFF it is found. In BMP, PNM, uncompressed
TIFF and lossy WebP it cannot be: zeros are values like others there.
"""

import re
from pathlib import Path
from struct import unpack_from
from zlib import crc32

from PIL import ExifTags, Image
from tifffile import TiffFile

_TAGS = ExifTags.Base  # TIFF's own
_PLACES = ((_TAGS.StripOffsets, _TAGS.StripByteCounts), (_TAGS.TileOffsets, _TAGS.TileByteCounts))
_FREE_ENDS = {1, 50001}  # uncompressed, WebP: their data may end with anything
_TAIL = 16
_EMPTY = (bytes(_TAIL), b"\xff" * _TAIL)  # unwritten data on disks, and on flash memory

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in compressed data, which hold FF 00 and FF D0 to D7 as well
_START, _END, _SCAN, _HUFFMAN, _SEQUENTIAL = 0xD8, 0xD9, 0xDA, 0xC4, (0xC0, 0xC1)
_HOLE = bytes(128)  # as data: -1 for all details of several blocks of pixels


def check_picture(picture: Image.Image, path: str | Path) -> None:
    """Check a file before its picture is decoded.

    Args:
        picture (Image.Image): The picture, as Pillow has opened it.
        path (str | Path): Its file.

    Raises:
        ValueError: If there are several pictures in it, or the picture lacks its end or has a hole.
    """
    count = _count(picture, path)
    if count > 1:
        msg = f"wanted one picture, got {count} (pages or frames): save them as files of their own"
        raise ValueError(msg)
    is_whole = True
    if picture.format in ("JPEG", "MPO"):
        is_whole = _jpeg_is_whole(Path(path).read_bytes())
    elif picture.format == "PNG":
        is_whole = _png_is_whole(Path(path).read_bytes())
    elif picture.format == "TIFF":
        is_whole = _tiff_is_whole(picture, path)
    if not is_whole:
        msg = "wanted the whole picture, got a file without its end, or with a hole: it may still be copied"
        raise ValueError(msg)


def _count(picture: Image.Image, path: str | Path) -> int:
    """Count the pictures in a file, but not their previews, masks and smaller copies."""
    if picture.format == "TIFF":
        with TiffFile(path) as file:  # Pillow stops counting at a page that it cannot read
            return 1 + sum(not (page.is_reduced or page.is_mask) for page in file.pages[1:])
    if picture.format == "MPO":
        return 1 + sum(_is_no_narrower(picture, frame) for frame in range(1, picture.n_frames))  # type: ignore[attr-defined]
    return getattr(picture, "n_frames", 1)


def _is_no_narrower(picture: Image.Image, frame: int) -> bool:
    """Tell whether a frame is as wide as the first: phones add previews and maps, stereo cameras the other eye."""
    width = picture.width
    try:
        picture.seek(frame)
    except Exception:  # some programs that edit a JPEG remove its previews, but not their list
        return False
    is_no_narrower = picture.width >= width
    picture.seek(0)
    return is_no_narrower


def _png_is_whole(content: bytes) -> bool:
    """Tell whether all critical chunks of a PNG fit their checksums, which Pillow does not check."""
    view, start = memoryview(content), 8
    while start + 12 <= len(content):
        length, kind = unpack_from(">I4s", content, start)
        end = start + 8 + length
        if not kind.isalpha():
            return False
        if kind[:1].isupper() and crc32(view[start + 4 : end]).to_bytes(4, "big") != view[end : end + 4]:
            return False
        if kind == b"IEND":
            return True
        start = end + 4
    return False


def _tiff_is_whole(picture: Image.Image, path: str | Path) -> bool:
    """Tell whether all compressed strips or tiles of a TIFF are in the file, and none ends in unwritten data."""
    tags = picture.tag_v2  # type: ignore[attr-defined]
    if tags.get(_TAGS.Compression, 1) in _FREE_ENDS:
        return True
    num_bytes = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        for starts, sizes in _PLACES:
            for start, size in zip(tags.get(starts, ()), tags.get(sizes, ()), strict=False):
                file.seek(max(start, start + size - _TAIL))
                if start + size > num_bytes or file.read(_TAIL) in _EMPTY:
                    return False
    return True


def _jpeg_is_whole(content: bytes) -> bool:
    """Tell whether a JPEG has its end where its compressed data end; previews in its header have ends of their own."""
    place, data, is_sequential = 2, None, False
    shortest: dict[int, int] = {}  # see _shortest_codes
    while found := _MARKER.search(content, place):
        code, place = content[found.end() - 1], found.end()
        if data is not None and content.find(_HOLE, data, found.start()) >= 0:
            return False
        if code == _END:
            return True
        if code < 0xC0 or code == _START:  # not of a segment
            return False
        size = int.from_bytes(content[place : place + 2], "big")
        segment, place, data = content[place + 2 : place + size], place + size, None
        if code in _SEQUENTIAL:
            is_sequential = True
        elif code == _HUFFMAN:
            shortest |= _shortest_codes(segment)
        elif code == _SCAN and is_sequential and any(shortest.get(table & 15) for table in segment[2:-3:2]):
            data = place
    return False


def _shortest_codes(segment: bytes) -> dict[int, int]:
    """Return, by Huffman table for details, the symbol of its shortest code, which is all zeros.

    Symbol 0 says that no more details of a block follow. Then plain areas are long runs of zeros, which are no hole.
    """
    codes, start = {}, 0
    while start < len(segment):
        num_codes = sum(segment[start + 1 : start + 17])
        if segment[start] & 16 and num_codes:  # for details, not for brightness
            codes[segment[start] & 15] = segment[start + 17]
        start += 17 + num_codes
    return codes
