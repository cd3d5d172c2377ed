"What is not read of a folder or a list is said once; what is clearly meant is used; images in two places are named."
import os, unicodedata
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from finessl.data import check_dataset
from finessl.engine import parts
from finessl.engine.atomic import say_once
from finessl.engine.errors import DataError
from finessl.engine.folders import image_folder, image_lists
from finessl.engine.lists import find_lists, read_list, split_line
from finessl.engine.parts import list_images

posix = pytest.mark.skipif(os.name == "nt", reason="links and pipes as POSIX has them")


def save(file, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (12, 12, 3), dtype=np.uint8)).save(file, format="PNG")
    return file


@pytest.fixture(autouse=True)
def notes(capsys):
    "What is said since the last call."
    say_once.cache_clear()
    return lambda: capsys.readouterr().err.replace("finessl: note: ", "")


@pytest.fixture
def root(tmp_path):
    "Two classes of three images, two for the test each, four without a label."
    numbers = iter(range(100))
    for part, n in {"train/cat": 3, "train/dog": 3, "test/cat": 2, "test/dog": 2, "unlabelled": 4}.items():
        for i in range(n): save(tmp_path / "photos" / part / f"{i}.png", next(numbers))
    return tmp_path / "photos"


def sizes(dataset): return len(dataset.x_lb), len(dataset.x_ulb), len(dataset.x_test)


# --- folders ---------------------------------------------------------------------------------------------------------

def test_a_plain_folder_says_nothing(root, notes):
    for name in (".DS_Store", "train/.ipynb_checkpoints/a.png", "train/cat/Thumbs.db", "train/cat/._0.png",
                 "train/dog/notes.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    assert sizes(check_dataset(image_folder(root))) == (6, 10, 4) and not notes()


def test_hidden_folders_of_images_are_named(root, notes):
    for name in ("train/.birds/0.png", "unlabelled/more/.kept/1.png", "test/.old/2.png"):
        (root / name).parent.mkdir(parents=True)
        save(root / name, 70)
    (root / "train/.empty").mkdir()
    assert sizes(check_dataset(image_folder(root))) == (6, 10, 4)
    assert sorted(notes().splitlines()) == [
        f"not read in {root / 'test'}: .old/ (hidden)", f"not read in {root / 'train'}: .birds/ (hidden)",
        f"not read in {root / 'unlabelled'}: more/.kept/ (hidden)"]


@pytest.mark.parametrize("part, names", [
    ("unlabelled", ["unlabeled", "Unlabelled", "UNLABELED", "un-labelled", "un_labeled"]),
    ("test", ["Test", "TEST", "testing"]), ("train", ["Train", "training", "labelled", "Labeled"])])
def test_a_part_in_other_spelling_is_used(root, notes, part, names):
    want, now = image_folder(root), part
    for name in names:
        (root / now).rename(root / "between")
        (root / "between").rename(root / name)
        got, now = image_folder(root), name
        assert all(torch.equal(a, b) for a, b in zip(got[:6], want[:6])) and not notes()
        assert got.split.hash == want.split.hash or part == "train" # which names the files that are labelled


def test_two_folders_for_one_part(root, notes):
    (root / "unlabelled").rename(root / "unlabeled")
    save(root / "Unlabelled/a.png", 50)
    if len(os.listdir(root)) < 4: pytest.skip("names differ in more than their case here")
    with pytest.raises(DataError, match=r"holds Unlabelled/ and unlabeled/; call the one that is meant unlabelled/"):
        image_folder(root)
    (root / "Unlabelled").rename(root / "unlabelled") # the very name is meant; the other one is named
    assert sizes(image_folder(root)) == (6, 7, 4)
    assert notes() == f"not read in {root}: unlabeled/ (4 images)\n"


@pytest.mark.parametrize("name, hint", [("val", "test/"), ("Validation", "test/"), ("unlabbeled", "unlabelled/"),
                                        ("pool", None)])
def test_other_folders_are_named_with_their_count(root, notes, name, hint):
    (root / ("unlabelled" if hint != "test/" else "test")).rename(root / name)
    image_folder(root)
    assert notes() == f"not read in {root}: {name}/ (4 images" + (f"; if it is meant as {hint}, call it so)\n" if hint
                                                                   else ")\n")
    image_folder(root)
    assert not notes() # once


def test_folders_without_images_are_not_named(root, notes):
    (root / "docs").mkdir()
    (root / "docs/readme.txt").write_text("x")
    for i in range(5): save(root / f"extra{i}" / "a.png", 60 + i)
    image_folder(root)
    assert notes() == f"not read in {root}: extra0/ (1 image), extra1/ (1 image), extra2/ (1 image), and 2 more\n"


def test_endings_are_counted(root, notes):
    for name in ("train/cat/a.HEIC", "train/dog/b.heic", "train/movie.mp4", "unlabelled/IMG_1", "unlabelled/deep/IMG_2",
                 "unlabelled/c.\x1b[31m"):
        save(root / name, 7) if "HEIC" not in name else (root / name).write_bytes(b"x")
    image_folder(root)
    assert notes().splitlines() == [
        f"not read in {root}/train: 2 x .heic (read where the package pillow-heif is installed), 1 x .mp4",
        f"not read in {root}/unlabelled: 2 x no ending, 1 x .\\x1b[31m"]


def test_a_class_of_other_files_only(root):
    for file in (root / "train/cat").iterdir(): file.rename(file.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"class 'cat' has no images .*\(other files: 3 x .heic \(read where"):
        image_folder(root)


@posix
def test_links_are_read_once(root, tmp_path, notes):
    elsewhere = save(tmp_path / "disk/a.png", 70).parent
    (root / "unlabelled/disk").symlink_to(elsewhere)
    (root / "unlabelled/again").symlink_to(elsewhere)
    (root / "train/cat/round").symlink_to(root / "train")
    (root / "train/cow").symlink_to(elsewhere)
    d = image_folder(root)
    assert d.classes == ("cat", "cow", "dog")
    said = notes()
    assert "not read in" in said and "disk/ (a link to a folder that is read already)" in said
    assert len(d.x_ulb) == 6 + 1 + 4 + 1 + sum("round" in str(file) for file in list_images(root / "train/cat").files)
    os.symlink(root / "nowhere.png", root / "unlabelled/gone.png")
    with pytest.raises(DataError, match="gone.png"): image_folder(root)
    assert sizes(image_folder(root, unreadable="skip"))[2] == 4


@posix
def test_a_circle_of_links_ends(tmp_path):
    for a, b in ("ab", "bc", "ca"):
        save(tmp_path / a / "x.png")
        (tmp_path / a / b).symlink_to(tmp_path / b)
        (tmp_path / a / "self").symlink_to(tmp_path / a)
    assert len(list_images(tmp_path / "a").files) == 3 # each folder once, though linked without end


def test_folders_that_cannot_be_listed_are_named(root, monkeypatch, notes):
    (root / "unlabelled/private").mkdir()
    scandir = os.scandir
    def refusing(path="."):
        if str(path).endswith("private"): raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refusing)
    assert sizes(image_folder(root)) == (6, 10, 4)
    assert notes() == f"not read in {root}/unlabelled: private/ (permission denied)\n"


def test_a_systems_own_folders_are_no_classes(root, notes):
    for name in ("train/@eaDir/cat", "train/cat/@eaDir", "unlabelled/__MACOSX", "train/lost+found", "#recycle"):
        save(root / name / "a.png", 80)
    d = image_folder(root)
    assert d.classes == ("cat", "dog") and sizes(d) == (6, 10, 4)
    said = notes()
    assert "@eaDir/ (a system's own folder)" in said and "unlabelled: __MACOSX/ (a system's own folder)" in said


def test_accents_in_both_forms_are_one_class(root, notes):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (root / "train/cat").rename(root / "train" / composed)
    (root / "test/cat").rename(root / "test" / apart)
    d = image_folder(root)
    assert d.classes == (composed, "dog") and d.y_test.tolist() == [0, 0, 1, 1] and not notes()
    save(root / "train" / apart / "a.png", 90)
    if len(os.listdir(root / "train")) == 3:
        with pytest.raises(DataError, match="two folders whose names look the same"): image_folder(root)


def test_list_files_beside_folders_are_named(root, notes):
    (root / "unlabelled.txt").write_text("unlabelled/0.png\n")
    image_folder(root)
    assert notes() == f"not read in {root}, since its folders are: unlabelled.txt\n"


# --- the same image twice --------------------------------------------------------------------------------------------

def test_copies_are_named(root, notes):
    copy = lambda a, b: (root / b).write_bytes((root / a).read_bytes())
    image_folder(root)
    assert not notes()
    copy("train/cat/0.png", "train/cat/9.png") # one class, one part: nothing is wrong
    image_folder(root)
    assert not notes()
    copy("train/cat/0.png", "train/dog/9.png")
    copy("train/cat/1.png", "test/cat/9.png")
    copy("unlabelled/1.png", "test/dog/9.png")
    copy("train/dog/0.png", "unlabelled/9.png")
    image_folder(root)
    said = notes().splitlines()
    assert said[0].startswith("the same image in two classes: 1 time (train/cat/") and "train/dog/9.png" in said[0]
    assert said[1] == "a labelled image also without a label: 1 time (train/dog/0.png = unlabelled/9.png)"
    assert said[2].startswith("the same image in the test part and in training, so that the test is too kind: 2 times")
    assert len(said) == 3


def test_large_files_are_compared_whole(root, notes):
    a = (root / "unlabelled/0.png").read_bytes()
    (root / "unlabelled/a.png").write_bytes(a + bytes(2**20))
    (root / "test/cat/b.png").write_bytes(a + bytes(2**19) + b"1" + bytes(2**19 - 1)) # differs where no sample lies
    image_folder(root)
    assert "test part" not in notes()
    (root / "test/cat/b.png").write_bytes(a + bytes(2**20))
    image_folder(root)
    assert "unlabelled/a.png" in notes()


# --- lists -----------------------------------------------------------------------------------------------------------

LINES = { # a line -> path and label
    "a/1.png cat": ("a/1.png", "cat"), "a/1.png\tbig cat": ("a/1.png", "big cat"), "a/1.png,cat": ("a/1.png", "cat"),
    "a/1.png;cat": ("a/1.png", "cat"), "a/1.png, cat": ("a/1.png", "cat"), "a/1.png,cat,,": ("a/1.png", "cat"),
    '"a, b/1.png",cat': ("a, b/1.png", "cat"), '"a/""x"".png",cat': ('a/"x".png', "cat"),
    "a,b/1.png cat": ("a,b/1.png", "cat"), "a,b/1.png,cat": ("a,b/1.png", "cat"), "a/1.png\t": ("a/1.png", None),
    "a/my cat.png": ("a/my cat.png", None), "a/my cat.png cat": ("a/my cat.png", "cat"),
    "a/my cat.PNG,cat": ("a/my cat.PNG", "cat"), "n0144/1 3": ("n0144/1", "3"), "a/1.png": ("a/1.png", None),
    '"a/1.png"': ("a/1.png", None), '"my a/1.png" cat': ("my a/1.png", "cat"), "a/1;2.png cat": ("a/1;2.png", "cat")}


@pytest.mark.parametrize("line, pair", LINES.items(), ids=list(LINES))
def test_lines_of_all_programs(line, pair): assert split_line(line) == pair


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["\t", ",", ";", " "])
def test_letters_ends_marks_and_headings(tmp_path, code, end, mark):
    rows = [("path", "label"), ("a/ä.png", "größe"), ("b/2.png", "dog")]
    file = tmp_path / "labelled.csv"
    file.write_bytes(end.join(mark.join(row) for row in rows).encode(code))
    assert read_list(file) == rows[1:] and find_lists(tmp_path) == {"labelled": file}


def test_what_is_no_list(tmp_path):
    file = tmp_path / "labelled.txt"
    for raw in (b"a.png\0cat\n", b"\xff\xfea", bytes(range(256)) * 3, b"PK\x03\x04\0\0\0\0" * 9):
        file.write_bytes(raw)
        with pytest.raises(DataError, match="labelled.txt"): read_list(file)
    file.write_text("a/1.png cat\nb/2.png dog\n./a/1.png dog\n")
    with pytest.raises(DataError, match=r"line 3: './a/1.png' has the label 'dog' here and 'cat' in line 1"):
        read_list(file)
    (tmp_path / "Labeled.csv").write_text("a.png,b\n")
    assert find_lists(tmp_path) == {"labelled": file}
    file.rename(tmp_path / "labelled.tsv")
    with pytest.raises(DataError, match="call the one meant labelled.txt"): find_lists(tmp_path)


@posix
def test_names_are_bytes(tmp_path):
    save(tmp_path / os.fsdecode(b"caf\xe9.png"), 1), save(tmp_path / "b\u2028.png", 2)
    (tmp_path / "labelled.txt").write_bytes(b"caf\xe9.png\ta\n" + "b\u2028.png\tb\n".encode())
    assert image_lists(tmp_path, image_size=12).x_lb[:].shape == (2, 3, 12, 12)


@posix
def test_paths_of_windows(tmp_path):
    for name in ("a/1.png", "b/2.png", "c\\3.png"): save(tmp_path / name)
    (tmp_path / "labelled.txt").write_text("a\\1.png\nb\\2.png\nc\\3.png\tc\n")
    assert image_lists(tmp_path).classes == ("a", "b", "c")
    assert [Path(file).name for file in image_lists(tmp_path).x_lb.files] == ["1.png", "2.png", "c\\3.png"]


def test_numbers_in_any_order_are_in_one():
    from finessl.engine.folders import class_names
    assert class_names(["10", "2", "1"]) == ("1", "2", "10") == class_names({"2", "1", "10"})
    assert class_names(["1", "01", "001"]) == class_names(["001", "1", "01"]) == ("001", "01", "1")
    assert class_names(["1", "²"]) == ("1", "²")


def make_lists(root, **more):
    for name, part in (("labelled", "train"), ("test", "test"), ("unlabelled", "unlabelled")):
        lines = [f.relative_to(root).as_posix() + ("" if part == "unlabelled" else f"\t{f.parent.name}")
                 for f in sorted((root / part).rglob("*.png"))]
        (root / f"{name}.txt").write_text("\n".join(lines + more.get(name, [])))


def test_lists_and_what_lies_beside(root, notes):
    make_lists(root)
    assert sizes(image_lists(root)) == (6, 10, 4) and not notes()
    (root / "unlabelled.txt").unlink()
    assert sizes(image_lists(root)) == (6, 6, 4)
    said = "there are list files, and none is called unlabelled.txt"
    assert notes() == f"{root}/unlabelled is not read (4 images): {said}\n"


def test_lists_that_say_an_image_twice(root, notes):
    make_lists(root, labelled=["train/cat/0.png\tcat"], test=["train/dog/1.png\tdog"])
    image_lists(root)
    assert notes().splitlines() == [
        "1 of 7 lines of the labelled list stand there twice",
        "1 images are both labelled and for the test, so that the test is too kind (train/dog/1.png)"]
    make_lists(root)
    (root / "unlabelled/copy.png").write_bytes((root / "test/cat/0.png").read_bytes())
    make_lists(root)
    image_lists(root)
    assert "the same image in the test part and in training" in notes()


def test_the_limit_of_pixels_reaches_files(root):
    with pytest.raises(DataError, match="megapixels"): image_folder(root, max_megapixels=1e-4)
    make_lists(root)
    assert image_lists(root, image_size=12, max_megapixels=1e-3).x_lb[:].shape == (6, 3, 12, 12)
    with pytest.raises(DataError, match="megapixels"): image_lists(root, max_megapixels=1e-4).x_lb[:]
    assert parts.list_images(root / "unlabelled").files


def test_classes_that_differ_in_case_alone_are_named(root, notes):
    if (root / "train/CAT").exists(): return                   # one folder, where case means nothing
    save(root / "train/Cat/1.png", 90)
    image_folder(root, image_size=12)
    assert "'Cat' and 'cat' differ in upper and lower case alone" in notes()


@pytest.mark.parametrize("name", ["cat\u200b", "cat ", "\u202ecat"], ids=ascii)
def test_classes_that_look_alike_are_refused(root, name):
    save(root / "train" / name / "1.png", 90)
    with pytest.raises(DataError, match="two folders whose names look the same"): image_folder(root, image_size=12)


def test_what_a_cloud_has_not_downloaded_is_named(root, notes):
    (root / "train/cat/.9.png.icloud").write_bytes(b"bplist")
    image_folder(root, image_size=12)
    assert "1 x .icloud (images that iCloud has not downloaded)" in notes()


@pytest.mark.parametrize("wrong", [True, None, 5, "yes"], ids=str)
def test_what_may_be_unreadable_is_a_word_or_names(root, wrong):
    with pytest.raises(DataError, match="unreadable must be"): image_folder(root, image_size=12, unreadable=wrong)


def test_a_pool_that_lies_among_the_classes_is_named(root, notes):
    save(root / "train/unlabelled/1.png", 90)
    image_folder(root, image_size=12)
    assert "unlabelled is read as a class; where its images have none, put it beside train/" in notes()


def test_slips_in_a_list_are_named_with_their_line(tmp_path):
    (tmp_path / "l.txt").write_text("x/1.png a\nx/2.png b\t \n", encoding="utf-8")
    assert read_list(tmp_path / "l.txt") == [("x/1.png", "a"), ("x/2.png", "b")]
    for text, says in {"x/1.png a\nx/2.png a\u200b\n": "line 2: label 'a.u200b' looks like 'a'",
                       'x/1.png a\n"' + "a" * 200_000 + ",x\n": "line 2: this is no line of a list"}.items():
        (tmp_path / "l.txt").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=says): read_list(tmp_path / "l.txt")


def test_a_list_as_windows_writes_it_in_the_west(root, notes):
    (root / "train/cat").rename(root / "train/café")
    names = [f"train/{k}/{i}.png,{label}" for k, label in (("café", "Bär"), ("dog", "chien")) for i in range(3)]
    folder = root / "train/café"
    for code in ("utf-8", "cp1252"):
        (root / "labelled.csv").write_bytes("\n".join(names).encode(code))
        ds = image_lists(root)
        assert ds.classes == ("Bär", "chien") and [Path(file).parent for file in ds.x_lb.files[:3]] == [folder] * 3
        ds.x_lb[:]
        assert ("cp1252" in notes()) == (code == "cp1252")
    (root / "labelled.csv").write_bytes(b"train/dog/0.png,B\x81r\n")
    with pytest.raises(DataError, match=r"labelled.csv, line 1: .* is no UTF-8; save the list in UTF-8"):
        image_lists(root)


def test_accents_in_a_list_are_those_on_the_disk(tmp_path):
    apart, together = (unicodedata.normalize(form, "ä.png") for form in ("NFD", "NFC"))
    save(tmp_path / apart)
    (tmp_path / "l.txt").write_text(f"{together} a\n", encoding="utf-8")
    (path, _), = read_list(tmp_path / "l.txt")
    assert (tmp_path / path).exists()
