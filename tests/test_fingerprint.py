"A resume goes on over the same images, wherever they lie now, and over no others."
import os, shutil, signal
import numpy as np
import pytest
import torch
from PIL import Image
from finessl.algorithms import FineSSL
from finessl.backbone import load_backbone
from finessl.data import Dataset, digits, holdout
from finessl.engine import fingerprint
from finessl.engine.checkpoint import comparable
from finessl.engine.errors import TrainingError
from finessl.engine.fingerprint import digest_files, file_digest, image_codes, part_code, sample_evenly
from finessl.engine.folders import image_folder, image_lists
from finessl.engine.images import ImageFiles
from finessl.engine.schedule import Schedule
from finessl.engine.storage import lock_folder
from finessl.training import fit


@pytest.fixture(scope="module")
def encoder(): return load_backbone("pocket")


@pytest.fixture
def root(tmp_path):
    "Two classes, in BMP: files of one size in bytes."
    numbers = {"train/cat": 3, "train/dog": 3, "test/cat": 2, "test/dog": 2, "unlabelled": 4}
    for k, (part, n) in enumerate(numbers.items()):
        for i in range(n):
            (tmp_path / "photos" / part).mkdir(parents=True, exist_ok=True)
            pixels = np.random.RandomState(10 * k + i).randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / part / f"{i}.bmp")
    return tmp_path / "photos"


def as_lists(root):
    for name, part in (("labelled", "train"), ("test", "test"), ("unlabelled", "unlabelled")):
        lines = [f"{f.relative_to(root).as_posix()}" + ("" if part == "unlabelled" else f"\t{f.parent.name}")
                 for f in sorted((root / part).rglob("*.bmp"))]
        (root / f"{name}.txt").write_text("\n".join(lines))
    return image_lists(root, image_size=32)


MAKE = {"in memory": image_folder, "in files": lambda root: image_folder(root, lazy=True), "lists": as_lists}
OTHERS = {"labelled": "train/cat/1.bmp", "unlabelled": "unlabelled/2.bmp", "test": "test/dog/0.bmp"}


def replace(root, name): shutil.copy(root / "unlabelled/0.bmp", root / name)


@pytest.mark.parametrize("how", MAKE)
def test_codes_of_parts(root, how):
    before = image_codes(MAKE[how](root))
    for part, name in OTHERS.items():
        kept = (root / name).read_bytes()
        replace(root, name)
        after = image_codes(MAKE[how](root))
        changed = {p for p in before if before[p] != after[p]}
        assert changed == ({"labelled", "unlabelled"} if part == "labelled" else {part}) # the pool holds the labelled
        (root / name).write_bytes(kept)
    root.rename(root.parent / "moved")
    assert image_codes(MAKE[how](root.parent / "moved")) == before


def run(encoder, ds, out, resume=False, stop=None):
    "A run of eight steps; Ctrl-C in step `stop`."
    real, calls = FineSSL.__call__, []
    def call(self, step, state):
        calls.append(1)
        if len(calls) == stop: signal.raise_signal(signal.SIGINT)
        return real(self, step, state)
    FineSSL.__call__ = call
    try: return fit(ds, encoder, FineSSL(), out=out, resume=resume, n_prompts=2, schedule=Schedule(8), batch=4, evals=1,
                    progress=False)
    finally: FineSSL.__call__ = real


@pytest.mark.parametrize("how", MAKE)
@pytest.mark.parametrize("part", [None, *OTHERS])
def test_a_resume_over_other_images_is_refused(root, tmp_path, encoder, how, part):
    with pytest.raises(KeyboardInterrupt): run(encoder, MAKE[how](root), tmp_path / "run", stop=5)
    if part is None: # the same images elsewhere are the same
        root = root.rename(tmp_path / "moved")
        assert run(encoder, MAKE[how](root), tmp_path / "run", True).record["resumes"][0]["step"] == 5
        return
    replace(root, OTHERS[part])
    with pytest.raises(TrainingError, match=rf"belongs to another run \(.*images\.{part}: '\w+' there, '\w+' here"):
        run(encoder, MAKE[how](root), tmp_path / "run", True)
    assert (tmp_path / "run/checkpoint.pt").exists()


def test_where_files_may_be_left_out_other_images_are_said(root, tmp_path, encoder, capsys):
    make = lambda: image_folder(root, lazy=True, unreadable="skip")
    with pytest.raises(KeyboardInterrupt): run(encoder, make(), tmp_path / "run", stop=5)
    replace(root, OTHERS["test"])
    record = run(encoder, make(), tmp_path / "run", True).record
    (said,) = record["resumes"][0]["changed"]
    assert said.startswith("images.test: ") and said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x_lb", "y_lb", "x_ulb", "x_test", "y_test"])
def test_tensors_of_ones_own(tmp_path, encoder, name):
    ds = digits(1, 0)._replace(split=None)
    ds = ds._replace(x_ulb=ds.x_ulb[:30], y_ulb=ds.y_ulb[:30], x_test=ds.x_test[:20], y_test=ds.y_test[:20])
    with pytest.raises(KeyboardInterrupt): run(encoder, ds, tmp_path / "run", stop=5)
    x = getattr(ds, name).flip(0)
    with pytest.raises(TrainingError, match="belongs to another run"):
        run(encoder, ds._replace(**{name: x}), tmp_path / "run", True)
    assert run(encoder, ds, tmp_path / "run", True).record["images"] == image_codes(ds)


def test_a_checkpoint_without_codes_goes_on():
    new = {"seed": 0, "images": {"test": "a"}, "dataset": {"source": "folder:a", "hash": "h"}}
    old = {"seed": 0, "dataset": {"source": "folder:b", "hash": "h"}}
    a, b = comparable(old, new)
    assert a == b
    a, b = comparable(new, new | {"images": {"test": "b"}})
    assert a != b
    a, b = comparable(old, new | {"dataset": {"source": "folder:b", "hash": "i"}})
    assert a != b and a["dataset"]["source"] == "folder:b" # named, where it is another data set


def test_a_holdout_is_another_data_set(root):
    ds = image_folder(root)
    cut = holdout(ds._replace(y_ulb=torch.cat([ds.y_ulb[:6], torch.tensor([0, 1, 0, 1])]),
                              split=ds.split._replace(idx_lb=ds.split.idx_lb[:0])), 2)
    assert not set(image_codes(cut).values()) & set(image_codes(ds).values())


def test_large_parts_are_sampled(tmp_path, monkeypatch):
    assert sample_evenly(5) == [0, 1, 2, 3, 4] and sample_evenly(1_281_167)[:3] == [0, 64, 128]
    picked = sample_evenly(1_281_167)
    assert len(picked) == len(set(picked)) == fingerprint.SAMPLED == 20_000 and picked[-1] < 1_281_167
    for i in range(9): (tmp_path / f"{i}.png").write_bytes(bytes([i]))
    files = ImageFiles([tmp_path / f"{i}.png" for i in range(9)], 8)
    monkeypatch.setattr(fingerprint, "sample_evenly", lambda n: [0, 4])
    code = part_code(files)
    assert len(digest_files([files.files])) == 2
    (tmp_path / "1.png").write_bytes(b"other") # not looked at, and so the notebook says
    assert part_code(files) == code
    (tmp_path / "4.png").write_bytes(b"other")
    assert part_code(files) != code


def test_what_cannot_be_read_has_no_digest(tmp_path):
    assert file_digest(tmp_path) is None and file_digest(tmp_path / "gone") is None and file_digest("a\0b") is None
    (tmp_path / "empty").touch()
    assert file_digest(tmp_path / "empty") and file_digest(tmp_path / "empty", whole=True)


def test_large_tensors_are_sampled():
    x = torch.zeros(1, 3, 8192, 8192, dtype=torch.uint8).expand(40, -1, -1, -1) # 8 GB, were it copied
    ds = Dataset(x, torch.zeros(40, dtype=torch.int64), x, torch.zeros(40), x[:0], torch.zeros(0), ("a", "b"))
    assert len(set(image_codes(ds).values())) == 3


def test_files_named_in_several_ways_have_a_code(root, monkeypatch):
    monkeypatch.chdir(root)
    whole = part_code(ImageFiles([root / "train/cat/0.bmp", root / "train/dog/0.bmp"], 32))
    mixed = [root / "train/cat/0.bmp", "train/dog/0.bmp"], [os.fsencode(root / "train/cat/0.bmp"), "train/dog/0.bmp"]
    assert [part_code(ImageFiles(files, 32)) for files in mixed] == [whole] * 2


def test_a_checkpoint_of_a_stranger_is_no_traceback(root, tmp_path, encoder):
    import io, hashlib, pickle
    for content in (b"", b"garbage", pickle.dumps(os.getcwd), [1], {"settings": 5},
                    {"format": 99, "settings": "{}"}):
        payload = io.BytesIO()
        if not isinstance(content, bytes): torch.save(content, payload)
        body = content if isinstance(content, bytes) else payload.getvalue()
        with lock_folder(tmp_path / "run") as held:
            held.write("checkpoint.pt", hashlib.sha256(body).digest() + body)
        newer = isinstance(content, dict) and "format" in content
        says = "a newer version" if newer else "is torn, or not a checkpoint"
        with pytest.raises(TrainingError, match=says):
            fit(image_folder(root, image_size=32), encoder, FineSSL(), steps=2, batch=4, n_prompts=2, evals=1,
                out=tmp_path / "run", resume=True, progress=False)
