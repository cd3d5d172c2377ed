"""Make README.md from nbs/index.ipynb: `python .ci/readme.py`, or `--check` that the two agree.

Markdown cells, code cells and their outputs go over, a cell's picture as `figures/index-CELL.png`; cells marked `#| hide` stay
behind, and of cells marked `#| echo: false` only the output is shown.
"""
import argparse, base64, re, sys
from pathlib import Path
import nbformat

root = Path(__file__).resolve().parent.parent


def picture(cell): return f"figures/index-{cell.id}.png"


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
        elif "image/png" in data: lines += [f"![]({picture(cell)})", ""]
        elif text := data.get("text/plain", output.get("text", "")): lines += ["```text", text.rstrip(), "```", ""]
    return lines


def cells(): return nbformat.read(root / "nbs" / "index.ipynb", as_version=4).cells


def readme():
    "The whole page."
    note = "<!-- Made from nbs/index.ipynb by `python .ci/readme.py`; edit the notebook. -->"
    return "\n".join([note, ""] + [line for cell in cells() for line in cell_lines(cell)]).rstrip() + "\n"


def pages():
    "Path -> bytes of README.md and of the pictures in it."
    pictures = {picture(c): base64.b64decode(o["data"]["image/png"]) for c in cells() if c.cell_type == "code"
                for o in c.outputs if "image/png" in o.get("data", {}) and cell_lines(c)}
    return {"README.md": readme().encode()} | pictures


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--check", action="store_true", help="exit 1 where files differ from nbs/index.ipynb, and write nothing")
    check, now = ap.parse_args().check, {root / name: page for name, page in pages().items()}
    old = {p for p in (root / "figures").glob("index-*.png")} - set(now)
    wrong = sorted(p.name for p in {*now, *old} if not p.exists() or p.read_bytes() != now.get(p))
    if check and wrong: sys.exit(f"{', '.join(wrong)}: not as in nbs/index.ipynb; run `python .ci/readme.py`")
    if not check:
        for path in old: path.unlink()
        for path, page in now.items(): path.write_bytes(page)
