"""Execute notebooks in place and clean them: `python .ci/notebooks.py [--slow] [NOTEBOOK ...]` (none named: all).

Cells marked `#| slow`, `#| cuda` or `#| eval: false` keep the outputs they have; `--slow` runs the slow ones too.
"""
import argparse, os, re
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

root = Path(__file__).resolve().parent.parent


class Selective(NotebookClient):
    "A client that leaves cells with some directives as they are."
    skip = re.compile(r"^#\|\s*(slow|cuda|eval:\s*false)", re.M)

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and self.skip.search(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def execute(path, slow=False):
    "Run one notebook top-down in its own kernel, write it back clean."
    nb = nbformat.read(path, as_version=4)
    client = Selective(nb, timeout=7200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    if slow: client.skip = re.compile(r"^#\|\s*(cuda|eval:\s*false)", re.M)
    client.execute()
    nbformat.write(nb, path)
    nbdev_clean(str(path))


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("notebooks", nargs="*", type=Path)
    ap.add_argument("--slow", action="store_true", help="run the cells marked slow too")
    args = ap.parse_args()
    os.environ |= {"PYTHONPATH": str(root), "TQDM_DISABLE": "1"} # no progress bars in outputs
    for path in args.notebooks or sorted((root / "nbs").rglob("*.ipynb")):
        execute(path.resolve(), args.slow)
        print(f"ran {path.name}", flush=True)
