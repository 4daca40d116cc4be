"""Images are found only in their folder, checked before a run, and decoded when a batch is
collated."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from xtuner.data.images import files
from xtuner.data.images.files import ImageError, ImageFolder, decode, open_image


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    for name in ("a.png", "a.jpg", "sub/a.webp", "a.bmp", "a.gif"):
        noise.save(root / name)
    noise.save(tmp_path / "outside.png")
    return ImageFolder(root)


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "sub/a.webp", "a.bmp", "a.gif", "./sub/../a.png"]
)
def test_valid_images_pass(folder, name):
    folder.check(name)
    image = open_image(folder.find(name))
    assert image.size == (80, 60) and image.mode == "RGB"
    folder.check(str(folder.root / name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("b.png", "does not exist"),
        ("sub", "is a folder"),
        ("../outside.png", "is outside image_folder"),
        ("sub/../../outside.png", "is outside"),
        ("/etc/passwd", "is outside"),
        ("https://a.b/c.png", "download it"),
        ("data:image/png;base64,AAAA", "download it"),
    ],
)
def test_images_outside_the_folder_are_rejected(folder, name, words):
    with pytest.raises(ImageError, match=words) as caught:
        folder.check(name)
    assert name in str(caught.value)


def test_links_may_not_lead_out_unless_the_folder_itself_is_one(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "elsewhere" / "x.png")
    (folder.root / "coco").symlink_to(tmp_path / "elsewhere")
    (folder.root / "same.png").symlink_to(folder.root / "a.png")
    (folder.root / "out.png").symlink_to(tmp_path / "outside.png")
    (folder.root / "also").symlink_to(folder.root / "sub")
    folder.check("same.png")
    folder.check("also/a.webp")
    for name in ("out.png", "coco/x.png"):
        with pytest.raises(ImageError, match=r"link that leads out.*set image_folder to the real"):
            folder.check(name)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    ImageFolder(tmp_path / "link").check("x.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "sub/a.webp"])
def test_damaged_and_foreign_files_are_named(folder, name):
    file = folder.root / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match="is damaged"):
        folder.check(name)
    file.write_bytes(b"")
    with pytest.raises(ImageError, match="is not an image"):
        folder.check(name)
    Image.new("RGB", (4, 4)).save(file, format="TIFF")
    with pytest.raises(ImageError, match="is not an image in JPEG, PNG"):
        folder.check(name)


@pytest.mark.parametrize("side", [9_000, 30_000])  # Pillow warns about one and rejects the other
def test_decompression_bomb_is_rejected_before_decoding(folder, side):

    def chunk(kind, body):
        whole = kind + body
        return struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (folder.root / "bomb.png").write_bytes(raw)
    with pytest.raises(ImageError, match="more than 64,000,000"):
        folder.check("bomb.png")
    assert side * side > files.MAX_PIXELS


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (11_000, 200), (5_000, 10)])
def test_a_line_that_would_become_a_huge_square_is_refused(folder, size):
    Image.new("1", size).save(folder.root / "line.png")
    assert (folder.root / "line.png").stat().st_size < 2_000
    with pytest.raises(ImageError, match=r"more than (10,000|100 times)"):
        folder.check("line.png")
    with pytest.raises(ImageError):
        open_image(folder.find("line.png"))


def with_exif(body):
    """A PNG with a chunk eXIf of `body`."""
    raw = io.BytesIO()
    Image.new("RGB", (4, 2)).save(raw, "PNG")
    whole = b"eXIf" + body
    chunk = struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))
    return raw.getvalue().replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND")


def test_image_with_bad_orientation_fails_the_check(folder):
    (folder.root / "exif.png").write_bytes(with_exif(b"no TIFF header"))
    for use in (folder.check, lambda name: open_image(folder.find(name))):
        with pytest.raises(ImageError, match=r"exif\.png' is damaged"):
            use("exif.png")


def test_grey_in_16_bits_keeps_its_shades(folder):
    shades = np.array([[0, 0x40FF, 0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(shades).save(folder.root / "grey.png")
    folder.check("grey.png")
    assert np.asarray(open_image(folder.find("grey.png")))[0, :, 0].tolist() == [
        0,
        0x40,
        0x80,
        0xFF,
    ]


def test_images_stand_upright(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    raw = io.BytesIO()
    image.save(raw, "JPEG", exif=exif)
    raw.seek(0)
    assert decode(raw, "x").size == (2, 4)


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"], ids=["nul", "half"])
def test_invalid_file_name_is_an_image_error(folder, name):
    with pytest.raises(ImageError, match="is not a file name"):
        folder.find(name)
    with pytest.raises(ImageError, match="cannot be opened"):
        files.open_image(name)
