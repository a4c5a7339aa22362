"""The README's table of compatibility is the committed cells', and every cell names what there is."""

import pytest

pytest.importorskip("transformers")

import compatibility
from stock_models import CLASSES, FAMILIES


def test_the_readme_shows_the_committed_cells() -> None:
    readme = compatibility.README.read_text(encoding="utf-8")
    assert compatibility.placed(readme, compatibility.committed()) == readme
    assert all(f" {seam} |" in readme for seam in compatibility.committed()["5"])


def test_cells_are_of_classes_and_paths_that_there_are() -> None:
    for cells in compatibility.committed().values():
        assert cells
        for row in cells.values():
            assert set(row) <= set(CLASSES) and set(row.values()) <= set(compatibility.SYMBOLS)


def test_a_cell_that_changed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compatibility.RECORD, raising=False)
    cells = {"a seam": {"BertModel": "packed"}}
    monkeypatch.setattr(compatibility, "committed", lambda: {"5": cells, "4.57": cells})
    compatibility.note("a seam", "BertModel", "packed")
    for other in (
        ("a seam", "BertModel", "stock"),
        ("a seam", "BertForMaskedLM", "packed"),
        ("b", "BertModel", "packed"),
    ):
        with pytest.raises(AssertionError, match=r"compatibility\.json"):
            compatibility.note(*other)


def test_heads_that_differ_have_a_footnote() -> None:
    row = {name: "packed" for name in FAMILIES["bert"].classes} | {"BertForQuestionAnswering": "rectangle"}
    text = compatibility.table({"5": {"padding": row}, "4.57": {"padding": {"BertModel": "stock"}}})
    assert "| padding | ●<sup>1</sup> | – |" in text and "<sup>1</sup> ForQuestionAnswering: ◐" in text
    assert "| padding (4.57) | ○ |" in text
