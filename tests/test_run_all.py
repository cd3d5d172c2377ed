"""Whoever opens a notebook in JupyterLab and chooses Run All gets to its end, and no file of the project has changed.

Jupyter knows nothing of nbdev directives: every cell runs, in a kernel of its own a notebook, in a copy of the project.
Takes a quarter of an hour on two cores: `python -m pytest -m slow tests/test_run_all.py`.
"""
import hashlib, shutil, subprocess, sys
from pathlib import Path
import nbformat
import pytest
from nbclient import NotebookClient

root = Path(__file__).resolve().parent.parent
notebooks = sorted(p.relative_to(root) for p in (root / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
PARTS = ("nbs", "finessl", "figures", "tests", ".ci", "settings.ini", "setup.py", "README.md", "CHANGELOG.md")


def digests(folder): # path -> SHA-256; what Python and Jupyter keep for themselves apart
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()
            and not {"__pycache__", ".ipynb_checkpoints", ".pytest_cache"} & set(p.parts)}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for part in PARTS:
        source = root / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        elif source.exists(): shutil.copy2(source, folder / part)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("notebook", notebooks, ids=map(str, notebooks))
def test_run_all(notebook, copy, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(copy))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before, path = digests(copy), copy / notebook
    nb = nbformat.read(path, as_version=4)
    here = {"metadata": {"path": str(path.parent)}}
    NotebookClient(nb, timeout=1200, kernel_name="python3", resources=here).execute()
    after = digests(copy)
    changed = sorted(p for p in {*before, *after} if before.get(p) != after.get(p))
    assert not changed, f"{notebook} changes {', '.join(changed)}"
