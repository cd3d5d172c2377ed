"Every notebook runs top-down; cells marked slow or cuda are left out."
from pathlib import Path
import matplotlib
import pytest
from nbdev.test import test_nb as run_notebook

root = Path(__file__).resolve().parent.parent
notebooks = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("notebook", notebooks, ids=[str(p.relative_to(root / "nbs")) for p in notebooks])
def test_notebook(notebook, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    with matplotlib.rc_context(matplotlib.rcParamsDefault): # one notebook's settings are not the next one's
        passed, seconds = run_notebook(notebook, skip_flags=["slow", "cuda"], basepath=root)
    assert passed, f"{notebook.name} failed after {seconds:.0f} s; its traceback is above"
