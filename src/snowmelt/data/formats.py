"""What a file is, by its first bytes and not by its name; and words for what is not read."""

from __future__ import annotations

import re

from snowmelt.data.source import Unusable
from snowmelt.files import printable

HEAD_BYTES = 4096

# format: (how its first bytes look, endings)
FORMATS: dict[str, tuple[re.Pattern[bytes], tuple[str, ...]]] = {
    "PNG": (re.compile(rb"\x89PNG"), ("png", "apng")),
    "JPEG": (re.compile(rb"\xff\xd8\xff"), ("jpg", "jpeg", "jpe", "jfif", "mpo")),
    "WEBP": (re.compile(rb"RIFF....WEBP", re.DOTALL), ("webp",)),
    "BMP": (re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0", re.DOTALL), ("bmp", "dib")),
    "GIF": (re.compile(rb"GIF8"), ("gif",)),
    "TIFF": (re.compile(rb"II[*+]\0|MM\0[*+]"), ("tif", "tiff")),
    "AVIF": (re.compile(rb"....ftyp(?:avif|avis|(?:mif1|msf1).{0,60}avi[fs])", re.DOTALL), ("avif", "avifs")),
    "PPM": (re.compile(rb"P[1-6]\s"), ("ppm", "pgm", "pbm", "pnm")),
}

# Not read: vector drawings, documents, layered and scientific files need other programs or more trust.
FOREIGN: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"\s*<svg|\s*<\?xml.*<svg", re.DOTALL | re.IGNORECASE), "an SVG drawing"),
    (re.compile(rb"\s*<(!doctype )?html", re.IGNORECASE), "a web page"),
    (re.compile(rb"8BPS"), "a Photoshop file"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "a PostScript drawing"),
    (re.compile(rb"%PDF"), "a PDF document"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 picture"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL picture"),
    (re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL), "a HEIC picture"),
    (re.compile(rb"....ftyp", re.DOTALL), "a video"),
    (re.compile(rb"\x00\x00\x01\x00"), "an icon file"),
    (re.compile(rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!"), "an archive"),
)


def recognise(head: bytes) -> str:
    """The format of a file by its first bytes; `Unusable` unless it is one that is read."""
    if not head:
        raise Unusable("empty file")
    for name, (pattern, _) in FORMATS.items():
        if pattern.match(head):
            return name
    for pattern, words in FOREIGN:
        if pattern.match(head):
            raise Unusable(f"{words}, which is not read; save it as PNG or JPEG to use it")
    kind = "text" if _is_text(head) else "something else"
    raise Unusable(f"not an image (its content is {kind}, not PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF)")


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-8", "ignore")
    return len(text.encode()) > len(head) - 4 and not re.search(r"[\0-\x08\x0e-\x1f]", text)


def misnamed(name: str, format_name: str) -> str:
    """`is a JPEG named .png` where the ending claims another format, otherwise empty."""
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    if not dot or ending.lower() in FORMATS[format_name][1]:
        return ""
    return f"is a {format_name} named .{printable(ending)}"
