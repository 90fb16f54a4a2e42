"""Image files of every kind: read as plain upright RGB, or refused in one sentence that names the file."""

import struct
import zlib

import pytest
from PIL import Image

from bsfa_cli.data.multimodal import images
from bsfa_cli.errors import InputError


def saved(folder, name, image, **options):
    image.save(folder / name, **options)
    return folder / name


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGB", (200, 30, 10), (200, 30, 10)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 30, 10, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 256 * 77, (77, 77, 77)),
    ],
)
def test_modes(mode, colour, expected, tmp_path):
    found = images.read(saved(tmp_path, "x.png", Image.new(mode, (5, 3), colour)))
    assert (found.mode, found.size, found.getpixel((0, 0))) == ("RGB", (5, 3), expected)


def test_palettes_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 200, 30, 10])
    assert images.read(saved(tmp_path, "opaque.png", image)).getpixel((0, 0)) == (200, 30, 10)
    assert images.read(saved(tmp_path, "clear.png", image, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_orientation_and_wrong_extensions(tmp_path):
    cmyk = images.read(saved(tmp_path, "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0))))
    red, green, blue = cmyk.getpixel((4, 4))
    assert red > 200 > 60 > max(green, blue)
    sideways = Image.new("RGB", (6, 3), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert images.read(saved(tmp_path, "turned.jpg", sideways, exif=exif)).size == (3, 6)
    for name, kind in {"a.jpg": "PNG", "b.png": "JPEG", "noextension": "WEBP", "c.txt": "BMP", "d.gif": "TIFF"}.items():
        assert images.read(saved(tmp_path, name, sideways, format=kind)).size == (6, 3)


def test_a_cameras_second_picture_is_left_alone(tmp_path):
    first, second = Image.new("RGB", (6, 3), "red"), Image.new("RGB", (6, 3), "blue")
    path = saved(tmp_path, "x.jpg", first, format="MPO", save_all=True, append_images=[second])
    assert images.read(path).getpixel((2, 1))[0] > 200


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_images_are_refused(kind, tmp_path):
    frames = [Image.new("RGB", (6, 3), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, f"x.{kind.lower()}", frames[0], format=kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="is animated or has several pages"):
        images.read(path)


def test_pixel_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "bomb.png"
    for width, height in ((9000, 9000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)):
        path.write_bytes(png(width, height))
        with pytest.raises(InputError, match="pixels; at most 67,108,864 are read"):
            images.read(path)


def broken(folder) -> dict[str, tuple[bytes, str]]:
    noise = Image.effect_noise((64, 64), 90)
    jpeg, whole = saved(folder, "a.jpg", noise).read_bytes(), saved(folder, "a.png", noise).read_bytes()
    webp, tiff = saved(folder, "a.webp", noise).read_bytes(), saved(folder, "a.tiff", noise).read_bytes()
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 3_000_000, 9))
    return {
        "empty": (b"", "is none of JPEG"),
        "text": (b"hello", "is none of JPEG"),
        "html": (b"<html>404</html>", "is none of JPEG"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "header.jpg": (jpeg[:20], ""),
        "truncated.png": (whole[: len(whole) // 2], ""),
        "truncated.webp": (webp[: len(webp) // 2], ""),
        "truncated.tiff": (tiff[: len(tiff) // 2], ""),
        "corrupt.png": (whole[:60] + bytes(40) + whole[100:], ""),
        "text bomb.png": (png(4, 4, bytes(52), text), ""),
        "no pixels.png": (png(0, 0), ""),
        "short.png": (png(64, 64, b"\0\1"), ""),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "is none of JPEG"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n%%EOF", "is none of JPEG"),
        "pdf": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj", "is none of JPEG"),
    }


def test_broken_files_get_a_sentence(tmp_path):
    for name, (content, words) in broken(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError) as refused:
            images.read(path)
        said = str(refused.value)
        assert str(path) in said and words in said and "\n" not in said and len(said) < 400, (name, said)


def test_pixels_of_an_unknown_range(tmp_path):
    with pytest.raises(InputError, match="32-bit pixels"):
        images.read(saved(tmp_path, "x.tiff", Image.new("F", (4, 4), 0.5)))
