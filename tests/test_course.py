"""A course from end to end: copies for students, marks for what they hand in, whatever that does.

The course here is a small one of its own, whose notebook imports nothing but `math`: a process costs a moment."""
import ast, csv, json, os, shutil, subprocess, sys
from pathlib import Path
import nbformat
import pytest
from nbclient import NotebookClient
from finessl.checks import raises
from finessl.cli.main import main
from finessl.course.exercises import (code_of, find_sources, read_exercises, read_mark, read_notebook, source_of,
                                      spoiled)
from finessl.course.grade import Limits, find_submissions, grade_all
from finessl.course.make import make_course
from finessl.course.sandbox import can_isolate
from finessl.course.student import find_function
from finessl.engine.errors import UsageError

root = Path(__file__).resolve().parent.parent
TASK = "### Exercise {} · {}\n*{} · difficulty 1 of 5 · 5 minutes · {} points{}*\n\nWrite it."
CELLS = [("markdown", "# Circle\n> Round."), ("code", "import math"), ("markdown", "## Exercises"),
         ("markdown", TASK.format("1.1", "Area", "code", 3, " · bonus 1 point")),
         ("code", "#| stub 1.1\ndef area(r): raise NotImplementedError"),
         ("code", "#| solution 1.1\ndef area(r):\n    if r < 0: raise ValueError\n    return math.pi * r * r"),
         ("code", "#| check 1.1\nassert abs(area(2.) - 12.566) < .01, f'radius 2: got {area(2.)}'"),
         ("code", "#| check 1.1 bonus\ntry: area(-1)\nexcept ValueError: pass\nelse: assert False, 'r = -1 taken'"),
         ("markdown", TASK.format("1.2", "Radius", "by hand", 2, "")),
         ("code", "#| stub 1.2\nradius = None"), ("code", "#| solution 1.2\nradius = 2"),
         ("code", "#| check 1.2\nassert radius == 2, f'got {radius}'"),
         ("markdown", TASK.format("1.3", "Why", "explain", 4, "")),
         ("markdown", "<!-- answer 1.3 -->\n*Your answer:*"),
         ("markdown", "<details><summary>Rubric 1.3</summary></details>")]
GOOD = {"1.1": "def area(r): return r * r * math.pi", "1.2": "radius = 2"}


def notebook(cells):
    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    return nbformat.v4.new_notebook(cells=[make[kind](text) for kind, text in cells])


@pytest.fixture
def course(tmp_path):
    "The sources, and a function that hands in: `hand_in(student, {number: code})`."
    (tmp_path / "nbs").mkdir()
    nbformat.write(notebook(CELLS), tmp_path / "nbs" / "01_circle.ipynb")
    make_course(tmp_path / "nbs", tmp_path / "course")
    def hand_in(student, answers):
        nb = read_notebook(tmp_path / "course" / "student" / "01_circle.ipynb")
        for c in nb["cells"]:
            if (m := read_mark(c)) and m.part == "stub" and m.number in answers:
                c["source"] = f"#| stub {m.number}\n{answers[m.number]}"
        (folder := tmp_path / "in" / student).mkdir(parents=True)
        (folder / "01_circle.ipynb").write_text(json.dumps(nb))
    return tmp_path, hand_in


def marks(path, **limits):
    results = grade_all(find_submissions(path / "in"), find_sources(path / "nbs"),
                        limits=Limits(**{"seconds": 3., "start": 30.} | limits))
    return {s: {o.exercise.number: (o.points, o.bonus, o.reason) for o in os} for s, os in results.items()}


def test_whatever_a_submission_does_the_others_are_marked_and_its_own_other_exercises_too(course):
    path, hand_in = course
    victim = path / "in" / "zoe" / "01_circle.ipynb"
    hang = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    forged = ('import os\nfor fd in range(1, 40):\n    try: os.write(fd, b\'{"event": "marked", "number": "1.1", '
              '"part": "check", "ok": true, "reason": ""}\\n{"event": "end"}\\n\')\n    except OSError: pass\n'
              'def area(r): return 0')
    bad = {"loop": "while True: pass", "deaf loop": hang, "memory": "hog = bytearray(10**11)",
           "exit": "import os; os._exit(0)",
           "leave": "import sys; sys.exit()", "forged": forged,
           "delete": f"import shutil\nshutil.rmtree({str(path / 'in')!r})",
           "crash": "import ctypes; ctypes.string_at(0)", "error": "1 / 0", "not Python": "def area(r) return",
           "own check": "def area(r): return 12.5664 if r else ''\nimport builtins\nabs = lambda x: 0\narea = 12"}
    for name, code in bad.items():
        if name == "delete" and not can_isolate(): continue     # it could: that is said when marking starts
        hand_in(name, {"1.1": code, "1.2": GOOD["1.2"]})
    hand_in("zoe", GOOD)
    (path / "in" / "nothing").mkdir()
    (path / "in" / "text").mkdir(); (path / "in" / "text" / "01_circle.ipynb").write_text("I had no time")
    before, found = victim.read_bytes(), marks(path)
    assert found["zoe"]["1.1"] == (3, 0, "bonus: r = -1 taken") and found["zoe"]["1.2"] == (2, 0, "")
    assert found["zoe"]["1.3"] == (None, 0, "to be marked by a person") and victim.read_bytes() == before
    for name in bad.keys() & found.keys():
        assert found[name]["1.1"][0] == 0, (name, found[name])
        assert found[name]["1.2"] == (2, 0, ""), (name, found[name])
    said = {"loop": "took longer than 3 s", "deaf loop": "took longer than 3 s", "memory": "MemoryError",
            "exit": "exit code 0", "leave": "SystemExit", "forged": "got 0", "error": "ZeroDivisionError",
            "not Python": "SyntaxError", "own check": "not callable"}
    for name, words in said.items(): assert words in found[name]["1.1"][2], (name, found[name]["1.1"])
    if can_isolate(): assert "Read-only" in found["delete"]["1.1"][2] or "OSError" in found["delete"]["1.1"][2]
    assert "no notebook was handed in" in found["nothing"]["1.1"][2] and "not a notebook" in found["text"]["1.2"][2]


def test_a_check_in_the_submission_is_not_what_is_run(course):
    path, hand_in = course
    hand_in("ada", {"1.1": "def area(r): return 1"})
    file = path / "in" / "ada" / "01_circle.ipynb"
    nb = read_notebook(file)
    for c in nb["cells"]:
        if (m := read_mark(c)) and m.part == "check": c["source"] = f"#| check {m.number}\npass"
    file.write_text(json.dumps(nb))
    assert marks(path)["ada"]["1.1"] == (0, 0, "radius 2: got 1")


@pytest.mark.skipif(not can_isolate(), reason="this system isolates no process")
def test_a_submission_has_no_network_and_writes_nowhere_but_in_its_folder(course):
    path, hand_in = course
    hand_in("net", {"1.1": "import socket\nsocket.create_connection(('127.0.0.1', 9), 2)"})
    hand_in("disk", {"1.1": f"open('mine', 'w').write('x')\nopen({str(path / 'stolen')!r}, 'w')"})
    hand_in("spawn", {"1.1": "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; "
                             f"time.sleep(77.{os.getpid()})'])\nimport os; os._exit(0)"})
    found = marks(path)
    assert "OSError" in found["net"]["1.1"][2] and "unreachable" in found["net"]["1.1"][2]
    assert "Read-only" in found["disk"]["1.1"][2] and not (path / "stolen").exists()
    listing = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(f"time.sleep(77.{os.getpid()})".encode() in c for c in listing)


def test_the_commands_write_copies_marks_and_pages(course, capsys, monkeypatch):
    path, hand_in = course
    hand_in("<b>ada", GOOD)
    hand_in("=bob", {"1.2": "radius = 3"})
    monkeypatch.chdir(path)
    assert main("course grade in --out marks.csv --seconds 5".split()) == 0
    rows = list(csv.DictReader(open("marks.csv", encoding="utf-8")))
    assert len(rows) == 6 and {r["student"] for r in rows} == {"<b>ada", "'=bob"}
    lost = next(r for r in rows if r["student"] == "'=bob" and r["exercise"] == "1.2")
    assert (lost["points"], lost["of"], lost["reason"]) == ("0", "2", "got 3")
    pages = sorted(p.name for p in Path("marks").iterdir())
    assert pages == ["_b_ada.html", "_bob.html"] and "<b>ada" not in Path("marks/_b_ada.html").read_text()
    assert main("course grade in --out marks.csv --seconds 5".split()) == 0     # its own table may be replaced
    assert main("course progress course/student --seconds 5".split()) == 0
    assert "0 of 2 are done" in capsys.readouterr().out


@pytest.mark.parametrize("words, sentence", [
    ("make --out course", "is not empty"), ("make --out new --notebooks nowhere", "folder does not exist"),
    ("make --out new --notebooks in", "no notebook with exercises"),
    ("grade nowhere --out m.csv", "folder does not exist"),
    ("grade in --out m.txt", "must end in .csv"),
    ("grade in --out m.csv --notebook 99_x", "no notebook with exercises"),
    ("grade course --out m.csv --seconds 0", "--seconds"), ("progress nowhere", "folder does not exist")])
def test_wrong_use_is_one_sentence(course, capsys, monkeypatch, words, sentence):
    path, hand_in = course
    hand_in("ada", GOOD)
    monkeypatch.chdir(path)
    try: code = main(["course", *words.split()])
    except SystemExit as error: code = error.code
    said = capsys.readouterr().err
    assert code == 2 and sentence in said and said.count("\n") == 1, said


def names_in(cell): # of a code cell: what it defines, what it reads
    tree = ast.parse(code_of(cell))
    assigned = {n.id for s in tree.body if isinstance(s, ast.Assign) for t in s.targets for n in ast.walk(t)
                if isinstance(n, ast.Name)}
    imported = {a.asname or a.name for s in tree.body if isinstance(s, (ast.Import, ast.ImportFrom)) for a in s.names}
    return (assigned | imported | {s.name for s in tree.body if isinstance(s, (ast.FunctionDef, ast.ClassDef))},
            {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)})


def check_spoiled(source, copy): # path; the student's notebook
    cells = [c for c in read_notebook(source)["cells"] if spoiled(c)]
    assert {n for c in cells for n in spoiled(c)} <= {e.number for e in read_exercises(source)}
    code = [c for c in copy["cells"] if c["cell_type"] == "code"]
    assert not any(spoiled(c) for c in code)
    gone = {name for c in cells for name in names_in(c)[0]} - {name for c in code for name in names_in(c)[0]}
    assert gone.isdisjoint({name for c in code for name in names_in(c)[1]}), f"{source.name} needs what is left out"


def test_a_course_of_this_project_holds_no_solution(tmp_path):
    made = make_course(root / "nbs", tmp_path / "course")
    assert sum(map(len, made.values())) == len(list(csv.DictReader(open(tmp_path / "course" / "course.csv"))))
    for name, exercises in made.items():
        nb = read_notebook(tmp_path / "course" / "student" / f"{name}.ipynb")
        nbformat.validate(nbformat.from_dict(nb))
        marked = [m.part for c in nb["cells"] if (m := read_mark(c))]
        assert {"solution", "rubric", "discussion"}.isdisjoint(marked)
        text = "\n".join(source_of(c) for c in nb["cells"])
        for e in exercises:
            body = e.solution.split("\n", 1)[-1].strip()
            assert not body or body not in text, f"{name}: the solution of {e.number} stands in the copy"
        check_spoiled(root / "nbs" / f"{name}.ipynb", nb)
        graded = [c["metadata"]["nbgrader"] for c in nb["cells"] if "nbgrader" in c["metadata"]]
        assert sum(g.get("points", 0) for g in graded) == sum(e.points for e in exercises)
        assert len({g["grade_id"] for g in graded}) == len(graded)
        for name in {n for e in exercises for n in e.blanks}:
            held = [c for c in nb["cells"] if c["cell_type"] == "code" and find_function(source_of(c), name)]
            assert held and all("NotImplementedError" in ast.unparse(find_function(source_of(c), name)) for c in held)
    solutions = sorted(p.name for p in (tmp_path / "course" / "solutions").glob("*.ipynb"))
    assert solutions == sorted(f"{n}.ipynb" for n in made)
    plan = (tmp_path / "course" / "syllabus.md").read_text("utf-8")
    assert all(f"## In {t}" in plan for t in ("one week", "two weeks", "four weeks"))


def test_copies_run_wherever_they_are_moved_and_a_submission_finds_what_they_read(tmp_path):
    (tmp_path / "figures" / "records").mkdir(parents=True), (tmp_path / "nbs").mkdir()
    for name in ("records/radii.json", "records/other.json", "disc.png"):
        (tmp_path / "figures" / name).write_text("[1, 2]")
    read = 'import json\nwith open("../figures/records/radii.json") as file: radii = json.load(file)'
    cells = [CELLS[0], ("markdown", "![A disc](../figures/disc.png)"), ("code", read), *CELLS[1:]]
    write = lambda cells: nbformat.write(notebook(cells), tmp_path / "nbs" / "01_circle.ipynb")
    write(cells)
    make_course(tmp_path / "nbs", tmp_path / "course")
    shutil.move(tmp_path / "course", moved := tmp_path / "away" / "handed out")
    there = {p.relative_to(moved / "student").as_posix() for p in (moved / "student").rglob("*") if p.is_file()}
    assert there == {"01_circle.ipynb", "figures/records/radii.json", "figures/disc.png"}
    for path in moved.rglob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert "../" not in text and str(tmp_path) not in text
    nb = read_notebook(moved / "student" / "01_circle.ipynb")
    for c in nb["cells"]:
        if (m := read_mark(c)) and m.part == "stub" and m.number == "1.2":
            c["source"] = "#| stub 1.2\n" + read.replace("../", "") + "\nradius = radii[1]"
    (tmp_path / "in" / "ada").mkdir(parents=True)
    (tmp_path / "in" / "ada" / "01_circle.ipynb").write_text(json.dumps(nb))
    assert marks(tmp_path)["ada"]["1.2"] == (2, 0, "")
    write([*cells[:3], ("code", 'name = "radii"\nf"../figures/records/{name}.json"'), *cells[3:]])
    with raises(UsageError, "whole names"): make_course(tmp_path / "nbs", tmp_path / "second")


def test_what_gives_an_exercise_away_makes_room_for_a_sentence_and_an_import(tmp_path):
    disc = "#| export\nclass Disc:\n    def area(self): # m²\n        return math.pi * self.r ** 2\n    r = 1."
    wrong = "#| spoils 1.1\ndef half(r): return math.pi * r * r / 2"
    slow = "#| export checks.circle\n#| spoils 1.1\ndef check_area(f): assert f(1.) == math.pi"
    stub = ("code", "#| stub 1.1 Disc.area\ndef area(r): raise NotImplementedError")
    cells = [("code", "#| default_exp circle"), *CELLS[:2], ("code", disc), ("code", wrong), ("code", slow), CELLS[2],
             CELLS[3], ("code", slow.replace("check_area", "check_it")), stub, *CELLS[5:]]
    (tmp_path / "nbs").mkdir()
    nbformat.write(notebook(cells), tmp_path / "nbs" / "01_circle.ipynb")
    make_course(tmp_path / "nbs", tmp_path / "course")
    copied = [source_of(c) for c in read_notebook(tmp_path / "course" / "student" / "01_circle.ipynb")["cells"]]
    assert copied[3:8] == [disc.replace("return math.pi * self.r ** 2", 'raise NotImplementedError("exercise 1.1")'),
                           "from finessl.circle import Disc # so that what follows runs",
                           "*A cell is left out here, since it shows most of what exercise 1.1 asks for.*",
                           "from finessl.checks.circle import check_area # so that what follows runs", CELLS[2][1]]
    assert not [c for c in copied if "check_it" in c] # the check of the exercise imports it


@pytest.fixture(scope="module")
def whole_course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "course"
    return folder, make_course(root / "nbs", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [Path(p).stem for p in find_sources(root / "nbs")])
def test_a_copy_runs_to_its_end_with_nothing_filled_in(name, whole_course, monkeypatch):
    path = whole_course[0] / "student" / f"{name}.ipynb"
    assert "../" not in "".join(source_of(c) for c in read_notebook(path)["cells"])
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    nb = nbformat.read(path, as_version=4)
    here = {"metadata": {"path": str(whole_course[0] / "student")}}
    NotebookClient(nb, timeout=1200, kernel_name="python3", resources=here).execute()
    failed = {read_mark(c) for c in nb.cells for o in c.get("outputs", ()) if o["output_type"] == "error"}
    exercises = {e.number: e for e in whole_course[1][name]}
    assert {m.part for m in failed} <= {"check", "bonus"}
    assert {m.number for m in failed if m.part == "check"} == {n for n, e in exercises.items() if e.kind != "explain"}


@pytest.mark.slow
def test_solutions_get_every_point_and_empty_copies_none(whole_course, tmp_path):
    folder, made = whole_course
    for student, filled in (("ada", True), ("bob", False)):
        (tmp_path / student).mkdir()
        for name, exercises in made.items():
            nb, by_number = read_notebook(folder / "student" / f"{name}.ipynb"), {e.number: e for e in exercises}
            for c in nb["cells"] if filled else ():
                if (m := read_mark(c)) and m.part == "stub": c["source"] = by_number[m.number].solution
            (tmp_path / student / f"{name}.ipynb").write_text(json.dumps(nb))
    results = grade_all(find_submissions(tmp_path), find_sources(root / "nbs"), limits=Limits(seconds=300., start=300.))
    for o in results["ada"]: assert o.exercise.kind == "explain" or o.points == o.exercise.points, o
    for o in results["bob"]: assert not o.points and not o.bonus, o


def test_nbgrader_takes_the_copies_as_they_are(tmp_path):
    validator = pytest.importorskip("nbgrader.nbgraderformat.v3", reason="nbgrader is not installed")
    make_course(root / "nbs", tmp_path / "course")
    for path in (tmp_path / "course" / "student").glob("*.ipynb"):
        validator.MetadataValidatorV3().validate_nb(nbformat.read(path, as_version=4))


@pytest.mark.slow
def test_nbgrader_marks_what_is_handed_in(course):
    pytest.importorskip("nbgrader.apps", reason="nbgrader is not installed")
    path, hand_in = course
    for student, answers in {"ada": GOOD, "bob": {"1.2": GOOD["1.2"]}}.items(): hand_in(student, answers)
    (path / "source").mkdir(), (path / "submitted").mkdir()
    shutil.copytree(path / "course" / "student", path / "source" / "ps1")
    for student in ("ada", "bob"): shutil.copytree(path / "in" / student, path / "submitted" / student / "ps1")
    shutil.copy(path / "course" / "nbgrader_config.py", path)
    for words in ("generate_assignment ps1 --create", "autograde ps1", "export"):
        subprocess.run([sys.executable, "-m", "nbgrader", *words.split()], cwd=path, check=True, timeout=300)
    released = read_notebook(path / "release" / "ps1" / "01_circle.ipynb")
    assert {CELLS[4][1], CELLS[9][1]} <= {source_of(c) for c in released["cells"]} # the stubs
    rows = csv.DictReader(open(path / "grades.csv"))
    # 1.3 is marked by a person
    assert {r["student_id"]: (float(r["score"]), float(r["max_score"])) for r in rows} == {"ada": (5, 9), "bob": (2, 9)}


def test_an_exercise_that_lacks_a_part_is_named(tmp_path):
    for gone, sentence in (("solution", "lacks its solution"), ("bonus", "lacks its bonus")):
        cells = [c for c in CELLS if not ((m := read_mark({"cell_type": c[0], "source": c[1]})) and m.part == gone
                                          and m.number == "1.1")]
        nbformat.write(notebook(cells), tmp_path / "01_x.ipynb")
        with raises(UsageError, sentence): read_exercises(tmp_path / "01_x.ipynb")
