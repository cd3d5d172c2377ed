"What a user gets from `pip install .`: the weights, no development tool, and a package that works away from the clone."
import ast, subprocess, sys, zipfile
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
tools = {"nbdev", "fastcore", "execnb", "IPython", "ipykernel", "jupyter", "jupyterlab", "nbformat", "nbclient",
         "nbconvert", "pytest", "setuptools"}


@pytest.mark.parametrize("path", sorted((root / "finessl").rglob("*.py")), ids=lambda p: str(p.relative_to(root)))
def test_modules_import_no_development_tool(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: found.add(node.module.split(".")[0])
    assert not found & tools


def test_wheel_holds_weights_and_works_away_from_the_clone(tmp_path):
    run = lambda *a, **kw: subprocess.run([sys.executable, *a], check=True, capture_output=True, text=True, **kw)
    source = tmp_path / "source"
    run("-c",
        f"import shutil; shutil.copytree({str(root)!r}, {str(source)!r}, "
        "ignore=shutil.ignore_patterns('.venv', '.git', 'nbs', 'figures', 'build', '*.egg-info'))")
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source))
    wheel, = tmp_path.glob("finessl-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "finessl/weights/pocket.safetensors" in names and "finessl/weights/pocket.json" in names
    assert {"finessl/assets/report.css", "finessl/assets/report.js"} <= {*names}
    assert {n.split("/")[0] for n in names} == {"finessl", wheel.name.split("-py3")[0] + ".dist-info"}
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    code = "import finessl, finessl.backbone as b; print(finessl.__file__); print(b.load_backbone('pocket').width)"
    out = run("-c", code, cwd=tmp_path / "site").stdout.split()
    assert Path(out[0]).is_relative_to(tmp_path / "site") and out[1] == "128"
