"""The notebooks as a site that needs no network: `python .ci/book.py [--out _book]` (needs `pip install ".[book]"`).

Made from the executed notebooks, without running them: the main line as chapters, workshop and studies as appendices, a
page a module from its docstrings and the comments beside its arguments. Solutions, discussions and rubrics stay behind.
Warnings are errors, and every link inside the site is followed.
"""
import argparse, ast, json, os, re, shutil, subprocess, sys, tempfile
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
from finessl.course.exercises import read_mark, read_notebook, source_of # noqa: E402

GIT = "https://github.com/finessl/finessl"
APPENDICES = {"studies": "Studies", "engine": "Workshop", "cli": "Command line", "course": "Course", "bench": "Speed",
              "pocket": "Pocket encoder", "checks": "Checks"}
CONF = '''
from latex2mathml.converter import convert
project, author, copyright, html_title = "finessl", "the finessl authors", "2026 onwards, the finessl authors", "finessl"
extensions = ["myst_nb"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
html_theme, html_static_path, html_css_files = "furo", ["_static"], ["book.css"]
html_math_renderer_name = html_math_renderer = "mathml"
html_show_sphinx = html_show_sourcelink = False
html_copy_source = False
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"]
def inline(self, node):
    self.body.append(convert(node.astext())); raise nodes.SkipNode
def display(self, node):
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>'); raise nodes.SkipNode
from docutils import nodes
def setup(app): app.add_html_math_renderer("mathml", (inline, None), (display, None))
'''
CSS = """@font-face{font-family:"STIX Two Math";src:local("STIX Two Math"),url("STIXTwoMath-Regular.ttf")}
math{font-family:"STIX Two Math",math;font-size:1.05em}
div.math{overflow-x:auto;overflow-y:hidden;padding:.3rem 0}
div.cell_output{overflow-x:auto}
div.cell_output img{max-width:100%;height:auto}
@media (prefers-color-scheme:dark){body:not([data-theme=light]) div.cell_output img{background:#fff;border-radius:3px}}
body[data-theme=dark] div.cell_output img{background:#fff;border-radius:3px}
.table-wrapper td{overflow-wrap:anywhere;min-width:3.5rem}
.table-wrapper th{overflow-wrap:normal}"""


def buttons(name): # of a chapter, "05_margin.ipynb"
    "Links that open a notebook elsewhere, and the one cell that it needs there first."
    return (f"[Open in Colab](https://colab.research.google.com/github/finessl/finessl/blob/main/nbs/{name}) · "
            f"[Open in Binder](https://mybinder.org/v2/gh/finessl/finessl/main?labpath=nbs/{name}) · first cell there: "
            f"`%pip install git+{GIT}`")


def chapter(path, chapters): # -> notebook for the site
    "A notebook without what stays behind, and with the settings of its page folded."
    nb, cells = read_notebook(path), []
    for c in nb["cells"]:
        mark, text = read_mark(c), source_of(c)
        if mark and mark.part in ("solution", "rubric", "discussion", "answer"): continue
        if re.match(r"#\|\s*default_exp", text): continue
        c["metadata"] = {"tags": ["hide-input"]} if re.search(r"^#\|\s*(hide|echo: false)", text, re.M) else {}
        if c["cell_type"] == "markdown":
            c["source"] = text.replace("](../nbs/engine)", f"]({GIT}/tree/main/nbs/engine)")
            if path in chapters and re.match(r"# ", text): c["source"] = f"{c['source']}\n\n{buttons(path.name)}"
        cells.append(c)
    return nb | {"cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"},
                                              "language_info": {"name": "python"}}}


def comment(lines, number): # of a line, counted from 1
    "The comment at the end of a line of a signature."
    m = re.search(r"(?<!['\"])#\s*(.+)$", lines[number - 1])
    return m[1].strip() if m else ""


def cell_text(text): return text.replace("|", "\\|").replace("\n", " ")


def function_page(node, lines, level="##"):
    "A function's signature, docstring, and the shape, dtype and range of each argument."
    doc, a = ast.get_docstring(node) or "", node.args
    args = [x for x in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if x and x.arg not in ("self", "cls")]
    defaults = dict(zip([x.arg for x in reversed([*a.posonlyargs, *a.args])], reversed(a.defaults)))
    defaults |= {x.arg: d for x, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None}
    own = ast.unparse(a)
    out = [f"{level} `{node.name}`", "", "```python", f"{node.name}({own})" + (f" -> {ast.unparse(node.returns)}" if node.returns
           else ""), "```", "", doc, ""]
    rows = []
    for x in args:
        alone = sum(y.lineno == x.lineno for y in args) == 1 and x.lineno != node.lineno
        default = f"`{ast.unparse(defaults[x.arg])}`" if x.arg in defaults else ""
        rows.append(f"| `{x.arg}` | {default} | {cell_text(comment(lines, x.end_lineno)) if alone else ''} |")
    ends = node.returns.end_lineno if node.returns else node.lineno
    told = comment(lines, ends) if ends < node.body[0].lineno else ""
    if told: rows.append(f"| {'*returns*' if node.returns else '*all*'} | | {cell_text(told)} |")
    return out + (["| argument | default | shape, dtype, range |", "|---|---|---|", *rows, ""] if rows else [])


def api_page(path): # module -> Markdown, or "" where it defines nothing
    "The page of a module."
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    out = [f"# {name}", "", ast.get_docstring(tree) or "", ""]
    nodes = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    for node in nodes:
        if isinstance(node, ast.FunctionDef): out += function_page(node, lines); continue
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        out += [f"## `{node.name}`", "", "```python", f"class {node.name}{bases}", "```", "", ast.get_docstring(node) or "", ""]
        for method in node.body:
            public = isinstance(method, ast.FunctionDef) and (method.name[0] != "_" or method.name in ("__init__", "__call__"))
            if public: out += function_page(method, lines, "###")
    return "\n".join(out) if nodes else ""


def heading(path): # of a notebook
    "Its title."
    return next(source_of(c).splitlines()[0][2:] for c in read_notebook(path)["cells"] if source_of(c).startswith("# "))


def toctree(caption, names): return ["```{toctree}", ":maxdepth: 1", f":caption: {caption}", "", *names, "```", ""]


def write_sources(src):
    "What Sphinx reads: notebooks, pages of modules, pictures, settings."
    shutil.copytree(root / "figures", src / "figures", ignore=shutil.ignore_patterns("records", "*.csv", "*.safetensors"))
    (src / "_static").mkdir(); (src / "_static" / "book.css").write_text(CSS)
    # a browser stretches roots, sums and braces only in a font that was made for it, and many systems have none
    shutil.copy2(Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf", src / "_static")
    (src / "conf.py").write_text(CONF)
    chapters = sorted((root / "nbs").glob("[0-9]*.ipynb"))
    pages = {"Main line": chapters} | {t: sorted((root / "nbs" / f).glob("*.ipynb")) for f, t in APPENDICES.items()}
    moved = sorted((root / "nbs" / "moved").glob("*.ipynb"))
    for path in [root / "nbs" / "index.ipynb", *moved, *(p for many in pages.values() for p in many)]:
        target = src / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(chapter(path, chapters)), encoding="utf-8")
    modules = ["# Modules", "", "Every public function and class, with the shapes of what goes in and comes out.", ""]
    (src / "api").mkdir()
    for path in sorted((root / "finessl").rglob("*.py")): # no chapters: a list of all of them beside every page is long
        if path.stem.startswith("_modidx") or not (page := api_page(path)): continue
        name, said = page.split("\n", 1)[0][2:], (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").splitlines()
        modules.append(f"- [`{name}`]({name}.md): {said[0] if said else ''}")
        (src / "api" / f"{name}.md").write_text(f"---\norphan: true\n---\n\n{page}\n[All modules](index.md)\n", encoding="utf-8")
    (src / "api" / "index.md").write_text("\n".join(modules), encoding="utf-8")
    lines = ["# finessl", "", "Fine-tune a frozen foundation model from a handful of labels, and understand every piece of how "
             "that works. Begin with the [overview](nbs/index.ipynb) or with the [first notebook](nbs/00_start.ipynb).", "",
             "![Test accuracy against labels per class](figures/digits.png)", "", *toctree("Overview", ["nbs/index"])]
    for title, paths in pages.items():
        listed = [p.relative_to(root).with_suffix("").as_posix() for p in paths]
        if title == "Main line": listed = [f"{Path(n).name[:2]} {heading(p)} <{n}>" for n, p in zip(listed, paths)]
        lines += toctree(title if title == "Main line" else f"Appendix: {title}", listed)
    lines += toctree("Moved", [p.relative_to(root).with_suffix("").as_posix() for p in moved]) + toctree("Modules", ["api/index"])
    (src / "index.md").write_text("\n".join(lines), encoding="utf-8")


ATTRIBUTE = re.compile(r'\b(id|name|href|src)="([^"]*)"')


def read_page(text): # -> links, anchors, what is loaded from elsewhere
    "What a page of ours says in its tags."
    links, anchors, outside = set(), set(), set()
    for tag in re.findall(r"<[a-z][^<>]*>", text):
        for key, value in ATTRIBUTE.findall(tag):
            if not value: continue
            if key in ("id", "name"): anchors.add(unescape(value)); continue
            links.add(url := unescape(value))
            if tag.startswith(("<script", "<link", "<img")) and urlsplit(url).scheme in ("http", "https"): outside.add(url)
    return links, anchors, outside


def broken_links(out): # -> sentences
    "Links inside the site that lead nowhere, and what a page would load from elsewhere."
    pages = {os.path.abspath(p): read_page(p.read_text(encoding="utf-8")) for p in sorted(out.rglob("*.html"))}
    there, wrong = {str(p.absolute()) for p in out.rglob("*")}, []
    for path, (links, _, outside) in pages.items():
        where = os.path.relpath(path, out)
        wrong += [f"{where}: loads {url}" for url in sorted(outside)]
        for link in sorted(links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = os.path.normpath(os.path.join(os.path.dirname(path), unquote(parts.path))) if parts.path else path
            if target not in there or target not in pages and os.path.isdir(target): target = os.path.join(target, "index.html")
            if target not in there: wrong.append(f"{where}: {link} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target][1]:
                wrong.append(f"{where}: {link} has no such anchor")
    return wrong


def build(out):
    "Write the site; the errors, if there are any."
    with tempfile.TemporaryDirectory() as d:
        (src := Path(d) / "src").mkdir()
        write_sources(src)
        command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(Path(d) / "trees")]
        done = subprocess.run([*command, str(src), str(out)], capture_output=True, text=True)
        if done.returncode: return done.stderr.replace(str(src), "").splitlines()
    return broken_links(out)


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=root / "_book", help="folder of the site (default: _book)")
    out = ap.parse_args().out.resolve()
    if wrong := build(out): sys.exit("\n".join(wrong))
    print(f"{sum(1 for _ in out.rglob('*.html'))} pages in {out}; begin with {out / 'index.html'}")
