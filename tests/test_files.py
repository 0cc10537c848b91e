# SPDX-License-Identifier: Apache-2.0

"""Files are written in full or not at all, whoever else writes them, and whatever goes wrong."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from anomalib_stfpm_ext.files import whole_file, write_file

LONGEST = 255  # bytes of a name, on about any file system


def test_file_and_its_folder_are_made_and_nothing_else(tmp_path):
    file = tmp_path / "new" / "folder" / "results.json"
    for text in ("first", "second, with an ä"):
        write_file(file, text)
        assert file.read_text(encoding="utf-8") == text
        assert list(file.parent.iterdir()) == [file]


def test_the_file_stays_as_it_was_until_the_other_is_written(tmp_path):
    file = tmp_path / "picture.png"
    file.write_text("before")
    with whole_file(file) as unfinished:
        unfinished.write_text("half")
        assert file.read_text() == "before"
        assert (unfinished.parent, unfinished.suffix, unfinished.name[0]) == (tmp_path, ".png", ".")
        unfinished.write_text("whole")
    assert file.read_text() == "whole"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "before"])
def test_nothing_is_left_of_what_fails(tmp_path, error, before):
    file = tmp_path / "picture.png"
    if before:
        file.write_text(before)

    def fail():
        with whole_file(file) as unfinished:
            unfinished.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.read_text() for path in tmp_path.iterdir()] == ([before] if before else [])


def test_nothing_is_left_where_the_file_cannot_be_replaced(tmp_path):
    (tmp_path / "picture.png").mkdir()
    with pytest.raises(OSError, match=r"picture\.png"):
        write_file(tmp_path / "picture.png", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_names_may_be_as_long_as_they_can_be(tmp_path):
    file = tmp_path / f"{'n' * (LONGEST - 4)}.png"
    write_file(file, "text")
    assert file.read_text() == "text"


def test_threads_that_write_at_the_same_time_leave_one_whole_file(tmp_path):
    texts = [letter * 100_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(lambda text: write_file(tmp_path / "results.md", text), texts * 5))
    (file,) = tmp_path.iterdir()
    assert file.read_text() in texts


OTHER = """
from pathlib import Path
from anomalib_stfpm_ext.files import write_file
write_file(Path({!r}), "other")
"""


def test_processes_that_write_at_the_same_time_leave_one_whole_file(tmp_path, python):
    """One begins, the other writes meanwhile, and each has a file of its own."""
    file = tmp_path / "results.md"
    with whole_file(file) as unfinished:
        unfinished.write_text("begun first")
        python(OTHER.format(str(file)))
        assert file.read_text() == "other"
        assert unfinished.read_text() == "begun first"
    assert file.read_text() == "begun first"
    assert list(tmp_path.iterdir()) == [file]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_file(tmp_path / "whole", "")
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "whole")]
    assert modes[0] == modes[1]
