"""The book: what stays behind, what its pages hold, links. The whole site is built where Sphinx is installed, as with
`pip install ".[dev]"`, in about a minute."""
import importlib.util, re
from pathlib import Path
import pytest
from finessl.course.exercises import read_mark, source_of

root = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("book", root / ".ci" / "book.py")
book = importlib.util.module_from_spec(spec)
spec.loader.exec_module(book)
chapters = sorted((root / "nbs").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("path", chapters, ids=[p.stem for p in chapters])
def test_a_chapter_holds_no_solution_and_opens_elsewhere(path):
    cells = book.chapter(path, chapters)["cells"]
    assert {"solution", "rubric", "discussion"}.isdisjoint(m.part for c in cells if (m := read_mark(c)))
    links = re.findall(r"\]\((https://(?:colab|mybinder)\S+)\)", "\n".join(map(source_of, cells)))
    assert links[0] == f"https://colab.research.google.com/github/finessl/finessl/blob/main/nbs/{path.name}"
    assert links[1] == f"https://mybinder.org/v2/gh/finessl/finessl/main?labpath=nbs/{path.name}"


def test_a_page_of_a_module_has_a_row_an_argument():
    page = book.api_page(root / "finessl" / "margin.py")
    assert "| `alpha` | `8.0` | α ≥ 0, scale of the margins, in logits |" in page
    assert "| *returns* | | (C,) float in [0, α], larger for classes with fewer pseudo-labels |" in page


def test_broken_links_and_what_is_loaded_from_elsewhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="x"></p><a href="b.html#y">b</a><a href="#x"></a><a href="c.html"></a>'
                                     '<script src="https://cdn.example/m.js"></script><a href="https://a.org"></a>')
    (tmp_path / "b.html").write_text('<p id="z"></p><a href="a.html#x"></a>')
    assert book.broken_links(tmp_path) == [
        "a.html: loads https://cdn.example/m.js", "a.html: b.html#y has no such anchor", "a.html: c.html is not there"]


def test_the_site_is_built_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_nb", "furo", "latex2mathml", "ziamath"): pytest.importorskip(name)
    assert book.build(tmp_path / "site") == []
    index = (tmp_path / "site" / "nbs" / "05_margin.html").read_text("utf-8")
    assert "<math" in index and "my_class_margins" in index and "#| solution" not in index
