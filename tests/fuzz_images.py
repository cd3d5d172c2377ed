"""Damaged image files, made from whole ones of every format that is read: each gives an image or a named error.

    python tests/fuzz_images.py --n 200000               # --start 4711 --n 1 tries one of them again
"""
import argparse, gzip, io, json, os, random, re, struct, sys, tempfile, time, warnings, zlib
from pathlib import Path
import numpy as np
from PIL import Image
from finessl.engine.errors import UnreadableError
from finessl.engine.images import read_image

SIZE, MEGAPIXELS = 16, 4      # images are squashed to 16 pixels; those of more than 4 megapixels are refused
SECONDS, MIB = 5, 256         # what a file may take at most: CPU time, and memory on top of the idle program's
STARTED = ("subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn",
           "socket.connect")

WRITTEN = {                   # format: mode and options of what Pillow writes
    "PNG": [("RGB", {}), ("RGBA", {}), ("P", {}), ("I;16", {}), ("1", {}), ("LA", {})],
    "JPEG": [("RGB", {}), ("CMYK", {}), ("RGB", {"progressive": True}), ("L", {})], "MPO": [("RGB", {})],
    "GIF": [("P", {}), ("RGB", {"save_all": True})],
    "WEBP": [("RGB", {}), ("RGBA", {"lossless": True}), ("RGB", {"save_all": True})],
    "AVIF": [("RGB", {"speed": 10}), ("RGBA", {"speed": 10})],
    "TIFF": [("RGB", {}), ("I;16", {}), ("I", {}), ("F", {}), ("LAB", {}), ("P", {"big_tiff": True}),
             ("1", {"compression": "group4"}), ("RGB", {"compression": "tiff_lzw"}), ("RGB", {"compression": "jpeg"}),
             ("CMYK", {"compression": "tiff_adobe_deflate"}), ("L", {"compression": "packbits"})],
    "BMP": [("RGB", {}), ("P", {}), ("1", {})], "DIB": [("RGB", {})],
    "JPEG2000": [("RGB", {}), ("I;16", {}), ("RGBA", {"no_jp2": True})],
    "ICO": [("RGBA", {}), ("RGB", {"bitmap_format": "bmp"})], "ICNS": [("RGBA", {})],
    "PPM": [("RGB", {}), ("L", {}), ("1", {}), ("I", {}), ("F", {})], "PCX": [("RGB", {}), ("P", {})],
    "TGA": [("RGBA", {"compression": "tga_rle"}), ("L", {})], "SGI": [("RGB", {}), ("L", {"bpc": 2})],
    "DDS": [("RGBA", {}), ("RGBA", {"pixel_format": "DXT5"})],
    "BLP": [("P", {"blp_version": "BLP1"}), ("P", {"blp_version": "BLP2"})], "QOI": [("RGB", {}), ("RGBA", {})],
    "MSP": [("1", {})], "XBM": [("1", {})], "IM": [("RGB", {}), ("P", {})], "SPIDER": [("F", {})]}


def picture(mode: str, size=(18, 12)) -> Image.Image:
    "A ramp with some noise."
    y, x = np.mgrid[:size[1], :size[0]]
    noise = np.random.RandomState(0).randint(0, 60, (size[1], size[0], 3))
    image = Image.fromarray((np.stack([9 * x, 15 * y, 5 * (x + y)], 2) + noise).clip(0, 255).astype(np.uint8))
    if mode == "I;16": return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB": return Image.frombytes("LAB", image.size, image.tobytes())
    return image.quantize(32) if mode == "P" else image.convert(mode)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"): image.save(file, kind, **options) # some formats are deprecated
    return file.getvalue()


def fits_files(w: int, h: int, grey: bytes):
    def cards(*lines): return "".join(f"{line:80}" for line in (*lines, "END")).encode().ljust(2880)
    head, sides = ("SIMPLE  = T", "NAXIS   = 2"), (f"NAXIS2  = {h}",)
    yield cards(*head, "BITPIX  = 8", f"NAXIS1  = {w}", *sides) + grey.ljust(2880)
    yield cards(*head, "BITPIX  = 16", f"NAXIS1  = {w // 2}", *sides) + grey.ljust(2880)
    yield cards("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 0") + cards(
        "XTENSION= 'BINTABLE'", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 0", "NAXIS2  = 0", "ZIMAGE  = T",
        "ZCMPTYPE= 'GZIP_1  '", "ZBITPIX = 8", "ZNAXIS  = 2", f"ZNAXIS1 = {w}", f"ZNAXIS2 = {h}") + gzip.compress(
        b"".join(bytes((0, 0, 0, g)) for g in grey), mtime=0)


def by_hand(w: int = 18, h: int = 12):
    "Formats that Pillow reads and does not write: name and bytes."
    rgb, grey, indices = picture("RGB").tobytes(), picture("L").tobytes(), bytes(i % 4 for i in range(w * h))
    yield "SUN", struct.pack(">8I", 0x59A66A95, w, h, 24, 0, 1, 0, 0) + rgb
    yield "SUN", struct.pack(">8I", 0x59A66A95, w, h, 8, 0, 2, 1, 768) + bytes(768) + b"\x80\x11\x05" * 20 + grey
    yield "DCX", struct.pack("<3I", 0x3ADE68B1, 12, 0) + saved(picture("RGB"), "PCX")
    yield from (("FITS", data) for data in fits_files(w, h, grey))
    frame = struct.pack("<IHHII", 22 + w * h, 0xF1FA, 1, 0, 0) + struct.pack("<IH", 6 + w * h, 16) + indices
    yield "FLI", struct.pack("<IHHHHHHI", 128 + len(frame), 0xAF12, 1, w, h, 8, 3, 5).ljust(128, b"\0") + frame
    rows = "".join('"%s",\n' % "".join("ab"[(x + y) % 2] for x in range(w)) for y in range(h))
    yield "XPM", f'/* XPM */\nstatic char *a[] = {{\n"{w} {h} 2 1",\n"a c #ff0000",\n"b c None",\n{rows}}};\n'.encode()
    yield "PIXAR", (b"\200\350\0\0".ljust(416, b"\0") + struct.pack("<6H", h, w, 0, 0, 14, 2)).ljust(1024, b"\0") + rgb
    yield "FTEX", b"FTEX" + struct.pack("<8i", 1, w, h, 1, 1, 1, 32, len(rgb)) + rgb
    yield "FTEX", b"FTEX" + struct.pack("<8i", 1, w, h, 1, 1, 0, 32, 120) + bytes(range(120))
    yield "GBR", struct.pack(">7I", 32, 2, w, h, 1, 0x47494D50, 10) + b"abc\0" + grey
    words = {1: 4, 8: h, 9: w, 10: 1, 13: 1, 33: 256}
    yield "MCIDAS", struct.pack(">64i", *(words.get(i, 0) for i in range(64))) + grey
    photo = bytes(2048) + b"PCD_".ljust(1539, b"\0")
    yield "PCD", photo.ljust(96 * 2048, b"\0") + random.Random(0).randbytes(768 * 512 * 3 // 2)
    yield "XVTHUMB", b"P7 332\n#comment\n#END_OF_COMMENTS\n%d %d 255\n" % (w, h) + indices
    yield "IMT", b"width %d\nheight %d\npixel n8\n\x0c" % (w, h) + grey
    yield "PSD", b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, h, w, 8, 3) + bytes(12) + b"\0\0" + grey * 3
    yield "PSD", b"8BPS" + struct.pack(">H6xHIIHHI", 1, 1, h, w, 8, 2, 768) + bytes(768) + bytes(8) + b"\0\0" + grey
    icon = saved(picture("RGB", (w, 2 * h)), "DIB")
    yield "CUR", struct.pack("<HHHBBBBHHII", 0, 2, 1, w, h, 0, 0, 0, 0, len(icon), 22) + icon


def whole_files() -> list[tuple[str, bytes]]:
    "Format and bytes of small images."
    Image.init()
    out, exif = [], Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for kind, ways in WRITTEN.items():
        if kind not in Image.SAVE: continue # AVIF needs Pillow 11.3
        size = (32, 32) if kind in ("ICO", "ICNS") else (18, 12)
        for mode, options in ways:
            if "save_all" in options: options = options | {"append_images": [Image.new("RGB", size)]}
            if kind in ("PNG", "JPEG", "WEBP", "AVIF"): options = options | {"exif": exif}
            out.append((kind, saved(picture(mode, size), kind, **options)))
    return out + list(by_hand())


def mended(data: bytes) -> bytes:
    "A PNG with right checksums, so that damage reaches the decoder."
    out, at = data[:8], 8
    while at + 12 <= len(data):
        body = data[at + 4:at + 8 + int.from_bytes(data[at:at + 4], "big")]
        out += data[at:at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 8 + len(body)
    return out + data[at:]


def flip(rng, data, files):
    for _ in range(rng.choice((1, 1, 2, 4, 16))): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

def overwrite(rng, data, files):
    at, n = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 32))
    data[at:at + n] = rng.choice((rng.randbytes(n), bytes(n), b"\xff" * n))

def cut(rng, data, files): del data[rng.randrange(len(data)):]

def drop(rng, data, files):
    at = rng.randrange(len(data))
    del data[at:at + rng.choice((1, 2, 4, 16, 64))]

def repeat(rng, data, files):
    at, n = rng.randrange(len(data)), rng.choice((1, 4, 16, 64))
    data[at:at] = data[at:at + n] * rng.choice((1, 2, 50))

def splice(rng, data, files):
    other, at = rng.choice(files)[1], rng.randrange(len(data))
    start = rng.randrange(len(other)) if rng.random() < .5 else min(at, len(other) - 1)
    data[at:] = other[start:start + 4096]

def number(rng, data, files):
    "A length, size or offset becomes another one; most of them stand near the beginning."
    kind = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    bits = 8 * struct.calcsize(kind)
    value = rng.choice((0, 1, 2, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**bits - 1, len(data),
                        rng.getrandbits(bits), rng.randrange(1, 5000)))
    at = rng.randrange(min(len(data), rng.choice((64, 512, 2**20))))
    data[at:at + bits // 8] = struct.pack(kind, value % 2**bits)

DAMAGE = (flip, flip, overwrite, cut, drop, repeat, splice, number, number)


def damaged(i: int, files: list) -> tuple[str, bytes]:
    "The i-th damaged file: what it was, and its bytes; always the same."
    rng, (kind, whole) = random.Random(i), files[i % len(files)]
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(DAMAGE)(rng, data, files)
        data = data or bytearray(1)
    return kind, mended(bytes(data)) if kind == "PNG" and rng.random() < .7 else bytes(data)


def tried(file: Path) -> str:
    "What reading gives: 'image', or the reason why not; an AssertionError where that is wrong."
    start = time.thread_time()
    try: x = read_image(file, SIZE, MEGAPIXELS)
    except UnreadableError as error:
        out = str(error)
        assert error.file == file and str(file) in out and out.isprintable(), out
    else:
        out = "image"
        assert x.shape == (3, SIZE, SIZE) and str(x.dtype) == "torch.uint8"
    assert (seconds := time.thread_time() - start) < SECONDS, f"{seconds:.1f} s"
    return out


def memory(name: str) -> float: # "VmRSS" now, "VmHWM" at the most; -> MiB
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def run(n: int, start: int = 0) -> dict:
    "Try n damaged files; the first that is treated wrongly ends it with an AssertionError that gives its number."
    started = []
    sys.addaudithook(lambda event, args: started.append(event) if event in STARTED else None)
    warnings.simplefilter("error") # a warning that leaks is an exception
    files, out = whole_files(), {"n": n, "start": start, "images": 0, "formats": {}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.jpg") # the ending says nothing: the content decides
        for kind, data in files:
            file.write_bytes(data)
            assert (said := tried(file)) == "image" or "floating-point" in said, f"whole {kind}: {said}"
        idle, handles, begin = memory("VmRSS"), len(os.listdir("/proc/self/fd")), time.perf_counter()
        for i in range(start, start + n):
            kind, data = damaged(i, files)
            file.write_bytes(data)
            try:
                said = tried(file)
                assert not started, started
                assert (over := memory("VmHWM") - idle) < MIB, f"{over:.0f} MiB"
            except Exception as error:
                raise AssertionError(f"file {i}, once {kind}: {type(error).__name__}: {error}") from error
            out["images"] += said == "image"
            out["formats"].setdefault(kind, [0, 0])[said != "image"] += 1
        assert len(os.listdir("/proc/self/fd")) == handles
    return out | {"seconds": round(time.perf_counter() - begin, 1), "MiB": round(memory("VmHWM") - idle)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0)
    print(json.dumps(run(**vars(parser.parse_args()))))
