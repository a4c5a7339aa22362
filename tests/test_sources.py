"""Text files: which are found, what their lines are, and what is said of those that are wrong."""

import gzip
from itertools import chain

import pytest

from bertfast.errors import DataError
from bertfast.train.sources import find_files, read_batches, read_lines


def test_directories_are_searched_for_texts(tmp_path):
    texts = [f"z{i}.txt" for i in (7, 3, 9, 1, 8, 2, 6, 4, 5)]
    for name in ("b.txt", "a.txt.gz", "deep/er/c.txt", "notes.md", "deep/data.gz", *texts):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in ("a.txt.gz", "b.txt", "deep/er/c.txt", *sorted(texts))]
    assert find_files([tmp_path]) == expected
    assert find_files([str(tmp_path / "notes.md"), tmp_path / "deep"]) == [tmp_path / "notes.md", expected[2]]


@pytest.mark.parametrize(
    "names, message",
    [
        (["nowhere"], "there is no file or directory .*nowhere"),
        (["empty"], "empty holds no "),
        ([], "no texts"),
        (["a.txt", "sub/../a.txt"], "a.txt is named twice"),
        (["a.txt", "."], "a.txt is named twice"),
    ],
)
def test_paths_that_are_wrong(tmp_path, names, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=message):
        find_files([tmp_path / name for name in names])


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
@pytest.mark.parametrize(
    "content, lines",
    [
        ("one\n\ntwo\n", ["one", "", "two"]),
        ("\ufeffone\r\n\r\ntwo", ["one", "", "two"]),
        ("form\x0cfeed and \u2028 are no line ends\n", ["form\x0cfeed and \u2028 are no line ends"]),
        ("", []),
    ],
)
def test_lines(tmp_path, ending, content, lines):
    path = tmp_path / f"a{ending}"
    data = content.encode()
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    assert list(read_lines(path)) == lines
    assert [line for batch in read_batches(path) for line in batch] == lines


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_progress_and_batches(tmp_path, ending):
    path, lines = tmp_path / f"a{ending}", [f"line {i}" * 10 for i in range(30_000)]
    (gzip.open if ending.endswith("gz") else open)(path, "wb").write("\n".join(lines).encode())
    steps: list[int] = []
    batches = list(read_batches(path, steps.append))
    assert [*chain(*batches)] == lines
    assert sum(steps) == path.stat().st_size and len(steps) > 20
    assert len(batches) > 2 and all(sum(map(len, batch)) < 1_000_100 for batch in batches)


def test_what_is_not_utf8_is_named_by_its_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\n\n" + "café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt:3: not UTF-8 text: byte 0xe9"):
        list(read_lines(path))


def test_archives_that_are_cut_or_none(tmp_path):
    whole = gzip.compress(b"some words that do not repeat, 1234567890\n" * 50)
    for i, data in enumerate((whole[:-20], whole[:-4] + b"oops", b"plain text", whole[:10] + b"\xff" + whole[11:])):
        path = tmp_path / f"{i}.txt.gz"
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{i}\.txt\.gz cannot be read: \S"):
            list(read_lines(path))


def test_a_file_that_goes_away(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt cannot be read: No such file"):
        list(read_lines(tmp_path / "gone.txt"))
