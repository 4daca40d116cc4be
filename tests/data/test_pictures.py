"""Pictures: found only in their folder, checked before a run, decoded when a batch is made."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from xtuner.data import pictures
from xtuner.data.pictures import PictureError, PictureFolder, decode


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    (place / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    for name in ("a.png", "a.jpg", "sub/a.webp", "a.bmp", "a.gif"):
        noise.save(place / name)
    noise.save(tmp_path / "outside.png")
    return PictureFolder(place)


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "sub/a.webp", "a.bmp", "a.gif", "./sub/../a.png"]
)
def test_sound_pictures_pass(folder, name):
    folder.check(name)
    assert folder.load(name).size == (80, 60) and folder.load(name).mode == "RGB"
    folder.check(str(folder.root / name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("b.png", "is not there"),
        ("sub", "is a folder"),
        ("../outside.png", "lies outside image_folder"),
        ("sub/../../outside.png", "lies outside"),
        ("/etc/passwd", "lies outside"),
        ("https://a.b/c.png", "download it"),
        ("data:image/png;base64,AAAA", "download it"),
    ],
)
def test_what_is_not_in_the_folder_is_refused(folder, name, words):
    with pytest.raises(PictureError, match=words) as caught:
        folder.check(name)
    assert name in str(caught.value)


def test_links_of_folders_are_followed_and_links_of_files_only_within(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "elsewhere" / "x.png")
    (folder.root / "coco").symlink_to(tmp_path / "elsewhere")
    (folder.root / "same.png").symlink_to(folder.root / "a.png")
    (folder.root / "out.png").symlink_to(tmp_path / "outside.png")
    folder.check("coco/x.png")
    folder.check("same.png")
    with pytest.raises(PictureError, match="link that leads out"):
        folder.check("out.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "sub/a.webp"])
def test_damaged_and_foreign_files_are_named(folder, name):
    file = folder.root / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PictureError, match="is damaged"):
        folder.check(name)
    file.write_bytes(b"")
    with pytest.raises(PictureError, match="is no picture"):
        folder.check(name)
    Image.new("RGB", (4, 4)).save(file, format="TIFF")
    with pytest.raises(PictureError, match="is no picture in JPEG, PNG"):
        folder.check(name)


@pytest.mark.parametrize("side", [9_000, 30_000])  # Pillow warns of the one, refuses the other
def test_a_bomb_is_refused_before_it_is_decoded(folder, side):

    def chunk(kind, body):
        whole = kind + body
        return struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (folder.root / "bomb.png").write_bytes(raw)
    with pytest.raises(PictureError, match="more than 64,000,000"):
        folder.check("bomb.png")
    assert side * side > pictures.MAX_PIXELS


def test_pictures_stand_upright(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    raw = io.BytesIO()
    image.save(raw, "JPEG", exif=exif)
    raw.seek(0)
    assert decode(raw, "x").size == (2, 4)
