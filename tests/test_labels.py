"""Labels in a table: whoever wrote it, a slip of the pen is named with its line, and nothing else ever happens."""
import csv, io, random

import pytest
import torch
from PIL import Image

from finessl.cli import main as cli_main
from finessl.engine.errors import DataError
from finessl.engine.tables import from_table, read_table
from finessl.labelling import typical_images

NAMES = [f"{c} {i}.png" for c in ("bär", "eule") for i in range(4)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    where = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(NAMES): Image.new("RGB", (8, 8), (30 * i, 90, 20)).save(where / name)
    return where


@pytest.fixture
def refused(capsys):
    def run(*argv):
        code = cli_main.main([str(a) for a in argv])
        err = capsys.readouterr().err
        assert code == 2 and err.startswith("finessl: error: ") and err.count("\n") == 1, (code, err)
        return err
    return run


def table_text(separator=",", end="\n", quote=csv.QUOTE_MINIMAL):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=end, quoting=quote)
    writer.writerow(("Filename", "Species"))
    writer.writerows((name, name.split()[0] if i % 2 else "") for i, name in enumerate(NAMES))
    return out.getvalue()


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_who_wrote_a_table_does_not_matter(photos, tmp_path, code, separator, end):
    table = tmp_path / "labels.csv"
    table.write_bytes(table_text(separator, end, csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL).encode(code))
    ds = from_table(table, photos)
    assert ds.classes == ("bär", "eule") and ds.y_lb.tolist() == [0, 0, 1, 1] and len(ds.x_ulb) == 8
    assert [f.rsplit("/")[-1] for f in ds.x_lb.files] == NAMES[1::2]


def test_a_file_is_found_wherever_it_may_be_meant(photos, tmp_path):
    (photos / "deep").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(photos / "deep" / "x.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "beside.png")
    lines = [(photos / NAMES[0], "a"), ("deep\\x.png", "b"), ("beside.png", "b"), (NAMES[1], "a")]
    (tmp_path / "t.csv").write_text("file,label\n" + "".join(f"{f},{l}\n" for f, l in lines), encoding="utf-8")
    ds = from_table(tmp_path / "t.csv", photos)
    assert ds.y_lb.tolist() == [0, 1, 1, 0] and len(ds.x_ulb) == 10 and len(ds.x_test) == 0


def test_a_split_of_a_table_is_the_same_again_and_another_with_another_seed(photos, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("file,label\n" + "".join(f"{n},{n.split()[0]}\n" for n in NAMES), encoding="utf-8")
    make = lambda seed: from_table(table, photos, 1, seed, test_fraction=.5)
    a, b = make(0), make(0)
    assert a.x_lb.files == b.x_lb.files and a.x_test.files == b.x_test.files and a.split.hash == b.split.hash
    assert len(a.x_test) == 4 and len(a.x_lb) == 2 and not {*a.x_test.files} & {*a.x_ulb.files}
    assert any(make(s).x_test.files != a.x_test.files for s in range(1, 6))
    assert (a.x_ulb[a.split.idx_lb] == a.x_lb[:]).all()


def test_whatever_stands_in_a_table_is_read_or_refused(tmp_path):
    rng, table, read, refused = random.Random(0), tmp_path / "t.csv", 0, 0
    whole = [table_text(s, e).encode(c) for s in ",;\t" for e in ("\n", "\r\n") for c in ("utf-8", "utf-16")]
    for _ in range(2000):
        raw = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 12)):
            i = rng.randrange(len(raw))
            what = rng.randrange(4)
            if what == 0: raw[i] = rng.randrange(256)
            elif what == 1: del raw[i:i + rng.randint(1, 9)]
            elif what == 2: raw[i:i] = rng.choice([b'"', b"\0", b"\r", b";;;", b"\xff\xfe", b"=1+1", b"\n" * 9])
            else: raw += raw[:i]
            if not raw: break
        table.write_bytes(raw)
        try: rows = read_table(table)
        except DataError as e:
            refused += 1
            assert str(table) in str(e)
        else:
            read += 1
            assert all(row.file and row.line > 1 for row in rows)
    assert read > 200 and refused > 200


def test_the_command_line_refuses_at_once(photos, tmp_path, refused):
    table, out = tmp_path / "t.csv", tmp_path / "run"
    table.write_text("file,label\nbär 0.png,bär\n", encoding="utf-8")
    train = ("train", "--data", photos, "--out", out)
    assert "labels 1 class" in refused(*train, "--labels", table)
    assert "--file-column belongs to --labels" in refused(*train, "--file-column", "x")
    assert "--test-fraction belongs to --labels" in refused(*train, "--test-fraction", ".2")
    assert "file does not exist" in refused(*train, "--labels", tmp_path / "none.csv")
    digits = ("train", "--data", "digits", "--per-class", 1, "--out", out)
    assert "not to --data digits" in refused(*digits, "--labels", table)
    assert "needs --data, --labels or --preset" in refused("train", "--out", out)
    assert "folder does not exist" in refused("suggest", tmp_path / "none", "--budget", 3)
    assert "must be >= 1" in refused("suggest", photos, "--budget", 0)
    mine = tmp_path / "mine.csv"
    mine.write_text("my own notes\n")
    assert "mine.csv" in refused("suggest", photos, "--budget", 3, "--out", mine)
    assert mine.read_text() == "my own notes\n"
    assert not out.exists()


def test_images_of_one_kind_are_suggested_once():
    feat = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="finite"): typical_images(feat / 0, 3)
    assert len(typical_images(feat[:1].repeat(9, 1), 5)) == 1                 # nine copies of one image
    chosen = typical_images(feat, 40)
    assert sorted(chosen.tolist()) == list(range(30))                         # all, where the budget is larger
    assert len(typical_images(feat, 30, labelled=range(28))) == 2


def test_a_broken_image_is_left_out_and_counted(photos, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    for name in NAMES: (tmp_path / "p" / name).write_bytes((photos / name).read_bytes())
    (tmp_path / "p" / NAMES[0]).write_bytes(b"no image")
    assert cli_main.main(["suggest", str(tmp_path / "p"), "--budget", "8", "--out", str(tmp_path / "t.csv")]) == 0
    assert "left out as unreadable: 1 of 8 files" in capsys.readouterr().err
    lines = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "file,label" and not any(NAMES[0] in line for line in lines) and len(lines) > 1
