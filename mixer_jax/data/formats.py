"""What the contents of an image file say of themselves, and what is wrong with them."""

import codecs
import re
import struct
import zlib
from collections.abc import Iterable, Iterator

PNG = b"\x89PNG\r\n\x1a\n"

# How files begin that people take for images, and what to call them. The numbers are
# where in the file the bytes stand.
_KINDS = (
    (4, rb"ftyp(heic|heix|heim|hevc|mif1|msf1)", "a HEIC photograph; save it as JPEG"),
    (4, rb"ftypavi[fs]", "an AVIF image that OpenCV cannot read; save it as JPEG"),
    (4, rb"ftypcr", "a camera's raw photograph; save it as JPEG"),
    (4, rb"ftyp|moov|mdat", "a video"),
    (0, rb"\x1aE\xdf\xa3|RIFF....AVI |\x00\x00\x01[\xb3\xba]", "a video"),
    (
        0,
        rb"version https://git-lfs",
        "a Git LFS pointer; fetch the image: git lfs pull",
    ),
    (0, rb"(?i)\s*<(!doctype html|html|head|body|!--)", "a web page"),
    (0, rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", "an SVG drawing"),
    (0, rb"\s*<\?xml", "an XML text, such as a server's error"),
    (0, rb"PK[\x03\x05]\x04?", "a zip archive; unpack it"),
    (0, rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ", "an archive; unpack it"),
    (0, rb"%PDF", "a PDF"),
    (0, rb"8BPS", "a Photoshop file; save it as PNG"),
    (0, rb"\x00\x05\x16[\x00\x07]", "a file of macOS beside the image"),
    (0, rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL image; save it as JPEG"),
    (0, rb"II\+\x00|MM\x00\+", "a BigTIFF, which is not read; save it as PNG"),
    (0, rb"P7\s", "a PAM image, which is not read; save it as PNG"),
    (0, rb"P[Ff]\s", "a PFM image, which is not read; save it as PNG"),
    (0, rb"#\?R", "a Radiance HDR image, which is not read; save it as PNG"),
    (128, rb"DICM", "a DICOM file; save it as PNG"),
    (0, rb"\x93NUMPY", "a NumPy array; save it as PNG"),
    (0, rb"\x89HDF", "an HDF5 file"),
    (0, rb"\s*[{[]\s*[\"\[{]", "a JSON text"),
)


class ImageError(ValueError):
    """An image that cannot be read."""


def kind_of_file(data: bytes) -> str:
    """Says what a file is that is not an image, or how it begins."""
    for start, pattern, kind in _KINDS:
        if re.compile(pattern, re.DOTALL).match(data, start):
            return kind
    for whole, kind in (is_tiff, "TIFF"), (is_gif, "GIF"):
        if whole(data):
            return f"a {kind} that is cut off, damaged or of a kind that is not read"
    if not any(data[:1024]):
        return "damaged or not an image: the file begins with zeros"
    if text := describe_text(data[:64]):
        return f"damaged or not an image: {text}"
    return f"damaged or not an image: the file begins with {data[:8]!r}"


def describe_text(start: bytes) -> str | None:
    """Says how a UTF-8 text begins, from its first bytes; None if it is no text."""
    try:  # the last letter may be cut in two
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return None
    is_text = "".join(text.split()).isprintable()
    return f"a text that begins {text.strip()[:40]!r}" if is_text else None


def check_whole(data: bytes) -> None:
    """Finds files that are cut off, and broken parts of JPEG and PNG files.

    OpenCV does not say what is wrong, and accepts a JPEG whose end is overwritten. It
    refuses BMP, GIF and TIFF files that are cut off, which need no check here. The
    check costs 3 to 5 % of the time to decode a photograph (benchmarks/decode.py).
    Neither it nor OpenCV sees damage within the parts of a JPEG or WebP file.

    Args:
      data: a file's contents, of any format.

    Raises:
      ImageError: says what is missing.
    """
    if is_jpeg(data):
        whole_jpeg(data)
    elif is_png(data):
        _check_png(data)
    elif is_webp(data):
        length = 8 + int.from_bytes(data[4:8], "little")
        if len(data) < length:
            raise ImageError(f"the file is cut off: {len(data):,} of {length:,} bytes")


# In the compressed pixels of a JPEG, 00 or the number of a restart follows FF, and FF
# may be repeated. FF with any other byte is a marker: a segment begins or the image
# ends.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
SCAN = 0xDA  # before each part of the pixels
END = 0xD9

# Each takes time for all pixels, however short it is. Ten are usual; libtiff has the
# same limit.
MAX_SCANS = 100


Segments = Iterable[tuple[int, int]]  # see `jpeg_segments`


def whole_jpeg(data: bytes) -> list[tuple[int, int]]:
    """Returns what `jpeg_segments` gives, of a JPEG with at most MAX_SCANS scans.

    Raises:
      ImageError: there are more, or the JPEG is cut off or damaged.
    """
    segments = list(jpeg_segments(data))
    scans = sum(marker == SCAN for marker, _ in segments)
    if scans > MAX_SCANS:
        raise ImageError(f"the JPEG has {scans:,} scans; expected at most {MAX_SCANS}")
    return segments


def jpeg_segments(data: bytes) -> Segments:
    """Gives each segment's marker and where it ends: there, its length stands.

    The last one is END, behind which other data may follow.

    Raises:
      ImageError: the JPEG is cut off or damaged.
    """
    position = 2
    while match := _JPEG_MARKER.search(data, position):
        marker = match[0][1]
        if marker < 0xC0:  # 01..BF are not in use
            raise ImageError(f"the JPEG is damaged at byte {match.start():,}")
        yield marker, match.end()
        if marker == END:
            return
        length = int.from_bytes(data[match.end() : match.end() + 2], "big")
        position = match.end() + length
    raise ImageError("the JPEG is cut off or damaged: it has no end-of-image marker")


def _check_png(data: bytes) -> None:
    """Compares the checksums of all parts without which there is no image."""
    if data[12:16] != b"IHDR":
        raise ImageError("the PNG is damaged: it has no header")
    for name, start, end in png_chunks(data):
        checksum = int.from_bytes(data[end : end + 4], "big")
        # The names of such parts begin with a capital letter.
        if name[:1].isupper() and zlib.crc32(data[start - 4 : end]) != checksum:
            raise ImageError(
                f"the PNG is damaged between bytes {start - 8:,} and {end:,}"
            )


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Gives the name of each part of a PNG, and where its contents start and end."""
    name, end = b"", len(PNG) - 4
    while name != b"IEND":
        start = end + 12  # a checksum, a length and a name, of 4 bytes each
        name = data[start - 4 : start]
        end = start + int.from_bytes(data[start - 8 : start - 4], "big")
        if end + 4 > len(data):
            raise ImageError("the PNG is cut off or damaged: it has no end chunk")
        yield name, start, end


def is_png(data: bytes) -> bool:
    """Returns whether a file is a PNG."""
    return data.startswith(PNG)


def is_jpeg(data: bytes) -> bool:
    """Returns whether a file is a JPEG."""
    return data.startswith(b"\xff\xd8")


def is_tiff(data: bytes) -> bool:
    """Returns whether a file is a TIFF, and no BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*")


def is_gif(data: bytes) -> bool:
    """Returns whether a file is a GIF."""
    return data[:6] in (b"GIF87a", b"GIF89a")


def is_webp(data: bytes) -> bool:
    """Returns whether a file is a WebP."""
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def tiff_pages(data: bytes) -> list[dict[int, tuple[int, ...]]]:
    """Returns the tags of each image of a TIFF file, or of an EXIF block.

    Only numbers without a sign or fraction are read. What is damaged is left out.
    """
    order = "<" if data[:2] == b"II" else ">"
    formats = {1: "B", 3: "H", 4: "I"}  # types of TIFF: BYTE, SHORT, LONG
    pages: list[dict[int, tuple[int, ...]]] = []
    seen, num_entries = {0}, 0
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        # Pages that share bytes, which could be read for hours, end the list.
        while start not in seen and 12 * num_entries <= len(data):
            seen.add(start)
            tags: dict[int, tuple[int, ...]] = {}
            known = set()
            (count,) = struct.unpack_from(f"{order}H", data, start)
            num_entries += count
            for entry in range(start + 2, start + 2 + 12 * count, 12):
                tag, kind, length = struct.unpack_from(f"{order}HHI", data, entry)
                # Of a tag that is there twice libtiff takes the first.
                twice = tag in known
                known.add(tag)
                if twice or kind not in formats or not 0 < length <= 64:
                    continue
                form = f"{order}{length}{formats[kind]}"
                where = entry + 8
                if struct.calcsize(form) > 4:
                    (where,) = struct.unpack_from(f"{order}I", data, where)
                tags[tag] = struct.unpack_from(form, data, where)
            pages.append(tags)
            (start,) = struct.unpack_from(f"{order}I", data, start + 2 + 12 * count)
    except struct.error:  # it points behind the end of the file
        pass
    return pages


def num_frames(data: bytes) -> int:
    """Returns how many images a GIF, TIFF, WebP or PNG file holds, as it says."""
    if is_png(data):
        counts = (data[x : x + 4] for name, x, _ in png_chunks(data) if name == b"acTL")
        return int.from_bytes(next(counts, b"\1"), "big")
    if is_tiff(data):
        # Thumbnails and masks of an image are no images of their own.
        return sum(not page.get(254, (0,))[0] & 5 for page in tiff_pages(data))
    if is_webp(data):
        return max(sum(name == b"ANMF" for name, _, _ in riff_chunks(data)), 1)
    return _num_gif_frames(data) if is_gif(data) else 1


def _num_gif_frames(data: bytes) -> int:
    """Goes from block to block of a GIF, over the pixels."""

    def table(flags: int) -> int:
        return 3 * 2 ** (1 + (flags & 7)) if flags & 0x80 else 0

    if len(data) < 13:
        return 1
    frames, position = 0, 13 + table(data[10])
    while position + 10 < len(data) and data[position] in (0x2C, 0x21):
        if data[position] == 0x2C:  # an image: its size, colours, and code size
            frames += 1
            position += 11 + table(data[position + 9])
        else:  # an extension
            position += 2
        while position < len(data) and data[position]:
            position += data[position] + 1
        position += 1
    return frames


def riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Gives the name of each part of a WebP, and where its contents start and end."""
    position = 12
    while position + 8 <= len(data):
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        yield data[position : position + 4], position + 8, position + 8 + length
        position += 8 + length + length % 2


def orientation(data: bytes, segments: Segments = ()) -> int:
    """Returns the EXIF orientation of JPEG, PNG and WebP, from 1 to 8; 1 is upright.

    Another number, which some programs write, has no meaning and is taken for 1.

    Args:
      data: the file's contents.
      segments: of a JPEG.
    """
    start = b"Exif\0\0"
    if is_jpeg(data):
        blocks = (
            data[x + 2 : x + int.from_bytes(data[x : x + 2], "big")]
            for marker, x in segments
            if marker == 0xE1 and data.startswith(start, x + 2)
        )
    else:
        chunks = png_chunks(data) if is_png(data) else riff_chunks(data)
        blocks = (data[x:y] for name, x, y in chunks if name in (b"eXIf", b"EXIF"))
    if (block := next(blocks, None)) is None:
        return 1
    pages = tiff_pages(block.removeprefix(start))
    turn = pages[0].get(274, (1,))[0] if pages else 1
    return turn if turn in range(1, 9) else 1


def significant_bits(data: bytes) -> int | None:
    """Returns how many of 16 bits a file says that it uses; None if it does not say.

    A PNG says it in the chunk sBIT, a TIFF by the highest value of a sample.
    """
    if is_png(data):
        bits = png_chunk(data, b"sBIT")
        colours = 3 if data[25] & 2 else 1
        return max(bits[:colours], default=None)
    page = tiff_pages(data)[0]
    highest = page.get(341) or page.get(281)
    return max(highest).bit_length() if highest else None


def has_transparency(data: bytes) -> bool:
    """Returns whether a PNG, WebP, GIF or TIFF may have transparent pixels."""
    if is_png(data):
        has_alpha = data[25] in (4, 6)  # grey with alpha, RGB with alpha
        return has_alpha or bool(png_chunk(data, b"tRNS"))
    if is_tiff(data):
        return any(page.get(338, (0,))[0] for page in tiff_pages(data)[:1])
    if data[8:15] == b"WEBPVP8":  # followed by X, extended, or L, lossless
        flags = {b"X": data[20:21], b"L": data[24:25]}.get(data[15:16])
        return bool(flags and flags[0] & 0x10)
    return is_gif(data)


def png_chunk(data: bytes, wanted: bytes) -> bytes:
    """Returns the contents of a PNG's chunk, of those that come before the pixels."""
    for name, start, end in png_chunks(data):
        if name == wanted:
            return data[start:end]
        if name == b"IDAT":
            break
    return b""
