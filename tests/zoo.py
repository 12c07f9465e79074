"""The zoo: a folder of more than a hundred good, odd, damaged and hostile files, and the fate each must meet."""

from __future__ import annotations

import io
import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, features

SIDE = 24
Zoo = dict[str, tuple[str, str]]
"""File name as the report prints it -> (fate, a part of the reason)."""


def noise(seed: int, side: int = SIDE, channels: int = 3) -> np.ndarray:
    """A smooth colourful picture that differs for every seed: uint8 (side, side, channels)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return pixels if channels == 3 else pixels[..., 0]


def encode(image: Image.Image, format_name: str, **options: object) -> bytes:
    """The file a picture becomes."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from its parts, for what Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(values: np.ndarray) -> bytes:
    """A 16-bit PNG of uint16 (height, width) or (height, width, 3)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, 0 if values.ndim == 2 else 2, rows)


def huge_tiff() -> bytes:
    """A TIFF that claims 65,000 x 65,000 colour pixels."""
    tags = [(256, 4, 1, 65000), (257, 4, 1, 65000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 1), (278, 4, 1, 65000), (279, 4, 1, 4_225_000_000)]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


def swapped_profile() -> bytes:
    """The sRGB profile with red and green exchanged and another name."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    count = struct.unpack(">I", data[128:132])[0]
    table = bytearray(data)
    for place in range(132, 132 + 12 * count, 12):
        name = bytes(table[place : place + 4])
        table[place : place + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    return bytes(table)


def oriented(pixels: np.ndarray, orientation: int) -> bytes:
    """A PNG stored so that its EXIF orientation brings `pixels` upright."""
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)


def _good() -> dict[str, tuple[bytes, str, str]]:
    image = [Image.fromarray(noise(seed)) for seed in range(40)]
    clear = Image.fromarray(np.dstack([noise(40), noise(41, channels=1)]))
    files: dict[str, tuple[bytes, str, str]] = {}
    formats = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM", "avif": "AVIF"}
    for number, (ending, name) in enumerate(formats.items()):
        if name != "AVIF" or features.check("avif"):
            files[f"good.{ending}"] = (encode(image[number], name), "used", "")
            files[f"UPPER.{ending.upper()}"] = (encode(image[number + 8], name), "used", "")
    files |= {
        "good.gif": (encode(image[16], "GIF"), "changed", "palette"),
        "UPPER.JPEG": (encode(image[17], "JPEG", progressive=True), "used", ""),
        "grey.jpg": (encode(image[18].convert("L"), "JPEG"), "used", ""),
        "grey.png": (encode(image[19].convert("L"), "PNG"), "used", ""),
        "trailing.png": (encode(image[20], "PNG") + b"garbage" * 50, "used", ""),
        "jpeg-named.png": (encode(image[21], "JPEG"), "changed", "is a JPEG named .png"),
        "png-named.JPG": (encode(image[22], "PNG"), "changed", "is a PNG named .JPG"),
        "no-ending": (encode(image[23], "PNG"), "used", ""),
        "cmyk.jpg": (encode(image[24].convert("CMYK"), "JPEG"), "changed", "CMYK"),
        "cmyk.tif": (encode(image[25].convert("CMYK"), "TIFF"), "changed", "CMYK"),
        "lab.tif": (encode(_lab(image[26]), "TIFF"), "changed", "LAB"),
        "ycbcr.tif": (encode(image[27].convert("YCbCr"), "TIFF"), "changed", "YCbCr"),
        "palette.png": (encode(image[28].quantize(64), "PNG"), "changed", "palette"),
        "palette-clear.png": (encode(image[29].quantize(64), "PNG", transparency=3), "changed", "transparent"),
        "rgb-clear.png": (encode(image[30], "PNG", transparency=image[30].getpixel((0, 0))), "changed", "transparent"),
        "rgba.png": (encode(clear, "PNG"), "changed", "transparent"),
        "rgba.webp": (encode(clear, "WEBP", lossless=True), "changed", "transparent"),
        "grey-clear.png": (encode(clear.convert("LA"), "PNG"), "changed", "transparent"),
        "opaque.png": (encode(image[31].convert("RGBA"), "PNG"), "used", ""),
        "one-bit.png": (encode(image[32].convert("1"), "PNG"), "changed", "1 bit"),
        "deep-grey.png": (deep_png(noise(50, channels=1).astype(np.uint16) * 257), "changed", "16 bits"),
        "deep-color.png": (deep_png(noise(51).astype(np.uint16) * 257), "changed", "16 bits"),
        "deep.tif": (encode(Image.fromarray(noise(52, channels=1).astype(np.uint16) * 257), "TIFF"), "changed", "16"),
        "whole.tif": (encode(Image.fromarray(noise(53, channels=1).astype(np.int32) * 257), "TIFF"), "changed", "32"),
        "float.tif": (encode(Image.fromarray(noise(54, channels=1).astype(np.float32)), "TIFF"), "changed", "floating"),
        "profile.png": (encode(image[33], "PNG", icc_profile=swapped_profile()), "changed", "profile"),
        "profile-broken.png": (encode(image[34], "PNG", icc_profile=b"no profile at all" * 20), "used", ""),
        "exif-broken.jpg": (encode(image[35], "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), "used", ""),
        "wide.png": (encode(image[36].resize((48, 24)), "PNG"), "changed", "cropped"),
        "tall.jpg": (encode(image[37].resize((24, 60)), "JPEG"), "changed", "cropped"),
        "tiny.png": (encode(image[38].resize((5, 5)), "PNG"), "changed", "enlarged from 5 x 5"),
        "large.png": (encode(image[39].resize((200, 200)), "PNG"), "used", ""),
        "Grüße 雪.png": (encode(Image.fromarray(noise(60)), "PNG"), "used", ""),
        "n" * 251 + ".png": (encode(Image.fromarray(noise(61)), "PNG"), "used", ""),
    }
    animation = [Image.fromarray(noise(70 + seed)) for seed in range(3)]
    for ending, name in {"gif": "GIF", "webp": "WEBP", "png": "PNG", "tif": "TIFF"}.items():
        moving = encode(animation[0], name, save_all=True, append_images=animation[1:])
        files[f"several.{ending}"] = (moving, "changed", "first page" if name == "TIFF" else "first frame")
    phone = encode(Image.fromarray(noise(80)), "MPO", save_all=True, append_images=animation[:1])
    files["phone.jpg"] = (phone, "used", "")
    for orientation in range(1, 9):
        fate = ("used", "") if orientation == 1 else ("changed", "upright")
        files[f"turned-{orientation}.png"] = (oriented(noise(90), orientation), *fate)
    return files


def _lab(image: Image.Image) -> Image.Image:
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    result = ImageCms.applyTransform(image, transform)
    assert result is not None
    return result


def _bad() -> dict[str, tuple[bytes, str]]:
    rng = np.random.Generator(np.random.PCG64(7))
    static = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))  # pixels fill the file to its end
    files: dict[str, tuple[bytes, str]] = {}
    for format_name, ending in {"PNG": "png", "JPEG": "jpg"}.items():
        whole = encode(static, format_name)
        for part in range(20):
            reason = "empty file" if part == 0 else "damaged"
            files[f"cut-{part:02}.{ending}"] = (whole[: len(whole) * part // 20], reason)
    for format_name in ("WEBP", "BMP", "GIF", "TIFF", *(("AVIF",) if features.check("avif") else ())):
        whole = encode(static, format_name)
        files[f"half.{format_name.lower()}"] = (whole[: len(whole) // 2], "damaged")
    whole = encode(static, "PNG")
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(255 - value for value in whole[middle : middle + 20]) + whole[middle + 20 :]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("inside.png", whole)
    files |= {
        "flipped.png": (flipped, "checksum"),
        "head-only.png": (whole[:33], "damaged"),
        "magic-only.png": (b"\x89PNG\r\n\x1a\n", "damaged"),
        "empty.png": (b"", "empty file"),
        "text.png": (b"These are not the pixels you are looking for.\n" * 20, "text"),
        "readme.txt": ("Grüße\n".encode(), "text"),
        "BM.bmp": (b"BM is how this sentence begins, and so does a bitmap.", "not an image"),
        "nothing.bin": (bytes(range(256)) * 4, "something else"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        "drawing.svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        "paper.pdf": (b"%PDF-1.7\n", "PDF"),
        "layers.psd": (b"8BPS\0\x01" + bytes(40), "Photoshop"),
        "sensor.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        "film.mp4": (b"\0\0\0\x18ftypisom" + bytes(40), "video"),
        "icon.ico": (b"\0\0\1\0\1\0" + bytes(40), "icon"),
        "archive.jpg": (archive.getvalue(), "archive"),
        "one-pixel.png": (encode(static.crop((0, 0, 1, 1)), "PNG"), "only 1 x 1"),
        "thread.png": (encode(Image.new("1", (1, 30000)), "PNG"), "only 1 x 30000"),
        "ribbon.png": (encode(Image.new("L", (3000, 10)), "PNG"), "too long and thin"),
        "bomb.png": (png(20000, 20000, 8, 2, bytes(100)), "declares 20000 x 20000"),
        "bomb.tif": (huge_tiff(), "declares 65000 x 65000"),
        "bomb.gif": (b"GIF89a\xff\xff\xff\xff" + encode(static, "GIF")[10:], "declares 65535 x 65535"),
        "bomb.bmp": (b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 50000, 50000, 1, 24, *[0] * 6), "declares"),
        "text-bomb.png": (
            png(8, 8, 8, 0, bytes(72), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26)))),
            "damaged",
        ),
        ".DS_Store": (b"\0\0\0\1Bud1", "system file"),
        "Thumbs.db": (b"\xd0\xcf\x11\xe0", "system file"),
        "._good.png": (b"\0\5\x16\7", "system file"),
    }
    return files


def _special(folder: Path) -> Zoo:
    """What only a file system can hold."""
    expected: Zoo = {}
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "again").symlink_to(".", target_is_directory=True)
    (folder / "linked.png").symlink_to("good.png")
    os.mkfifo(folder / "pipe.png")
    (folder / ".git").mkdir()
    (folder / ".git" / "object.png").write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as end:
        here = Path.cwd()
        os.chdir(folder)  # a socket's whole path may have 108 bytes only
        end.bind("socket.png")
        os.chdir(here)
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(257 << 20)
    for name, printed in {
        b"caf\xe9.png": "caf\\xe9.png",
        b"line\nbreak\x1b[31m.png": "line\\nbreak\\x1b[31m.png",
    }.items():
        (folder / os.fsdecode(name)).write_bytes(encode(Image.fromarray(noise(len(name))), "PNG"))
        expected[printed] = ("used", "")
    if os.geteuid() == 0:
        os.mknod(folder / "device.png", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero never ends
        expected["device.png"] = ("skipped", "device")
    else:
        (folder / "secret.png").write_bytes(b"")
        (folder / "secret.png").chmod(0)
        expected["secret.png"] = ("skipped", "permission denied")
    return expected | {
        "dangling.png": ("skipped", "leads nowhere"),
        "circle.png": ("skipped", "circle"),
        "again": ("skipped", "already listed"),
        "linked.png": ("used", ""),
        "pipe.png": ("skipped", "named pipe"),
        "socket.png": ("skipped", "socket"),
        ".git": ("skipped", "system file"),
        "sparse.png": ("skipped", "larger than 256 MB"),
    }


def build(folder: Path, special: Callable[[Path], Zoo] = _special) -> Zoo:
    """Fill the folder; what must become of every file in it."""
    folder.mkdir(parents=True)
    expected: Zoo = {}
    for name, (content, fate, reason) in _good().items():
        (folder / name).write_bytes(content)
        expected[name] = (fate, reason)
    for name, (content, reason) in _bad().items():
        (folder / name).write_bytes(content)
        expected[name] = ("skipped", reason)
    return expected | special(folder)
