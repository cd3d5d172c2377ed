"What keeps the project in one piece: exports, clean notebooks, README, records."
import ast, filecmp, re, shutil, subprocess, sys
from pathlib import Path
import nbformat
import pytest

root = Path(__file__).resolve().parent.parent
script = lambda name: str(Path(sys.executable).with_name(name))


@pytest.fixture
def copy(tmp_path):
    "A copy of what nbdev reads and writes."
    for name in ("nbs", "finessl"):
        shutil.copytree(root / name, tmp_path / name,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(root / name, tmp_path)
    return tmp_path


def differing(a, b, pattern):
    names = {str(p.relative_to(x)) for x in (a, b) for p in x.rglob(pattern)}
    return sorted(n
                  for n in names
                  if not ((a / n).exists() and (b / n).exists() and filecmp.cmp(a / n, b / n, shallow=False)))


def test_exporting_again_changes_nothing(copy):
    subprocess.run([script("nbdev_export")], cwd=copy, check=True, capture_output=True)
    assert differing(root / "finessl", copy / "finessl", "*.py") == []


def test_notebooks_are_clean(copy):
    subprocess.run([script("nbdev_clean")], cwd=copy, check=True, capture_output=True)
    assert differing(root / "nbs", copy / "nbs", "*.ipynb") == []


def test_readme_is_made_from_index():
    subprocess.run([sys.executable, root / ".ci" / "readme.py", "--check"], check=True)


def test_ci_runs_the_command_of_the_readme():
    command = (root / ".ci" / "run").read_text().splitlines()[-1]
    assert command in (root / "README.md").read_text()


def test_outputs_hold_no_machine_path_and_no_error():
    machine = re.compile(r"(/home/|/Users/|/root/|/tmp/|/work/|site-packages|[A-Z]:\\\\Users)")
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error", f"{path.name}: {output.evalue}"
                text = str({k: v for k,
                            v in output.get("data", {}).items() if not k.startswith("image/")}) + output.get("text", "")
                where = f"{path.name}: in an output of {cell.source[:60]!r}"
                assert not machine.search(text), f"{machine.search(text).group()}, {where}"


def test_records_hold_no_machine_path():
    machine = re.compile(r"(/home/|/Users/|/root/|/tmp/|/work/|[A-Z]:\\\\Users)")
    files = [p for p in (root / "figures").rglob("*") if p.suffix in (".json", ".jsonl", ".csv")]
    assert files
    for p in files:
        assert not machine.search(text := p.read_text(encoding="utf-8")), f"{p.name}: {machine.search(text).group()}"


def shows(source): # whether a cell that ran has an output: its last line is a value, or it draws
    if re.search(r"^#\|\s*(export|hide|default_exp|slow|cuda|eval: false)", source, re.M): return False
    try: last = ast.parse(re.sub(r"^%.*$", "", source, flags=re.M)).body[-1:]
    except SyntaxError: return False
    value = (ast.Dict, ast.Tuple, ast.JoinedStr, ast.List, ast.Subscript, ast.Compare, ast.BinOp)
    return bool(last) and isinstance(last[0], ast.Expr) and isinstance(last[0].value, value) \
        and not source.rstrip().endswith(";")


def test_every_code_cell_that_shows_something_was_run():
    checked = 0
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "code" or not shows(cell.source): continue
            checked += 1
            assert cell.outputs, f"{path.relative_to(root)}: committed without the output of {cell.source[-80:]!r}"
    assert checked > 100


def test_code_in_notebooks_needs_no_scrolling_sideways():
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "code": continue
            for line in cell.source.splitlines():
                assert len(line) <= 140 and line == line.rstrip(), f"{path.name}: {len(line)} characters in {line!r}"


def minutes(path): # 150 words and 12 lines of code a minute, a quarter for a picture
    cells = nbformat.read(path, as_version=4).cells
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    lines = sum(bool(line.strip()) for c in cells if c.cell_type == "code" for line in c.source.splitlines())
    pictures = sum("image/png" in o.get("data", {}) for c in cells if c.cell_type == "code" for o in c.outputs)
    return words / 150 + lines / 12 + pictures / 4


def test_minutes_of_the_map_are_computed():
    text = (root / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[[^]]+\]\((nbs/\d\d_\w+\.ipynb)\) \|[^|]*\| (\d+) \|", text, re.M)
    assert sorted(p for p, _ in rows) == sorted(f"nbs/{p.name}" for p in (root / "nbs").glob("[0-9]*.ipynb"))
    wrong = [f"{p}: {said} in the map, {minutes(root / p):.0f} by its words, lines and pictures"
             for p, said in rows if abs(int(said) - minutes(root / p)) > 1]
    assert not wrong, "\n".join(wrong)


def test_glossary_is_the_table_of_the_first_notebook():
    table = lambda text: re.findall(r"^\|.*\|$", text, re.M)
    start = next(c.source for c in nbformat.read(root / "nbs/00_start.ipynb", as_version=4).cells
                 if c.cell_type == "markdown" and c.source.startswith("## Notation"))
    glossary = (root / "README.md").read_text("utf-8").split("## Glossary")[1].split("\n## ")[0]
    assert len(table(start)) > 20 and table(glossary) == table(start)
