"""Make README.md from nbs/index.ipynb: `python .ci/readme.py`, or `--check` that the two agree.

Markdown cells, code cells and text outputs go over; pictures are those of `figures/`; cells marked `#| hide` stay behind, and of
cells marked `#| echo: false` only the output is shown.
"""
import argparse, re, sys
from pathlib import Path
import nbformat

root = Path(__file__).resolve().parent.parent


def cell_lines(cell):
    "One cell as Markdown."
    if cell.cell_type == "markdown": return [cell.source.replace("](../", "]("), ""]
    directives = re.findall(r"^#\|\s*(.+?)\s*$", cell.source, re.M)
    if any(d == "hide" or d.startswith("default_exp") for d in directives): return []
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
    lines = [] if "echo: false" in directives else ["```python", source, "```", ""]
    for output in cell.outputs:
        data = output.get("data", {})
        if "text/markdown" in data: lines += [data["text/markdown"].replace("](../", "]("), ""]
        elif "image/png" in data: continue
        elif text := data.get("text/plain", output.get("text", "")): lines += ["```text", text.rstrip(), "```", ""]
    return lines


def readme():
    "The whole page."
    cells = nbformat.read(root / "nbs" / "index.ipynb", as_version=4).cells
    note = "<!-- Made from nbs/index.ipynb by `python .ci/readme.py`; edit the notebook. -->"
    return "\n".join([note, ""] + [line for cell in cells for line in cell_lines(cell)]).rstrip() + "\n"


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--check", action="store_true", help="exit 1 where README.md and nbs/index.ipynb differ, and write nothing")
    args, path = ap.parse_args(), root / "README.md"
    if not args.check: path.write_text(readme(), encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != readme(): sys.exit("README.md differs from nbs/index.ipynb: run `python .ci/readme.py`")
