"Image files of every kind: what is right stays right to the bit, what was dark or refused is read, all else is named."
import errno, gzip, json, math, os, shutil, socket, struct, subprocess, sys, threading, time, types, warnings, zlib
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps, PngImagePlugin, PpmImagePlugin
from finessl.engine import decoders, images
from finessl.engine.decoders import FORMATS, DecodeBudget, image_formats, open_image, pixel_limit
from finessl.engine.errors import DataError, UnreadableError, printable
from finessl.engine.images import (ImageFiles, SkippedFiles, exclude_files, fetch_with_fallback, image_extensions,
                                   map_threaded, next_readable, read_image, readable_mask, sync_excluded,
                                   unreadable_files)

root = Path(__file__).resolve().parent.parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and resource")
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and shell scripts are POSIX's")
UNDO = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
        8: "ROTATE_270"} # EXIF orientation -> how an upright image is stored


def picture(mode="RGB", size=(40, 28), seed=0):
    "Noise above a ramp."
    w, h = size
    a = np.random.RandomState(seed).randint(0, 256, (h, w, 4), dtype=np.uint8)
    a[h // 3:] = np.linspace(0, 255, w)[None, :, None].astype(np.uint8)
    if mode == "I;16": return Image.fromarray(a[..., 0].astype(np.uint16) * 257)
    if mode == "I": return Image.fromarray(a[..., 0].astype(np.int32) * 257)
    image = Image.fromarray(a)
    return image.convert("RGB").quantize(200) if mode == "P" else image.convert(mode)


def save(file, image=None, **options):
    (image or picture()).save(file, **options)
    return file


def pixels(x): return x.permute(1, 2, 0).numpy()


def refused(file, size=8, **options):
    "Why a file cannot be read."
    with pytest.raises(UnreadableError) as caught: read_image(file, size, **options)
    assert caught.value.file == file and str(caught.value).isprintable()
    return str(caught.value)


def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body


def blank(width, height, depth=8, colour=0):
    "A PNG of zeros, large when unfolded."
    row = 1 + (width * depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour] + 7) // 8
    return png(width, height, depth, colour, bytes(row * height))


def tiff(data, width, height, *more, bits=(8,), order="<"):
    "An uncompressed TIFF, grey or RGB, written by hand; `more`: tag, type, count, value."
    n = len(bits)
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, n, bits[0]), 259: (3, 1, 1),
            262: (3, 1, 2 if n == 3 else 1), 273: (4, 1, 0), 277: (3, 1, n), 278: (4, 1, height),
            279: (4, 1, len(data))}
    tags |= {tag: entry for tag, *entry in more}
    start = 8 + 2 + 12 * len(tags) + 4
    if n == 3: tags[258] = 3, 3, start
    tags[273] = 4, 1, start + 6
    def entry(tag, kind, count, value):
        form = "HH" if kind == 3 and count == 1 else "i" if kind == 9 else "I"
        return struct.pack(f"{order}HHI{form}", tag, kind, count, value, *([0] if form == "HH" else []))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    body = b"".join(entry(tag, *rest) for tag, rest in sorted(tags.items()))
    return head + body + bytes(4) + struct.pack(f"{order}3H", *(bits * 3)[:3]) + data


def python(code, *args):
    "Run a program of its own; -> what it printed."
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what is right stays right ---------------------------------------------------------------------------------------

def by_pillow(file, size):
    "As version 0.1 read images: whole, by Pillow's own means."
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


KINDS = [
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "P", {"transparency": 3}), ("PNG", "P", {"transparency": bytes(range(200))}),
    ("PNG", "1", {"transparency": 0}),
    ("PNG", "RGB", {"transparency": (9, 9, 9)}), ("GIF", "P", {}), ("GIF", "RGBA", {}),
    ("GIF", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (40, 28))]}),
    *(("JPEG", mode, {"progressive": p}) for mode in ("L", "RGB", "CMYK") for p in (False, True)),
    ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
    *(("TIFF", mode, {"compression": c}) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "LA")
      for c in ("raw", "tiff_lzw")),
    ("TIFF", "I", {}), *(("BMP", mode, {}) for mode in ("1", "P", "RGB", "RGBA")),
    *(("TGA", mode, {}) for mode in ("L", "LA", "RGBA")),
    ("PPM", "RGB", {}), ("JPEG2000", "RGB", {}), ("JPEG2000", "I;16", {}), ("PCX", "P", {}), ("SGI", "RGB", {}),
    ("QOI", "RGBA", {}), ("DDS", "RGBA", {})]


@pytest.mark.parametrize("kind, mode, options", KINDS, ids=lambda v: str(v)[:30])
def test_pixels_are_those_of_version_0_1(tmp_path, kind, mode, options):
    turned = kind in ("PNG", "JPEG", "WEBP") or options.get("compression") == "tiff_lzw"
    for turn in (1, 2, 3, 6, 8) if turned else (1,):
        exif = Image.Exif()
        exif[0x0112] = turn
        file = save(tmp_path / "a.jpg", picture(mode), format=kind, **options, **({"exif": exif} if turn > 1 else {}))
        for size in (1, 28, 57): assert torch.equal(read_image(file, size), by_pillow(file, size)), (turn, size)
    assert read_image(file, 57).float().std() > 25 or options == {"transparency": 0} # all white by its own word


def test_an_image_of_the_right_size_is_not_resampled(tmp_path):
    image = picture(size=(24, 24))
    assert np.array_equal(pixels(read_image(save(tmp_path / "a.png", image), 24)), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "CMYK"])
def test_strips_change_nothing(tmp_path, mode):
    file = save(tmp_path / "a.tif", picture(mode, (1500, 1100)))
    assert torch.equal(read_image(file, 32), by_pillow(file, 32))


def test_every_format_is_explicit():
    assert set(image_formats()) == set(FORMATS) & set(Image.OPEN)
    assert not set(FORMATS) & {"EPS", "PDF", "WMF", "IPTC", "HDF5", "GRIB", "BUFR", "MPEG"}
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp"} <= image_extensions()
    assert not {".eps", ".ps", ".pdf", ".wmf", ".iim", ".h5", ""} & image_extensions()


def test_content_decides_not_the_name(tmp_path):
    a, b = save(tmp_path / "a.png"), tmp_path / "b.txt"
    shutil.copy(a, b)
    assert torch.equal(read_image(a, 9), read_image(b, 9))


# --- upright ---------------------------------------------------------------------------------------------------------

def exif(*entries, extra=b""):
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + extra


TURN, AFTER = (0x0112, 3, 1, struct.pack("<HH", 6, 0)), struct.pack("<I", 8 + 2 + 24 + 4)
inner = lambda tag, kind, value: struct.pack("<H", 1) + struct.pack("<HHI", tag, kind, 1) + value + bytes(4)
ODD_EXIF = {
    "GPS altitude reference 256": exif(TURN, (0x8825, 4, 1, AFTER), extra=inner(5, 8, struct.pack("<hh", 256, 0))),
    "width as text": exif((0x0100, 2, 4, b"abc\0"), TURN),
    "compression -5": exif((0x0103, 8, 1, struct.pack("<hh", -5, 0)), TURN),
    "resolution NaN": exif(TURN, (0x011A, 11, 1, struct.pack("<f", math.nan))),
    "negative resolution": exif(TURN, (0x011A, 10, 1, AFTER), extra=struct.pack("<ii", -72, 1)),
    "resolution by zero": exif(TURN, (0x011A, 5, 1, AFTER), extra=bytes(8)),
    "GPS nowhere": exif(TURN, (0x8825, 4, 1, b"\xff" * 4)),
    "block at -5": exif(TURN, (0x8769, 9, 1, struct.pack("<i", -5))),
    "text not ASCII": exif((0x010F, 2, 4, b"\xff\xfe\xfd\0"), TURN),
    "maker without end": exif((0x010F, 2, 400, b"\0\1\0\0"), TURN),
    "unknown type": exif((0x010F, 77, 1, bytes(4)), TURN)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ODD_EXIF)
def test_a_photograph_with_odd_exif_is_turned(tmp_path, kind, name):
    options = {"format": kind, "quality": 95, **({"lossless": True} if kind == "WEBP" else {})}
    plain = read_image(save(tmp_path / "a", exif=exif(TURN), **options), 16)
    assert torch.equal(read_image(save(tmp_path / "b", exif=ODD_EXIF[name], **options), 16), plain)
    assert not torch.equal(read_image(save(tmp_path / "c", **options), 16), plain)


@pytest.mark.parametrize("block", [b"II", b"", b"Exif\0\0", b"nonsense" * 9, exif(TURN)[:20]])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_is_cut_short_costs_no_pixel(tmp_path, kind, block):
    a, b = save(tmp_path / "a", format=kind), save(tmp_path / "b", format=kind, exif=block)
    assert torch.equal(read_image(a, 16), read_image(b, 16))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"]) # Pillow turns raw ones wrongly where it maps the file
def test_a_tiff_is_turned(tmp_path, turn, compression):
    upright, tag = picture("L"), Image.Exif()
    tag[0x0112] = turn
    stored = upright.transpose(Image.Transpose[UNDO[turn]]) if turn > 1 else upright
    file = save(tmp_path / "a.tif", stored, exif=tag, compression=compression)
    assert torch.equal(read_image(file, 24), read_image(save(tmp_path / "b.png", upright), 24))


@pytest.mark.parametrize("more", [(0x8769, 9, 1, -5), (0x8825, 4, 1, 2**31 - 1), (0xA005, 9, 1, -7)])
def test_a_tiff_with_blocks_that_lie_nowhere(tmp_path, more):
    (tmp_path / "a.tif").write_bytes(tiff(bytes(range(24)), 6, 4))
    (tmp_path / "b.tif").write_bytes(tiff(bytes(range(24)), 6, 4, more))
    assert torch.equal(read_image(tmp_path / "a.tif", 4), read_image(tmp_path / "b.tif", 4))


# --- deep pixels -----------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize("white", [255, 4095, 65535])
@pytest.mark.parametrize("name, dtype", [("a.png", np.uint16), ("a.tif", np.uint16), ("a.tif", np.int32)])
def test_deep_grey_has_white(tmp_path, white, dtype, name):
    x = read_image(save(tmp_path / name, Image.fromarray((RAMP * white).round().astype(dtype))), 8)
    assert np.abs(pixels(x) - RAMP[..., None] * 255).max() <= 1 and (int(x.min()), int(x.max())) == (0, 255)


@pytest.mark.parametrize("top, seen", [(4096, 16), (16383, 64), (65535, 255)])
def test_what_needs_more_than_12_bits_keeps_16(tmp_path, top, seen):
    x = read_image(save(tmp_path / "a.png", Image.fromarray(np.array([[0, top]], np.uint16))), 2)
    assert int(x.max()) == seen


def test_a_tiff_says_12_bits_itself(tmp_path):
    packed = bytes([0x0F, 0xF0, 0xFF]) * 4 # pairs of 255: dark in 12 bits
    (tmp_path / "a.tif").write_bytes(tiff(packed, 2, 4, bits=(12,)))
    assert read_image(tmp_path / "a.tif", 2).unique().tolist() == [16]


@pytest.mark.parametrize("bits", [8, 16])
def test_zero_may_be_white(tmp_path, bits):
    data = np.linspace(0, 2**bits - 1, 16).round().astype(f"<u{bits // 8}").tobytes()
    (tmp_path / "a.tif").write_bytes(tiff(data, 4, 4, bits=(bits,)))
    (tmp_path / "b.tif").write_bytes(tiff(data, 4, 4, (262, 3, 1, 0), bits=(bits,)))
    a, b = (read_image(tmp_path / name, 4) for name in ("a.tif", "b.tif"))
    assert torch.equal(a, 255 - b) and int(a[0, 0, 0]) == 0


def deep_colours(kind, a): # a: (H, W, 3) uint16
    h, w, _ = a.shape
    if kind == "PNG": return png(w, h, 16, 2, b"".join(b"\0" + row.tobytes() for row in a.astype(">u2")))
    order = ">" if "big" in kind else "<"
    data = a.astype(f"{order}u2").tobytes()
    if "packed" not in kind: return tiff(data, w, h, bits=(16,) * 3, order=order)
    return tiff(zlib.compress(data), w, h, (259, 3, 1, 8), bits=(16,) * 3, order=order)


DEEP = ["PNG", "TIFF", "TIFF big", "TIFF packed", "TIFF big packed"]


@pytest.mark.parametrize("kind", DEEP)
def test_colours_in_12_of_16_bits(tmp_path, kind):
    share, file = np.stack([RAMP, RAMP[::-1], RAMP.T], 2), tmp_path / "a"
    for white in (65535, 4095, 255):
        file.write_bytes(deep_colours(kind, (share * white).round().astype(np.uint16)))
        x = pixels(read_image(file, 8)).astype(int)
        assert np.abs(x - share * 255).max() <= 1.01 and x.max() == 255, white
    file.write_bytes(deep_colours(kind, np.zeros((8, 8, 3), np.uint16)))
    assert not read_image(file, 8).any() # black is black


@pytest.mark.parametrize("kind", DEEP)
def test_colours_in_16_bits_stay_as_they_are(tmp_path, kind):
    file = tmp_path / "a"
    file.write_bytes(deep_colours(kind, np.random.RandomState(0).randint(0, 65536, (28, 40, 3)).astype(np.uint16)))
    assert torch.equal(read_image(file, 13), by_pillow(file, 13))


@pytest.mark.parametrize("array, says", [
    (np.zeros((4, 4), np.float32), "floating-point"), (np.full((4, 4), 70000, np.int32), "32 bits"),
    (np.full((4, 4), -1, np.int32), "32 bits")])
def test_pixels_of_unknown_range_are_refused(tmp_path, array, says):
    assert says in refused(save(tmp_path / "a.tif", Image.fromarray(array)))


# --- good input that was refused -------------------------------------------------------------------------------------

def text_png(tmp_path, *chunks):
    (tmp_path / "a.png").write_bytes(png(4, 4, 8, 0, bytes(5) + bytes([0, 9, 9, 9, 9]) * 3, *chunks))
    return tmp_path / "a.png"


@pytest.mark.parametrize("make", [
    lambda text: chunk(b"tEXt", b"k\0" + text), lambda text: chunk(b"zTXt", b"k\0\0" + zlib.compress(text)),
    lambda text: chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(text)),
    lambda text: chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text),
    lambda text: chunk(b"iCCP", b"k\0\0" + zlib.compress(text))], ids=["tEXt", "zTXt", "iTXt", "XMP", "iCCP"])
def test_long_text_in_a_png(tmp_path, make):
    plain = read_image(text_png(tmp_path), 4)
    assert torch.equal(read_image(text_png(tmp_path, make(b"history " * 2**20)), 4), plain)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20 # Pillow's own number is back


def test_text_that_unfolds_without_end_is_refused(tmp_path):
    packed = lambda i, n: chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(n)))
    assert "MAX_TEXT" in refused(text_png(tmp_path, packed(0, 2**25)))
    assert "text" in refused(text_png(tmp_path, *(packed(i, 2**24 - 9) for i in range(5))))


# --- what is refused at once -----------------------------------------------------------------------------------------

@posix
def test_what_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path) # the name of a socket is short
    os.mkfifo("pipe")
    os.mkdir("folder")
    Path("empty").touch()
    links = {"link": "pipe", "loop": "loop", "dangling": "nowhere", "zero": "/dev/zero"}
    for link, to in links.items(): os.symlink(to, link)
    what = {"pipe": "a pipe, not a file", "folder": "a folder, not", "empty": "it is empty (0 bytes)",
            "link": "a pipe, not", "zero": "a device, not", "socket": "a socket, not", "loop": "links",
            "dangling": "file does not exist"}
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
        begin = time.monotonic()
        for name, says in what.items(): assert says in refused(name), name
    assert time.monotonic() - begin < 5


def test_what_is_not_there(tmp_path):
    assert refused(tmp_path / "gone.jpg") == f"image file does not exist: {tmp_path / 'gone.jpg'}"
    assert "Not a directory" in refused(save(tmp_path / "a.png") / "b.png")
    assert "null" in refused("a\0b.png")
    assert "too long" in refused(str(tmp_path / ("a" * 300)))
    with pytest.raises(TypeError): read_image(0, 8)


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def wrapped(program):
    "An IPTC file, whose inside Pillow opens as a file of any format."
    fields = {(3, 20): b"\0\x20", (3, 30): b"\0\x20", (3, 60): b"\1\0", (3, 120): b"\0\5",
              (8, 10): program}
    return b"".join(bytes([0x1C, *tag]) + struct.pack(">H", len(data)) + data for tag, data in fields.items())


@posix
@pytest.mark.parametrize("data", [PROGRAM, wrapped(PROGRAM)], ids=["PostScript", "in IPTC"])
def test_nothing_is_started(tmp_path, monkeypatch, data):
    gs, mark, file = tmp_path / "gs", tmp_path / "started", tmp_path / "holiday.jpg"
    gs.write_text(f"#!/bin/sh\necho started >> {mark}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    file.write_bytes(data)
    refused(file)
    assert not mark.exists()
    try:
        with Image.open(file) as image: image.load()
    except Exception: pass
    assert mark.exists() # Pillow alone starts it: this test can fail


@pytest.mark.parametrize("head, what", [
    (b"%!PS-Adobe", "PostScript"), (b"%PDF-1.7", "PDF"), (b"\n <!DOCTYPE html>", "HTML"), (b"<svg xmlns=''>", "SVG"),
    (b"version https://git-lfs.github.com/spec/v1", "Git LFS"), (b"\0\0\0\x18ftypheic\0\0\0\0", "pillow-heif"),
    (b"hello there, this is text", "none of the formats")])
def test_what_else_it_is(tmp_path, head, what):
    (tmp_path / "a.jpg").write_bytes(head + bytes(200))
    assert what in refused(tmp_path / "a.jpg")


def test_heic_is_read_where_its_package_is(tmp_path, monkeypatch):
    def register_heif_opener(): # stands for the real one; its files are PPM
        Image.register_open("HEIF", PpmImagePlugin.PpmImageFile, lambda head: head[:2] == b"P6")
        Image.register_extension("HEIF", ".heic")
    file = save(tmp_path / "a.heic", format="PPM")
    for name in ("OPEN", "EXTENSION"): monkeypatch.setattr(Image, name, dict(getattr(Image, name)))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.delitem(Image.OPEN, "PPM")
    try:
        for f in (image_formats, image_extensions): f.cache_clear()
        refused(file)
        package = types.SimpleNamespace(register_heif_opener=register_heif_opener)
        monkeypatch.setitem(sys.modules, "pillow_heif", package)
        for f in (image_formats, image_extensions): f.cache_clear()
        assert "HEIF" in image_formats() and ".heic" in image_extensions()
        assert read_image(file, 4).shape == (3, 4, 4)
    finally:
        monkeypatch.undo()
        for f in (image_formats, image_extensions): f.cache_clear()
    assert decoders.PACKAGES[".heic"] == "pillow-heif" and "PPM" in image_formats()


# --- decoders that fail ----------------------------------------------------------------------------------------------

class Strange(Exception): "Raised by nobody else."


ANYTHING = [RuntimeError("a"), NotImplementedError(), KeyError("k"), AssertionError(), AttributeError("x"), EOFError(),
            ZeroDivisionError(), Strange(), RecursionError(), UnicodeDecodeError("utf-8", b"", 0, 1, "r"),
            struct.error("s"), zlib.error("z"), UserWarning("w"), MemoryError(), StopIteration(),
            OSError("decoder\x1b[31m\nerror"), PermissionError(13, "Permission denied", "elsewhere")]


@pytest.mark.parametrize("error", ANYTHING, ids=repr)
@pytest.mark.parametrize("where", ["_open", "load"])
def test_a_decoder_may_raise_anything(tmp_path, monkeypatch, error, where):
    file = save(tmp_path / "a.png")
    def broken(*args): raise error
    monkeypatch.setattr(PngImagePlugin.PngImageFile, where, broken)
    said = refused(file)
    assert said.startswith(f"cannot read image {file}: ")
    assert len(said) < len(str(file)) + 250 and "elsewhere" not in said
    x = ImageFiles([file], 4, SkippedFiles(tmp_path))
    with pytest.raises(UnreadableError, match="none is left"): fetch_with_fallback(x.__getitem__, x, torch.tensor([0]))
    assert x.skipped == {"a.png"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), OSError(errno.EMFILE, "Too many open files"),
                                   OSError(errno.ENOMEM, "no memory")], ids=repr)
def test_what_is_not_the_files_fault_passes(tmp_path, monkeypatch, error):
    file = save(tmp_path / "a.png")
    def broken(*args): raise error
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    x = ImageFiles([file], 4, SkippedFiles(tmp_path))
    with pytest.raises(type(error)) as caught: fetch_with_fallback(x.__getitem__, x, torch.tensor([0]))
    assert caught.value is error and not x.skipped


@linux
@pytest.mark.parametrize("lack, error", [("memory", "MemoryError"), ("handles", "OSError")])
def test_a_machine_that_lacks_something_is_no_broken_file(tmp_path, lack, error):
    file = tmp_path / "a.png"
    file.write_bytes(blank(8000, 8000, 8, 2))
    assert python("""if 1:
        import os, resource, sys, torch
        from finessl.engine.images import read_image
        read_image(sys.argv[1], 1)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        os.close(free := os.open(os.devnull, os.O_RDONLY)) # the number of the next handle
        if sys.argv[2] == "memory": resource.setrlimit(resource.RLIMIT_AS, (used + 2**27,) * 2)
        else: resource.setrlimit(resource.RLIMIT_NOFILE, (free,) * 2)
        try: read_image(sys.argv[1], 8)
        except (MemoryError, OSError) as error: print(type(error).__name__)""", file, lack) == error + "\n"


@pytest.mark.parametrize("kind, options", [
    ("PNG", {}), ("JPEG", {"quality": 95}), ("GIF", {}), ("WEBP", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}),
    ("TIFF", {"compression": "tiff_lzw"}), ("TGA", {}), ("AVIF", {})], ids=str)
def test_a_file_cut_short_is_refused(tmp_path, kind, options):
    if kind not in Image.SAVE: pytest.skip("this Pillow cannot write it")
    whole = save(tmp_path / "a", picture(size=(90, 70)), format=kind, **options).read_bytes()
    for part in (.3, .7):
        (tmp_path / "b").write_bytes(whole[:int(part * len(whole))])
        refused(tmp_path / "b")


# --- limits ----------------------------------------------------------------------------------------------------------

def test_the_limit_of_pixels(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png", picture(size=(200, 150)))
    monkeypatch.delenv("FINESSL_MAX_MEGAPIXELS", raising=False)
    assert pixel_limit() == 2 * Image.MAX_IMAGE_PIXELS and pixel_limit(.03) == 30000 == pixel_limit("0.03")
    assert read_image(file, 4, max_megapixels=.03).shape == (3, 4, 4)
    says = refused(file, max_megapixels=.0299)
    assert "more than the 0.0299 megapixels" in says and "max_megapixels or FINESSL_MAX_MEGAPIXELS allows more" in says
    monkeypatch.setenv("FINESSL_MAX_MEGAPIXELS", "0.01")
    assert "more than the 0.01 megapixels" in refused(file)
    assert read_image(file, 4, max_megapixels=.03).shape == (3, 4, 4)
    with pytest.raises(UnreadableError, match="megapixels"): open_image(file, lambda image: image.size)
    x = ImageFiles([file] * 3, 4, max_megapixels=.03)
    assert x[:].shape == (3, 3, 4, 4) and x.select([1])[0].shape == (3, 4, 4)
    with pytest.raises(UnreadableError): ImageFiles([file], 4)[0]


@pytest.mark.parametrize("bad", ["many", "-1", "nan", "0"])
def test_a_limit_that_is_none(tmp_path, monkeypatch, bad):
    monkeypatch.setenv("FINESSL_MAX_MEGAPIXELS", bad)
    with pytest.raises(DataError, match="FINESSL_MAX_MEGAPIXELS must be a number > 0") as caught:
        read_image(save(tmp_path / "a.png"), 4)
    assert repr(bad) in str(caught.value) and not isinstance(caught.value, UnreadableError) # or all files were left out


def test_a_limit_that_the_user_gave_pillow_holds(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png", picture(size=(200, 150)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "more than the 0.002 megapixels" in refused(file) and Image.MAX_IMAGE_PIXELS == 1000
    assert read_image(file, 4, max_megapixels=1).shape == (3, 4, 4) and Image.MAX_IMAGE_PIXELS == 1000
    assert "0.002" in refused(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(file, 4).shape == (3, 4, 4) and Image.MAX_IMAGE_PIXELS is None
    assert "megapixels" in refused(file, max_megapixels=.001) and Image.MAX_IMAGE_PIXELS is None


def test_more_than_pillow_allows_on_request(tmp_path):
    (tmp_path / "a.png").write_bytes(blank(20000, 10000, 1))
    assert "179 megapixels" in refused(tmp_path / "a.png")
    assert not read_image(tmp_path / "a.png", 4, max_megapixels=200).any()
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_a_jpeg_over_the_old_limit_is_decoded_smaller(tmp_path, monkeypatch):
    file, sizes, squash = save(tmp_path / "a.jpg", picture("L", (1600, 1200))), [], images._squash
    whole = read_image(file, 20)
    monkeypatch.setattr(images, "_squash", lambda image, size: (sizes.append(image.size), squash(image, size))[1])
    monkeypatch.setattr(images, "_WHOLE_PIXELS", 10**6)
    x = read_image(file, 20)
    assert sizes == [(200, 150)] and (x.int() - whole.int()).abs().max() <= 4


def test_an_icon_cannot_hide_a_large_image(tmp_path):
    inside = blank(6000, 6000, 1)
    part = b"ic07" + struct.pack(">I", 8 + len(inside)) + inside
    (tmp_path / "a.icns").write_bytes(b"icns" + struct.pack(">I", 8 + len(part)) + part)
    assert "megapixels" in refused(tmp_path / "a.icns", max_megapixels=4)


@pytest.mark.parametrize("size", [(1, 5_000_000), (5_000_000, 1)])
def test_sides_of_millions(tmp_path, size):
    a = np.zeros(size[::-1], np.uint8)
    a.reshape(-1)[2_500_000:] = 255
    x = read_image(save(tmp_path / "a.png", Image.fromarray(a), compress_level=1), 224)[0]
    if size[0] == 1: x = x.T
    assert x[:, :100].max() == 0 and x[:, -100:].min() == 255 and torch.equal(x, x[:1].expand(224, 224))


def test_a_file_far_larger_than_its_pixels_is_refused(tmp_path):
    file = save(tmp_path / "a.webp")
    os.truncate(file, 2**33) # takes no room on the disk
    assert "megapixels" in refused(file)


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path):
    file = tmp_path / "a.jpg"
    data = save(file, picture("L", (640, 480)), progressive=True).read_bytes()
    last = data.rindex(b"\xff\xda")
    scans = lambda n: data[:last] + data[last:-2] * n + data[-2:]
    for good in (scans(2), scans(90), data + b"\xff\xda\0\x08" * 5000): # a film behind a phone's picture is no scan
        file.write_bytes(good)
        read_image(file, 4)
    file.write_bytes(scans(5000))
    assert "a JPEG of 500" in refused(file)


def test_a_table_that_python_would_decode_for_minutes(tmp_path):
    def cards(*lines): return "".join(f"{line:80}" for line in (*lines, "END")).encode().ljust(2880)
    def fits(w, h, data):
        return cards("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 0") + cards(
            "XTENSION= 'BINTABLE'", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 0", "NAXIS2  = 0", "ZIMAGE  = T",
            "ZCMPTYPE= 'GZIP_1  '", "ZBITPIX = 8", "ZNAXIS  = 2", f"ZNAXIS1 = {w}",
            f"ZNAXIS2 = {h}") + gzip.compress(data).ljust(2880)
    (tmp_path / "a.fits").write_bytes(fits(9, 7, bytes(4 * 63)))
    assert not read_image(tmp_path / "a.fits", 4).any()
    (tmp_path / "a.fits").write_bytes(fits(10000, 10000, bytes(10**6)))
    assert "FITS" in refused(tmp_path / "a.fits")


@linux
@pytest.mark.parametrize("depth, colour, most", [(16, 0, 5), (8, 6, 11), (8, 2, 7)], ids=["grey", "transparent", "RGB"])
def test_memory_for_large_images(tmp_path, depth, colour, most): # bytes a pixel; version 0.1 took 20 for grey
    (tmp_path / "a.png").write_bytes(blank(6000, 6000, depth, colour))
    assert float(python("""if 1:
        import re, sys, torch
        from finessl.engine.images import read_image
        mib = lambda name: int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
        open("/proc/self/clear_refs", "w").write("5") # the peak starts anew
        idle = mib("VmRSS")
        read_image(sys.argv[1], 224)
        print(mib("VmHWM") - idle)""", tmp_path / "a.png")) < most * 36e6 / 2**20 + 24


def test_the_budget_lets_in_what_fits():
    budget, lock, inside, seen, sizes = DecodeBudget(10), threading.Lock(), [], [], [1, 5, 9, 4, 25, 3, 2, 8] * 3
    def work(n):
        with budget.taken(n):
            with lock: inside.append(n), seen.append(list(inside))
            time.sleep(.01)
            with lock: inside.remove(n)
        return n
    assert map_threaded(work, sizes) == sizes and budget.held == 0
    assert all(sum(together) <= 10 or together == [25] for together in seen)
    assert any(len(together) > 1 for together in seen)
    with pytest.raises(KeyError), budget.taken(11): raise KeyError
    assert budget.held == 0


# --- nothing of the user's is changed --------------------------------------------------------------------------------

@pytest.mark.parametrize("action", ["error", "always"])
def test_warnings_of_pillow_do_not_leak(tmp_path, action):
    file, cut = tmp_path / "a.tif", tmp_path / "b.tif"
    file.write_bytes(tiff(bytes(24), 6, 4, (315, 4, 10**6, 40))) # an author's name longer than the file
    cut.write_bytes(file.read_bytes()[:60])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter(action)
        before = list(warnings.filters)
        for _ in range(2): read_image(file, 4), refused(cut)
        assert warnings.filters == before and not said
        if action == "always": warnings.warn("mine")
    assert action == "error" or [str(w.message) for w in said] == ["mine"]
    with pytest.warns(UserWarning), Image.open(file) as image: image.load() # Pillow alone complains: this test can fail


def test_threads_with_limits_of_their_own(tmp_path):
    file = save(tmp_path / "a.png", picture(size=(200, 150)))
    def state(): return Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, list(warnings.filters)
    def read(i):
        try: return read_image(file, 4, max_megapixels=(.01, .03, 500)[i % 3]).shape == (3, 4, 4)
        except UnreadableError: return False
    before = state()
    assert map_threaded(read, range(300)) == [False, True, True] * 100 and state() == before


@linux
def test_nothing_is_logged_where_nobody_listens(tmp_path):
    file = tmp_path / "a.tif"
    file.write_bytes(tiff(bytes(24), 6, 4, (277, 4, 1, 99))) # samples a pixel, which Pillow logs as an error
    assert python("""if 1:
        import sys
        from finessl.engine.errors import UnreadableError
        from finessl.engine.images import read_image
        sys.stderr = sys.stdout
        try: read_image(sys.argv[1], 4)
        except UnreadableError: print("refused")""", file) == "refused\n"


@posix
def test_a_process_forked_while_images_are_read(tmp_path):
    file, most = save(tmp_path / "a.png"), Image.MAX_IMAGE_PIXELS
    with decoders._pillow.lent(1e9), decoders.decode_budget.taken(2**28), decoders.decode_budget.changed:
        assert Image.MAX_IMAGE_PIXELS > most
        with warnings.catch_warnings(action="ignore"): child = os.fork()
        if not child:
            threading.Timer(30, lambda: os._exit(3)).start() # it waits for ever
            same = Image.MAX_IMAGE_PIXELS == most
            os._exit(0 if same and read_image(file, 4).shape == (3, 4, 4) and Image.MAX_IMAGE_PIXELS == most else 4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- names -----------------------------------------------------------------------------------------------------------

def test_what_is_printable():
    assert printable("a\x1b[31m\n\u202eé猫\udcff.jpg") == "a\\x1b[31m\\n\\u202eé猫\\udcff.jpg"


@linux
@pytest.mark.parametrize("name", ["\x1b[31mred.jpg", "two\nlines.jpg", "\u202egpj.exe", os.fsdecode(b"latin \xe9.jpg")])
def test_names_are_shown_without_their_commands(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"nonsense")
    said = refused(file)
    assert printable(name) in said and "none of the formats" in said
    assert "does not exist" in refused(f"{file}x")
    x = ImageFiles([file], 4, SkippedFiles(tmp_path, [name]))
    with pytest.raises(UnreadableError) as caught: next_readable(x, 0)
    assert str(caught.value).isprintable()
    file.write_bytes(save(tmp_path / "a.png").read_bytes())
    assert read_image(os.fsencode(file), 4).shape == (3, 4, 4)


# --- many images -----------------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path): return [save(tmp_path / f"{i}.png", picture(seed=i)) for i in range(6)]


def test_image_files(files):
    x, whole = ImageFiles(files, 12), torch.stack([read_image(file, 12) for file in files])
    assert torch.equal(x[:], whole) and x.shape == whole.shape and x.dtype == whole.dtype and len(x) == 6
    assert repr(x) == "ImageFiles(6 files, size=12)"
    for idx in (slice(1, 5, 2), [4, 4, 0], torch.tensor([5, 1]), np.array([3, 2]), torch.arange(6) > 3, slice(2, 2)):
        assert torch.equal(x[idx], whole[idx])
    assert torch.equal(x[-2], whole[-2]) and torch.equal(x[np.int64(3)], whole[3])
    assert torch.equal(torch.stack(list(x)), whole)
    with pytest.raises(IndexError): x[6]
    for size in (0, -1, 1.5, True, "8"):
        with pytest.raises(DataError, match="size must be a whole number from 1 to 8192"): ImageFiles(files, size)


def test_threads_keep_the_order_and_raise_the_first_error():
    assert map_threaded(lambda i: i * i, range(1000), block=7) == [i * i for i in range(1000)]
    assert map_threaded(str, []) == [] and map_threaded(str, [1]) == ["1"]
    def f(i):
        time.sleep(.05 * (i == 2))
        if i in (2, 3): raise ValueError(i)
    with pytest.raises(ValueError, match="2"): map_threaded(f, range(5))


def test_the_next_file_takes_the_place(files, tmp_path):
    x = ImageFiles(files, 8, SkippedFiles(tmp_path))
    files[2].write_bytes(b"broken")
    files[5].unlink()
    got, idx = fetch_with_fallback(x.__getitem__, x, torch.tensor([0, 2, 5, 2]))
    assert idx.tolist() == [0, 3, 0, 3] and torch.equal(got, x[idx]) and x.skipped == {"2.png", "5.png"}
    labels = torch.tensor([0, 1, 2, 2, 1, 1])
    assert fetch_with_fallback(x.__getitem__, x, torch.tensor([2, 5]), labels)[1].tolist() == [3, 1]
    with pytest.raises(UnreadableError, match="2.png, and none is left to take its place in its class"):
        fetch_with_fallback(x.__getitem__, x, torch.tensor([2]), torch.tensor([0, 1, 9, 2, 1, 1]))
    assert readable_mask(x).tolist() == [True, True, False, True, True, False]
    strict = ImageFiles(files, 8)
    assert readable_mask(got) == readable_mask(strict) == slice(None)
    with pytest.raises(UnreadableError, match="2.png"):
        fetch_with_fallback(strict.__getitem__, strict, torch.tensor([2]))


def test_an_error_about_another_file_ends(files, tmp_path):
    x = ImageFiles(files, 8, SkippedFiles(tmp_path))
    def fetch(idx): raise UnreadableError(tmp_path / "other.png", "cannot read image other.png")
    with pytest.raises(UnreadableError, match="other"): fetch_with_fallback(fetch, x, torch.tensor([0])) # not for ever


def test_files_that_broke_are_known_to_all(files, tmp_path):
    class Data(tuple): split = types.SimpleNamespace(unreadable=("0.png",))
    known, none = SkippedFiles(tmp_path, ["0.png"]), SkippedFiles(tmp_path)
    data = Data((ImageFiles(files, 8, known), torch.zeros(3), ImageFiles(files, 8, none), ImageFiles(files, 8)))
    exclude_files(data, ["3.png", "1.png"])
    assert unreadable_files(data) == ["1.png", "3.png"]
    assert known == {"0.png", "1.png", "3.png"} and none == {"1.png", "3.png"}
    sync_excluded(data, None)
    sync_excluded(data, types.SimpleNamespace(gather_union=lambda mine: [*mine, "4.png"]))
    assert unreadable_files(data) == ["1.png", "3.png", "4.png"]
    Data.split = None
    assert unreadable_files(data) == ["0.png", "1.png", "3.png", "4.png"]


# --- damage ----------------------------------------------------------------------------------------------------------

@linux
def test_two_thousand_damaged_files():
    command = [sys.executable, "-X", "faulthandler", str(root / "tests/fuzz_images.py"), "--n", "2000"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout)
    assert out["n"] == 2000 and 400 < out["images"] < 1600
    assert set(out["formats"]) >= set(image_formats()) - {"HEIF"} # every format that is read
    assert sum(min(counts) > 0 for counts in out["formats"].values()) > 30 # both outcomes
