"""Every notebook runs top-down as in `nbdev_test`: several in one process, each with the settings that the ones
before it have left behind, in whatever order; cells marked slow or cuda are left out.

Those in `MINUTES` have a command of their own: `python -m pytest -m slow tests/test_notebooks.py`.
"""
from pathlib import Path
import pytest
from nbdev.test import test_nb as run_notebook

root = Path(__file__).resolve().parent.parent
notebooks = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MINUTES = ("studies/mechanisms.ipynb",) # hundreds of runs in the lab
name_of = lambda path: path.relative_to(root / "nbs").as_posix()
params = [pytest.param(p, id=name_of(p), marks=[pytest.mark.slow] if name_of(p) in MINUTES else []) for p in notebooks]


@pytest.mark.parametrize("notebook", params)
def test_notebook(notebook, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    passed, seconds = run_notebook(notebook, skip_flags=["slow", "cuda"], basepath=root)
    assert passed, f"{notebook.name} failed after {seconds:.0f} s; its traceback is above"
