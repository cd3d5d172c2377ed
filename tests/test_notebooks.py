"Every notebook runs top-down; cells marked slow or cuda are left out."
from pathlib import Path
import matplotlib
import pytest
from nbdev.test import test_nb as run_notebook

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", notebooks, ids=[p.stem for p in notebooks])
def test_notebook(notebook, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    with matplotlib.rc_context(matplotlib.rcParamsDefault): # one notebook's settings are not the next one's
        passed, seconds = run_notebook(notebook, skip_flags=["slow", "cuda"], basepath=root)
    assert passed, f"{notebook.name} failed after {seconds:.0f} s; its traceback is above"


def test_every_module_has_a_notebook():
    modules = {p.stem for p in (root / "finessl").glob("*.py") if not p.stem.startswith("_")}
    named = {p.stem.split("_", 1)[1] for p in notebooks if p.stem != "index"}
    assert modules <= named, f"no notebook for {sorted(modules - named)}"
