"""A run as a page, and its labels corrected in a browser: no name becomes markup, and every click is on the disk."""
import csv, json, os, re, shutil, signal, threading, time, urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from finessl.cli import main as cli_main
from finessl.cli.report import inspect_run, page_of
from finessl.engine.page import MAGIC, build_page, policy
from finessl.engine.review import Corrections, ReviewServer
from finessl.engine.thumbnails import make_thumbnails

EVIL = ["<img src=x onerror=\"document.title='bad'\">", "=1+1", "</script><script>document.title='bad'</script>"]
BRIEF = "--peft linear --steps 3 --batch 4 --evals 1 --quiet".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A folder of images in three colours, a table with one wrong label, and a run on it; the current folder meanwhile."
    where = tmp_path_factory.mktemp("review")
    old, folder = os.getcwd(), where / "photos"
    folder.mkdir()
    rows = []
    for k, name in enumerate(EVIL):
        for i in range(14):
            file = f"{k}{i:02}.png"
            colour = tuple(60 + 12 * i if c == k else 20 + 3 * i for c in range(3))
            image = Image.new("RGB", (24, 24), colour)
            image.paste((255 - 9 * i,) * 3, (i, 3, i + 6, 20 - i))
            image.save(folder / file)
            if i < 9: rows.append((file, name, "test" if i > 5 else ""))
    rows[0] = (rows[0][0], EVIL[2], "")                                     # wrong
    shutil.copy(folder / "107.png", folder / "twin.png")                    # of a test image
    shutil.copy(folder / "212.png", folder / "<b onclick=alert(1)>.png")
    with open(where / "labels.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("file", "label", "split"), *rows])
    os.chdir(where)
    try:
        assert cli_main.main(["train", "--data", "photos", "--labels", "labels.csv", "--out", "run", *BRIEF]) == 0
        yield where
    finally: os.chdir(old)


@pytest.fixture
def refused(capsys):
    def go(*argv):
        code = cli_main.main([str(a) for a in argv])
        err = capsys.readouterr().err
        assert code == 2 and err.startswith("finessl: error: ") and err.count("\n") == 1, (code, err)
        return err
    return go


def arguments(*more):
    "The options of a command, as it gets them."
    return cli_main.make_parser().parse_args(["review", "--run", "run", *more])


@pytest.fixture(scope="module")
def seen(run): return inspect_run(arguments())


def test_a_report_stands_alone_and_no_name_is_markup(run):
    assert cli_main.main("report --run run".split()) == 0
    page = Path("run/report.html").read_bytes()
    assert page.startswith(MAGIC) and len(page) < 10e6
    text = page.decode()
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", text)
    assert text.count("<script") == 2 == text.count("</script>")
    assert "<img src=x" not in text and "<b onclick" not in text and "&lt;img src=x" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["classes"] == sorted(EVIL) and len(data["images"]["name"]) == 44
    files = sorted(p.name for p in Path("run").iterdir())
    assert files == [".finessl-run", "model.safetensors", "record.json", "report.html"]
    assert cli_main.main("report --run run".split()) == 0                    # its own page is written again


def test_what_is_found(seen):
    o, x, root, source = seen
    names = o["images"]["name"]
    pairs = {frozenset(names[i] for i in g["images"]): g["crosses"] for g in o["groups"]}
    assert pairs[frozenset(("107.png", "twin.png"))] is True
    assert pairs[frozenset(("212.png", "<b onclick=alert(1)>.png"))] is False
    assert "both in training and in the test part" in " ".join(o["warnings"])
    assert o["accuracy"]["n"] == 9 and sum(c["labelled"] for c in o["pool"]) == 18
    assert sum(c["model"] for c in o["pool"]) == 35                          # all but the test part
    record = json.loads(Path("run/record.json").read_text())
    assert o["accuracy"]["right"] == round(record["evaluations"][-1]["accuracy"] * 9)


def test_five_thousand_images_fit_into_ten_megabytes(seen):
    o, x, _, _ = seen
    n = 5016
    many = o | {"images": {k: (v * 114)[:n] for k, v in o["images"].items()}}
    noise = torch.randint(0, 256, (n, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes, px = make_thumbnails(noise, range(100))
    page = build_page(many, (codes, px), "many")
    assert 2e6 < len(page) < 10e6 and f"{sum(map(bool, codes))} of {n} images are shown, {px} px wide" in page
    assert all(codes[:100]) and sum(map(bool, codes)) > n / 2


def test_a_run_says_where_its_images_are_or_is_asked(run, refused, tmp_path):
    report = ("report", "--run")
    assert "holds no finished run" in refused(*report, tmp_path / "none")
    (tmp_path / "record.json").write_text("{}")
    assert "is no record of a run" in refused(*report, tmp_path)
    mine = tmp_path / "mine.html"
    mine.write_text("my page")
    assert "was not made by finessl" in refused(*report, "run", "--out", mine)
    assert "is read by this command" in refused(*report, "run", "--out", "run/model.safetensors", "--overwrite")
    assert "folder" in refused(*report, "run", "--out", tmp_path / "no" / "x.html")
    assert "--data gone: path does not exist" in refused(*report, "run", "--data", "gone")
    shutil.copytree("run", moved := tmp_path / "moved")
    for file in moved.glob("report*"): file.unlink()
    before = sorted(moved.iterdir())
    old = os.getcwd()
    os.chdir(tmp_path)                                                       # away from the images
    try: assert "photos, which moved was trained on, is not there; name it with --data" in refused(*report, "moved")
    finally: os.chdir(old)
    record = json.loads((moved / "record.json").read_text())
    for command in (None, "rm -rf /", "finessl train --help", "finessl train --data 'x", "finessl train --nonsense"):
        (moved / "record.json").write_text(json.dumps(record | {"command": command}))
        assert "does not say where its images are" in refused(*report, moved)
    other = tmp_path / "other.csv"
    other.write_text("file,label\n000.png,x\n001.png,y\n")
    assert "other classes than" in refused(*report, "run", "--data", "photos", "--labels", other)
    assert sorted(moved.iterdir()) == before and mine.read_text() == "my page"


def test_a_damaged_image_is_named_or_left_out(run, refused, tmp_path, capsys):
    shutil.copytree("photos", tmp_path / "photos")
    (tmp_path / "photos" / "010.png").write_bytes(b"no image")
    words = ["report", "--run", "run", "--data", str(tmp_path / "photos"), "--labels", "labels.csv",
             "--out", str(tmp_path / "x.html")]
    assert "--skip-unreadable" in refused(*words) and not (tmp_path / "x.html").exists()
    assert cli_main.main([*words, "--skip-unreadable"]) == 0
    assert "Image files that cannot be read: 1." in (tmp_path / "x.html").read_text()


def test_review_refuses_a_port_in_use_and_images_without_files(run, seen, refused, tmp_path):
    o, x, _, _ = seen
    fixed = Corrections(tmp_path / "t.csv", *(o["images"][k] for k in ("name", "label", "kind")), o["classes"])
    with ReviewServer("", policy(True), x, fixed) as server:
        assert "cannot be had" in refused("review", "--run", "run", "--port", server.server_port)
    assert "is read by this command" in refused("review", "--run", "run", "--out", "labels.csv", "--overwrite")
    (tmp_path / "theirs.csv").write_bytes(b"file,label,split\r\nzebra.png,=1+1,\r\n")
    assert "names no image of this run" in refused("review", "--run", "run", "--out", tmp_path / "theirs.csv")
    assert not (tmp_path / "t.csv").exists()                                 # nothing was corrected


def test_ctrl_c_ends_a_review(run, capsys):
    said, page = [], []
    def reader():
        while not (address := re.search(r"http://127\.0\.0\.1:\d+/\S+", "".join(said))):
            said.append(capsys.readouterr().err)
            time.sleep(.05)
        with urllib.request.urlopen(address[0]) as answer: page.append(answer.read())
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=reader, daemon=True)
    thread.start()
    before = signal.getsignal(signal.SIGINT)
    assert cli_main.main("review --run run --out ctrl.csv".split()) == 0
    thread.join()
    assert page[0].startswith(MAGIC) and signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err == "finessl: labels changed: 0\n" and not Path("ctrl.csv").exists()


# ---- in a browser

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = [next(filter(None, map(shutil.which, names)), None)
                for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))]
    if None in programs: pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"): options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.implicitly_wait(10)
    yield driver
    driver.quit()


@pytest.fixture
def served(run, seen, tmp_path):
    "A server in a thread; as a second one on the same table would begin."
    o, x, _, _ = seen
    im, servers = o["images"], []
    def start():
        fixed = Corrections(tmp_path / "out.csv", im["name"], im["label"], im["kind"], o["classes"])
        servers.append(ReviewServer(page_of(o, x, "run", True), policy(True), x, fixed))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]
    yield start, tmp_path / "out.csv"
    for server in servers: server.shutdown(), server.server_close()


def table(path):
    with open(path, newline="", encoding="utf-8") as f: return {r["file"]: r["label"] for r in csv.DictReader(f)}


def until(found):
    "Wait for what a click brings about."
    for _ in range(200):
        if value := found(): return value
        time.sleep(.05)
    raise AssertionError(f"nothing happened for 10 s: {found()!r}")


def choose(browser, css, value):
    from selenium.webdriver.support.ui import Select
    Select(browser.find_element("css selector", css)).select_by_value(str(value))


def test_open_filter_correct_reload_undo(browser, served):
    start, out = served
    server = start()
    name, label, kind = (getattr(server.fixed, key) for key in ("names", "label", "kind"))
    browser.get(server.address)
    count, status = (browser.find_element("id", i) for i in ("count", "status"))
    until(lambda: count.text == "44 images, 44 shown")
    choose(browser, "#filter [name=which]", "unlabelled")
    until(lambda: count.text == "17 images, 17 shown")
    browser.find_element("css selector", "#filter [name=text]").send_keys("01")
    picked = [i for i, n in enumerate(name) if label[i] < 0 and "01" in n]
    until(lambda: count.text.startswith(f"{len(picked)} image"))
    mine, others = picked[:2], label.index(server.fixed.classes.index(EVIL[2]))
    for n, (i, k) in enumerate(((mine[0], 2), (mine[1], 1)), 1):
        choose(browser, f'#found [data-i="{i}"] select', k)
        until(lambda: status.text == f"{n} label{'s' * (n > 1)} changed, kept in out.csv")
        assert out.exists()                                                  # kept after every click
    choose(browser, "#filter [name=which]", "all")
    browser.find_element("css selector", "#filter [name=text]").clear()
    browser.execute_script("document.forms[0].dispatchEvent(new Event('input'))")
    choose(browser, f'#found [data-i="{others}"] select', -1)
    until(lambda: status.text.startswith("3 labels changed"))
    escaped = ["'" + c if c[0] == "=" else c for c in server.fixed.classes]
    expected = {name[mine[0]]: escaped[2], name[mine[1]]: escaped[1], name[others]: ""}
    assert {n: table(out)[n] for n in expected} == expected
    assert len(table(out)) == sum(k >= 0 for k in label) + 2

    browser.refresh()
    until(lambda: browser.find_element("id", "status").text.startswith("3 labels changed"))
    for i, k in ((mine[0], 2), (mine[1], 1), (others, -1)):
        select = browser.find_element("css selector", f'#found [data-i="{i}"] select')
        assert select.get_attribute("value") == str(k)
    browser.find_element("id", "undo").click()
    until(lambda: browser.find_element("id", "status").text.startswith("2 labels changed"))
    assert table(out)[name[others]] == escaped[label[others]]
    assert browser.title == "run – finessl"                                  # no name has run
    assert [m for m in browser.get_log("browser") if m["level"] == "SEVERE"] == []

    choose(browser, f'#found [data-i="{others}"] select', "new")             # a class that the run did not know
    alert = browser.switch_to.alert
    alert.send_keys(" <i>dog "), alert.accept()
    until(lambda: browser.find_element("id", "status").text.startswith("3 labels changed"))
    assert table(out)[name[others]] == "<i>dog"
    choose(browser, f'#found [data-i="{mine[0]}"] select', 3)                # every card offers it now
    until(lambda: table(out)[name[mine[0]]] == "<i>dog")
    for _ in range(2): browser.find_element("id", "undo").click(), time.sleep(.3)
    until(lambda: browser.find_element("id", "status").text.startswith("2 labels changed"))

    browser.get(start().address)                                             # another day
    until(lambda: browser.find_element("id", "status").text.startswith("2 labels changed"))
    again = ["--labels", str(out), "--out", str(out.parent / "again")]
    assert cli_main.main(["train", "--data", "photos", *again, *BRIEF]) == 0


def test_a_report_is_read_in_a_browser_with_and_without_its_script(browser, run, tmp_path):
    assert cli_main.main(["report", "--run", "run", "--out", str(tmp_path / "r.html")]) == 0
    browser.get((tmp_path / "r.html").as_uri())
    until(lambda: browser.find_element("id", "count").text == "44 images, 44 shown")
    shown = browser.execute_script("return [...document.images]."
                                   "every(i => i.loading === 'lazy' || i.naturalWidth > 0)")
    wide = browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert shown and wide and not browser.find_elements("css selector", ".card select, [onclick], [onerror]")
    assert browser.title == "run – finessl" and browser.get_log("browser") == []
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.refresh()
        assert not browser.find_element("id", "browse").is_displayed()
        assert len(browser.find_elements("css selector", ".card img")) >= 20
        assert browser.find_elements("css selector", "svg")
    finally: browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_table_of_a_review_that_others_have_edited(tmp_path):
    from finessl.engine.errors import UsageError
    make = lambda: Corrections(tmp_path / "t.csv", ["a.png", "b.png"], [0, 1], [0, 0], ["cat", "dog"])
    for cell in ("a" * 200_000, "nix.png,", "cat,,"):
        (tmp_path / "t.csv").write_bytes(f"file,label,split\r\na.png,cat,\r\nb.png,{cell},\r\n".encode())
        with pytest.raises(UsageError, match="line 3: .*name another file with --out"): make()
    (tmp_path / "t.csv").unlink()
    fixed = make()
    for name in ("Cat", "DOG "):                               # the table would be refused for them
        with pytest.raises(UsageError, match="there is a class '(cat|dog)' already"): fixed.set(0, name)
    fixed.set(0, "dog"), fixed.set(1, "bird")
    assert fixed.state()["labels"] == {0: 1, 1: 2} and make().state()["labels"] == {0: 1, 1: 2}
