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
    assert "labels one class" in refused(*train, "--labels", table)
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


def test_a_file_is_known_however_its_name_was_written(tmp_path):
    import unicodedata, os
    (tmp_path / "p").mkdir()
    apart = unicodedata.normalize("NFD", "bär.png")           # as a Mac writes it
    odd = [" lead.png", "~t.png", "=1+1.png", "a\rb.png", "n\nl.png", 'q"q.png', "q,c.png", apart]
    for name in odd: Image.new("RGB", (8, 8)).save(tmp_path / "p" / name)
    def found(*files):
        with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([("file", "label"), *zip(files, "ab" * len(files))])
        return [file.rsplit("/", 1)[-1] for file in from_table(tmp_path / "t.csv", tmp_path / "p").x_lb.files]
    assert found(*odd) == odd and found("bär.png", " lead.png", apart) == [apart, " lead.png"]
    with pytest.raises(DataError, match="line 3: file"): found("~t.png", "x" * 5000)
    if os.name != "posix": return
    for name in (b"caf\xe9.png", "über.png".encode()): (tmp_path / "p" / os.fsdecode(name)).write_bytes(
        (tmp_path / "p" / "~t.png").read_bytes())
    (tmp_path / "t.csv").write_bytes("file,label\ncaf".encode() + b"\xe9.png,a\n\xc3\xbcber.png,b\n")
    assert len(from_table(tmp_path / "t.csv", tmp_path / "p").x_lb) == 2      # neither way of writing hides the other


def test_suggestions_can_be_filled_in_and_read_back_whatever_images_are_called(tmp_path):
    (tmp_path / "p").mkdir()
    for i, name in enumerate(("=1+1.png", "-x.png", "a\rb.png", "n\nl.png", " lead.png", "ü.png")):
        Image.frombytes("RGB", (8, 8), random.Random(i).randbytes(192)).save(tmp_path / "p" / name)
    out = tmp_path / "t.csv"
    assert cli_main.main(["suggest", str(tmp_path / "p"), "--budget", "9", "--out", str(out)]) == 0
    rows = list(csv.reader(io.StringIO(out.read_bytes().decode(), newline="")))[1:]
    assert len(rows) == 6 and not any(row[0][:1] in "=+-@" for row in rows)
    with open(out, "w", newline="", encoding="utf-8") as f:
        lines = [(r[0], "ab"[i % 2], "test" * (i > 3)) for i, r in enumerate(rows)]
        csv.writer(f).writerows([("file", "label", "split"), *lines])
    ds = from_table(out, tmp_path / "p")
    assert (len(ds.x_lb), len(ds.x_test)) == (4, 2)
    more = ["suggest", str(tmp_path / "p"), "--budget", "1", "--labels", str(out), "--out", str(tmp_path / "more.csv")]
    assert cli_main.main(more) == 0                            # what is for the test stays for the test
    again = from_table(tmp_path / "more.csv", tmp_path / "p")
    assert again.x_test.files == ds.x_test.files and again.x_lb.files == ds.x_lb.files


def test_labels_that_were_filled_in_are_not_written_over(photos, tmp_path, refused, capsys):
    out, other = tmp_path / "t.csv", tmp_path / "other.csv"
    suggest = ["suggest", str(photos), "--budget", "3", "--out", str(out)]
    assert cli_main.main(suggest) == cli_main.main(suggest) == 0              # nobody has filled it in
    lines = out.read_text(encoding="utf-8").splitlines()
    out.write_text("\n".join([lines[0], lines[1] + "bär", *lines[2:]]) + "\n", encoding="utf-8")
    before = out.read_bytes()
    capsys.readouterr()
    assert "holds labels" in refused(*suggest) and out.read_bytes() == before
    out.write_bytes(b"file,label,split\r\nx.png,a,test\r\n")   # of a review
    assert "holds labels" in refused(*suggest)
    out.write_bytes(before)
    kept = [*suggest[:-1], str(other), "--labels", str(out)]
    assert cli_main.main(kept) == cli_main.main(kept) == 0     # the new table holds what the old one held
    assert cli_main.main([*suggest, "--overwrite"]) == 0


def test_frames_of_other_libraries(photos):
    pd = pytest.importorskip("pandas")
    make = lambda labels, **kw: from_table(pd.DataFrame({"file": NAMES[:6], "label": labels}), photos, **kw)
    for missing in (None, float("nan"), pd.NA, pd.NaT):
        assert make(pd.Series(["a", "a", "a", "b", "b", missing], dtype=object)).y_lb.tolist() == [0, 0, 0, 1, 1]
    assert make(pd.array(["a", "b", "b", "b", "b", None], dtype="string")).classes == ("a", "b")
    assert make(pd.array([2, 10, 2, 2, 2, None], dtype="Int64")).classes == ("2", "10")
    assert make([2, 10, 2, 2, 2, None]).classes == ("2", "10") # blanks have made floats of them
    with pytest.raises(DataError, match="line 2: a cell holds list"): make([["a"], ["b"]] * 3)
    class Polars:
        columns = ["file", "label"]
        def iter_rows(self): return iter(zip(NAMES, "abababab"))
    assert from_table(Polars(), photos).classes == ("a", "b")


def test_a_table_that_is_no_unicode_says_so(photos, tmp_path, capsys):
    table = tmp_path / "t.csv"
    lines = "".join(f"{n},Bär {i % 2}\n" for i, n in enumerate(NAMES))
    table.write_bytes(f"file,label\n{lines}".encode("cp1252"))
    assert from_table(table, photos).classes == ("Bär 0", "Bär 1")
    assert "is no UTF-8" in capsys.readouterr().err
    table.write_bytes(b"file,label\nx.png,\x81A\ny.png,\x8dA\n") # both would be read as one
    with pytest.raises(DataError, match="line 2: this is no UTF-8; save the table as CSV UTF-8"): read_table(table)
    table.write_text("sep=;\nfile;label\nx.png;a,b\n")
    assert read_table(table)[0][:3] == (3, "x.png", "a,b")


def test_labels_that_look_alike_are_one(tmp_path, photos):
    table = tmp_path / "t.csv"
    table.write_text(f"file,label\n{NAMES[0]},cat\n{NAMES[1]},cat\u200b\n{NAMES[2]},dog\n", encoding="utf-8")
    with pytest.raises(DataError, match="lines 2 and 3: labels 'cat' and 'cat"): from_table(table, photos)


def test_a_table_of_a_linked_folder_and_of_the_folder_are_one_split(photos, tmp_path):
    link, table = tmp_path / "link", tmp_path / "t.csv"
    link.symlink_to(photos)
    table.write_text("file,label\n" + "".join(f"{n},{n.split()[0]}\n" for n in NAMES), encoding="utf-8")
    assert from_table(table, link).split.hash == from_table(table, photos).split.hash


def test_what_a_table_does_not_say_is_said(tmp_path, capsys):
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("RGB", (8, 8), (40 * i, 9, 9)).save(tmp_path / name)
    (tmp_path / "twin.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "d.heic").write_bytes(b"x")
    (tmp_path / "t.csv").write_text("file,label,split\na.png,ant,\nb.png,bee,\nc.png,bee,test\ntwin.png,bee,\n")
    from_table(tmp_path / "t.csv", tmp_path)
    said = capsys.readouterr().err
    assert "1 x .heic" in said and "the same image in two classes" in said
    (tmp_path / "u.csv").write_text("file,art\na.png,ant\nb.png,bee\n")
    with pytest.raises(DataError, match="holds no labels: .* label_column"): from_table(tmp_path / "u.csv", tmp_path)
    (tmp_path / "v.csv").write_text("file,label\na.png,ant\nb.png,bee\n")
    for fraction in ("0.5", float("nan"), 1, -.1):
        with pytest.raises(ValueError, match="test_fraction"): from_table(tmp_path / "v.csv", test_fraction=fraction)
    with pytest.raises(DataError, match="n_per_class"): from_table(tmp_path / "t.csv", n_per_class=0)


def test_the_limit_of_megapixels_holds_for_a_table(photos, tmp_path, refused):
    table = tmp_path / "t.csv"
    table.write_text("file,label\n" + "".join(f"{n},{n.split()[0]}\n" for n in NAMES), encoding="utf-8")
    said = refused("train", "--data", photos, "--labels", table, "--max-megapixels", "1e-5", "--out", tmp_path / "run",
                   "--peft", "linear", "--steps", 1)
    assert "megapixels" in said
