"Folders, image files and bad input: what a real disk holds. The mechanisms are tested in their notebooks."
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from finessl.engine.errors import DataError
from finessl.data import Dataset, Split, batch_indices, check_dataset, digits, generator, holdout
from finessl.data import permutation_cache, split_labels
from finessl.engine.images import ImageFiles, read_image
from finessl.engine.folders import image_folder


def picture(seed=0, size=(24, 24)):
    rng = np.random.RandomState(seed)
    small = Image.fromarray(rng.randint(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def save(file, image=None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(file, **options)
    return file


@pytest.fixture
def folder(tmp_path):
    "Two classes of four images each, with test and unlabelled parts."
    root = tmp_path / "my images é"
    for k, (part,
            n) in enumerate({"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 3, "unlabelled": 5}.items()):
        for i in range(n): save(root / part / f"{i}.png", picture(10 * k + i))
    return root


def pixels(file, size=24): return read_image(file, size)


# --- formats ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options", [
    ("a.png", {}), ("a.bmp", {}), ("a.tiff", {}), ("a.tif", {"compression": "tiff_lzw"}), ("a.ppm", {}), ("a.tga", {}),
    ("A.PNG", {}), ("a.webp", {"lossless": True})])
def test_lossless_formats_give_the_pixels(tmp_path, name, options):
    if name.endswith("webp") and not features.check("webp"): pytest.skip("Pillow without WebP")
    want = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    assert torch.equal(pixels(save(tmp_path / name, **options)), want)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = picture().convert("L")
    if mode == "I;16": image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "I": image = Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    elif mode == "P": image = grey.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    else: image = grey.convert("RGB").convert(mode)
    x = pixels(save(tmp_path / ("a.tiff" if mode in ("I", "YCbCr", "CMYK") else "a.png"), image))
    want = torch.from_numpy(np.array(grey.convert("1") if mode == "1" else grey).astype(np.int32))
    if mode == "1": want = want * 255
    assert x.dtype == torch.uint8 and x.shape == (3, 24, 24)
    assert (x.int() - want).abs().max() <= 3


def test_cmyk_jpeg(tmp_path):
    x = pixels(save(tmp_path / "a.jpg", picture().convert("CMYK"), quality=100))
    assert (x.int() - torch.from_numpy(np.array(picture())).permute(2, 0, 1).int()).abs().float().mean() < 6


def test_16_bit_white_and_black(tmp_path):
    deep = np.array([[0, 65535], [32768, 128]], dtype=np.uint16)
    assert pixels(save(tmp_path / "a.png", Image.fromarray(deep)), 2)[0].tolist() == [[0, 255], [128, 0]]


@pytest.mark.parametrize("array, reason",
                         [(np.zeros((4, 4), np.float32), "floating-point"),
                          (np.full((4, 4), 70000, np.int32), "32 bits")])
def test_pixels_of_unknown_range_are_refused(tmp_path, array, reason):
    with pytest.raises(DataError, match=f"a.tiff.*{reason}"): pixels(save(tmp_path / "a.tiff", Image.fromarray(array)))


def test_transparency_stands_on_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (pixels(save(tmp_path / "a.png", clear), 4) == 255).all()
    half = pixels(save(tmp_path / "b.png", Image.new("RGBA", (4, 4), (0, 0, 0, 128))), 4)
    assert half.unique().tolist() == [127]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert (pixels(save(tmp_path / "c.png", palette, transparency=1), 4) == 255).all()
    assert (pixels(save(tmp_path / "d.png", Image.new("RGB", (4, 4), (9, 9, 9)), transparency=(9, 9, 9)),
                   4) == 255).all()


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    x = pixels(save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]), 8)
    assert x[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = picture(size=(24, 12))
    inverse = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
               7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright.transpose(Image.Transpose[inverse[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert torch.equal(pixels(save(tmp_path / "a.png", stored, exif=exif)), pixels(save(tmp_path / "b.png", upright)))


def test_enlarging_and_shrinking_are_antialiased_squashes(tmp_path):
    checkerboard = np.indices((64, 32)).sum(0) % 2 * 255
    x = pixels(save(tmp_path / "a.png", Image.fromarray(checkerboard.astype(np.uint8))), 8)
    assert x.shape == (3, 8, 8) and (x.int() - 128).abs().max() < 40      # without antialiasing: 0 and 255


# --- folders ---------------------------------------------------------------------------------------------------------

def test_folder(folder):
    d = check_dataset(image_folder(folder, n_per_class=2, seed=3))
    assert d.classes == ("cat", "dog") and d.y_lb.tolist() == [0, 0, 1, 1]
    assert d.y_ulb.tolist() == [0] * 4 + [1] * 4 + [-1] * 5
    assert d.x_ulb.shape == (13, 3, 24, 24) and d.y_test.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(d.x_ulb[d.split.idx_lb], d.x_lb) and torch.equal(d.y_ulb[d.split.idx_lb], d.y_lb)
    assert torch.equal(d.x_ulb[5], pixels(folder / "train/dog/1.png"))
    assert torch.equal(d.x_test[-1], pixels(folder / "test/dog/2.png"))
    assert d.split[:3] == ("folder:my images é", 3, 2) and d.split.skipped == 0
    assert d.split.hash != image_folder(folder, n_per_class=2, seed=4).split.hash
    os.rename(folder, folder.parent / "moved")
    assert image_folder(str(folder.parent / "moved"), n_per_class=2, seed=3).split.hash == d.split.hash


def test_without_n_every_image_is_labelled(folder):
    d = check_dataset(image_folder(folder))
    assert d.split.n_per_class is None and len(d.x_lb) == 8 and d.split.idx_lb.tolist() == list(range(8))


def test_no_test_and_no_unlabelled_part(tmp_path):
    for c in "ab": save(tmp_path / "train" / c / "0.png")
    d = check_dataset(image_folder(tmp_path, 1))
    assert d.x_test.shape == (0, 3, 24,
                              24) and d.y_test.tolist() == [] and d.y_test.dtype == torch.int64 and len(d.x_ulb) == 2


def test_lazy_and_eager_give_the_same(folder):
    for i, size in enumerate(((40, 30), (300, 20))): save(folder / "train/cat" / f"odd{i}.jpg", picture(i, size))
    eager, lazy = image_folder(folder, 2, lazy=False), image_folder(folder, 2, lazy=True)
    check_dataset(lazy)
    for a, b in zip(eager[0:6:2], lazy[0:6:2]):
        assert isinstance(a, torch.Tensor) and isinstance(b, ImageFiles)
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b[:])
    assert eager.split.hash == lazy.split.hash and lazy.x_ulb.size == 256
    kept = holdout(lazy, n=3)
    assert isinstance(kept.x_ulb, ImageFiles) and len(kept.x_ulb) == 12
    assert torch.equal(kept.x_ulb[kept.split.idx_lb], kept.x_lb[:])


def test_indexing_image_files(folder):
    x = image_folder(folder, lazy=True).x_ulb
    whole = x[:]
    for idx in (slice(2, 9, 3), [4, 4, 0], torch.tensor([12, 1]), np.array([3, 2]), torch.arange(13) > 8, slice(5, 5)):
        assert torch.equal(x[idx], whole[idx])
    assert torch.equal(x[-2], whole[-2]) and torch.equal(x[np.int64(3)], whole[3])
    assert torch.equal(torch.stack(list(x)), whole)
    with pytest.raises(IndexError): x[13]


@pytest.mark.parametrize("sizes, side",
                         [([(20, 20)] * 2, 20), ([(20, 12)] * 2, 20), ([(20, 12), (12, 20)], 20),
                          ([(20, 20), (20, 21)], 256),
                                         ([(256, 256)] * 2, 256), ([(300, 300)] * 2, 256)])
def test_side_of_the_images(tmp_path, sizes, side):
    for c, size in zip("ab", sizes): save(tmp_path / "train" / c / "0.png", picture(size=size))
    assert image_folder(tmp_path, 1).x_lb.shape[1:] == (3, side, side)
    assert image_folder(tmp_path, 1, image_size=17).x_lb.shape[1:] == (3, 17, 17)


def test_hidden_and_other_files_are_ignored(folder):
    (folder / "train/cat/.DS_Store").write_bytes(b"x")
    (folder / "train/cat/._0.png").write_bytes(b"x")
    (folder / "train/dog/Thumbs.db").write_bytes(b"x")
    (folder / "train/dog/readme.txt").write_text("x")
    (folder / "train/.ipynb_checkpoints").mkdir()
    (folder / "train/labels.csv").write_text("x")
    save(folder / "train/dog/.hidden/1.png")
    d = image_folder(folder)
    assert d.classes == ("cat", "dog") and len(d.x_lb) == 8


def test_images_below_the_class_folders_count(folder):
    save(folder / "train/dog/brown/1.png")
    assert image_folder(folder).y_lb.tolist() == [0] * 4 + [1] * 5


# --- bad input -------------------------------------------------------------------------------------------------------

def test_bad_folders(folder, tmp_path):
    with pytest.raises(DataError, match="path does not exist: .*nowhere"): image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no folder train/"): image_folder(folder / "train")
    with pytest.raises(DataError, match="no folder train/"): image_folder(folder / "train/cat/0.png")
    with pytest.raises(DataError, match=r"class 0 \('cat'\) has 4 images, fewer than the 5"): image_folder(folder, 5)
    for n in (0, -3, 1.5, True, "2"):
        with pytest.raises(DataError, match="n_per_class must be a whole number >= 1"): image_folder(folder, n)
    with pytest.raises(DataError, match="image_size .*got 0"): image_folder(folder, image_size=0)
    with pytest.raises(DataError, match="unreadable must be"): image_folder(folder, unreadable="ignore")
    save(folder / "test/fox/0.png")
    with pytest.raises(DataError, match="class 'fox' is in .*test"): image_folder(folder)
    save(folder / "train/loose.png")
    with pytest.raises(DataError, match="loose.png lies outside"): image_folder(folder)


def test_folders_without_images(folder, tmp_path):
    (folder / "train/empty").mkdir()
    (folder / "train/empty/photo.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"class 'empty' has no images in .*1 x .heic"): image_folder(folder)
    (tmp_path / "b/train").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no images"): image_folder(tmp_path / "b")
    save(tmp_path / "b/train/only/0.png")
    with pytest.raises(DataError, match=r"one class only \('only'\)"): image_folder(tmp_path / "b")
    save(tmp_path / "b/train/other/0.png")
    (tmp_path / "b/test/only").mkdir(parents=True)
    with pytest.raises(DataError, match="test holds no images"): image_folder(tmp_path / "b")


def broken_files(folder):
    whole = save(folder / "train/cat/good.jpg", picture(size=(200, 200)), quality=95).read_bytes()
    bad = {"train/cat/empty.jpg": b"", "train/dog/text.png": b"this is no image",
           "test/cat/short.jpg": whole[:len(whole) // 2],
           "unlabelled/short.png": (folder / "unlabelled/0.png").read_bytes()[:120]}
    return {folder / name: content for name, content in bad.items()}


@pytest.mark.parametrize("which", range(4))
def test_a_broken_file_is_named(folder, which):
    file, content = list(broken_files(folder).items())[which]
    file.write_bytes(content)
    with pytest.raises(DataError, match=file.name): image_folder(folder)
    if which < 2: # a file that is cut short shows when it is decoded
        with pytest.raises(DataError, match=file.name): image_folder(folder, lazy=True)
    else:
        d = image_folder(folder, lazy=True)
        with pytest.raises(DataError, match=file.name): d.x_ulb[:], d.x_test[:]


@pytest.mark.parametrize("lazy", [False, True])
def test_broken_files_can_be_skipped_and_are_counted(folder, lazy):
    broken = broken_files(folder)
    before = image_folder(folder, 3, lazy=lazy)
    for file, content in broken.items(): file.write_bytes(content)
    after = check_dataset(image_folder(folder, 3, unreadable="skip", lazy=lazy))
    assert after.split.skipped == 4 and before.split.skipped == 0
    assert len(after.x_ulb) == len(before.x_ulb) and len(after.x_test) == len(before.x_test)
    with pytest.raises(DataError, match=r"class 1 \('dog'\) has 4 images"): image_folder(folder, 5, unreadable="skip")


def test_nothing_is_written(folder):
    def listing(): return sorted((str(f), f.stat().st_mtime_ns) for f in folder.rglob("*"))
    before = listing()
    image_folder(folder, 2)
    with pytest.raises(DataError): image_folder(folder, 99)
    assert listing() == before


def own(**changes):
    x = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    return Dataset(x[:2], torch.tensor([0, 1]), x, torch.tensor([0, 1, -1, -1, 7, 0]), x[:1], torch.tensor([1]),
                   ("a", "b"),
                   Split("own", 0, 1, torch.tensor([0, 1]), "0" * 16))._replace(**changes)


@pytest.mark.parametrize("changes, message", [
    (dict(x_lb=torch.zeros(2, 3, 8, 8)), "x_lb must be uint8"),
    (dict(x_ulb=np.zeros((6, 3, 8, 8), np.uint8)), "x_ulb must be a torch tensor .*ndarray"),
    (dict(x_test=torch.zeros(1, 8, 8, 3, dtype=torch.uint8)),
     r"x_test must have shape \(N, 3, H, W\), got \(1, 8, 8, 3\)"),
    (dict(x_ulb=torch.zeros(6, 3, 9, 9, dtype=torch.uint8)), "x_ulb holds images of"),
    (dict(x_ulb=torch.zeros(0, 3, 8, 8, dtype=torch.uint8), y_ulb=torch.zeros(0, dtype=torch.int64)),
     "x_ulb holds no images"),
    (dict(y_lb=torch.tensor([0, 1, 1])), "y_lb holds 3 labels for 2 images"),
    (dict(y_lb=torch.tensor([0, 2])), r"y_lb\[1\] is 2; allowed is 0 to 1"),
    (dict(y_lb=torch.tensor([0, -1])), r"y_lb\[1\] is -1"),
    (dict(y_test=torch.tensor([2])), r"y_test\[0\] is 2"),
    (dict(y_ulb=torch.tensor([0, 1, 0, 0, -2, 0])), r"y_ulb\[4\] is -2; allowed is >= -1"),
    (dict(y_lb=torch.tensor([0., 1.])), "y_lb must be an int64 tensor .*float32"),
    (dict(y_lb=[0, 1]), "y_lb must be an int64 tensor .*list"),
    (dict(y_lb=torch.tensor([0, 1], dtype=torch.int32)), "y_lb must be an int64"),
    (dict(y_lb=torch.tensor([1, 1])), r"class 0 \('a'\) has no labelled image"),
    (dict(classes=("a",)), "at least 2 classes, got 1"),
    (dict(split=own().split._replace(idx_lb=torch.tensor([0, 6]))), "2 positions from 0 to 5"),
])
def test_own_tensors(changes, message):
    check_dataset(own())
    with pytest.raises(DataError, match=message): check_dataset(own(**changes))


def test_labels_to_split():
    with pytest.raises(DataError, match="labels must be >= 0, got -1"): split_labels([0, 1, -1], 1, 0)
    with pytest.raises(DataError, match="whole numbers"): split_labels(torch.tensor([0., 1.]), 1, 0)
    with pytest.raises(DataError, match="class 1 has 0 images"): split_labels([0, 2], 1, 0)
    with pytest.raises(DataError, match="whole numbers"): split_labels([0, 1], 1, 0.5)
    with pytest.raises(DataError, match="no images"): split_labels(torch.zeros(0, dtype=torch.int64), 1, 0)
    with pytest.raises(DataError, match="n_per_class .*got 0"): split_labels([0, 1], 0, 0)
    assert split_labels(np.array([0, 1, 1]), 1, 0).tolist() == split_labels([0, 1, 1], 1, 0).tolist()


def test_holdout():
    d = digits(1, 100, known=6)
    h = check_dataset(holdout(d, n=300, seed=5))
    assert len(h.x_test) == 300 and len(h.x_ulb) == len(d.x_ulb) - 300 and h.y_test.max() == 5
    assert torch.equal(h.x_ulb[h.split.idx_lb], h.x_lb) and h.split.hash != d.split.hash
    assert not torch.equal(holdout(d, 300, seed=6).x_test, h.x_test)
    with pytest.raises(DataError, match="holdout of 5000"): holdout(d, 5000)
    with pytest.raises(DataError, match="the pool has 0 unlabelled"): holdout(digits(None, 0), 1)


# --- promises --------------------------------------------------------------------------------------------------------

def test_frozen_streams():
    "These numbers are a promise: every record belongs to splits and orders drawn with them."
    promised = [2740, 1071, 2192, 1383, 1144, 1145, 2526, 577, 2888, 2469]
    assert split_labels(torch.arange(3000) % 10, 1, 0).tolist() == promised
    assert digits(1, 0).split.hash == "169d5890d1342e03" and digits(4, 9, known=6).split.hash == "76ecdde314c0e2d6"
    assert batch_indices(0, 3, 10, 8).tolist() == [9, 4, 0, 3, 1, 6, 4, 7]
    assert batch_indices(1, 999, 5000, 4, 2).tolist() == [3635, 4764, 4899, 2859]
    assert torch.randint(1000, (4,), generator=generator(0, 3, 1)).tolist() == [828, 309, 169, 295]


def test_splits_do_not_depend_on_the_process():
    code = "from finessl.data import *; print(digits(2, 7).split.hash, batch_indices(1, 50, 1397, 6).tolist())"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env=dict(os.environ, PYTHONHASHSEED=h, PYTHONPATH=os.pathsep.join(sys.path))).stdout
            for h in "12"}
    assert runs == {f"{digits(2, 7).split.hash} {batch_indices(1, 50, 1397, 6).tolist()}\n"}


def test_large_sampler_keeps_few_permutations():
    for step in range(0, 400_000, 40_000): batch_indices(0, step, 1_280_000, 32)
    assert permutation_cache(1_280_000).cache_info().currsize <= 4
    row = torch.cat([batch_indices(3, s, 5000, 64) for s in range(200)])
    for epoch in itertools.islice(row.split(5000), 2): assert torch.equal(epoch.sort().values, torch.arange(5000))


# --- found by name ---------------------------------------------------------------------------------------------------

def test_what_reads_folders_is_found_in_data():
    "Old import paths keep working, and nothing of the workshop's folders is imported before it is asked for."
    code = ("import sys, finessl.data as d; assert 'finessl.engine.folders' not in sys.modules;"
            "from finessl.data import image_folder, image_lists, read_image, ImageFiles, DataError, UnreadableError;"
            "print(image_folder.__module__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
    assert done.stdout == "finessl.engine.folders\n"
    with pytest.raises(ImportError, match="image_folders"): from finessl.data import image_folders  # noqa: F401


def test_checks_are_found_by_name():
    import finessl.checks
    named = [n for n in dir(finessl.checks) if n.startswith("check_")]
    for name in named: assert callable(getattr(finessl.checks, name)), name
    texts = [f.read_text(encoding="utf-8") for f in Path(finessl.checks.__path__[0]).glob("*.py")]
    defined = [name for text in texts for name in re.findall(r"^def (check_\w+)", text, re.M)]
    assert len(defined) > 20 and sorted(defined) == sorted(named), "a name twice, or one that is not found"
    with pytest.raises(AttributeError, match="no 'check_nothing'"): finessl.checks.check_nothing
