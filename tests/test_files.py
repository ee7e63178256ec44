"""Files that are written whole or not at all, with names that nobody can predict, and what killed processes leave."""

import errno
import os
import signal
import stat

import pytest

from gut_fast.files import FileError, read_within, remove_leftovers, replacing


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def write(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text)


def overwrite(path, write_to):
    with replacing(path) as temporary:
        write_to(temporary)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_a_killed_child(function):
    """Calls the function in a forked child, which kills itself afterwards; nothing of the child's cleaning up runs."""
    child = os.fork()
    if not child:
        try:
            function()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o755])
def test_the_replaced_files_permissions_are_kept(tmp_path, mode):
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(mode)
    with replacing(file) as temporary:
        temporary.write_text("new")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", mode)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, mask, mode):
    os.umask(mask)
    write(tmp_path / "file", "new")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "link").symlink_to("file")
    for text in ("first", "second"):
        write(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "second"


def test_a_strangers_link_at_a_temporary_name_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("old")
    guesses = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr("gut_fast.files.secrets.token_hex", lambda size: next(guesses))
    (tmp_path / f".file.{'0' * 16}.tmp").symlink_to("precious")
    write(tmp_path / "file", "new")
    assert (tmp_path / "precious").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"


def test_no_two_temporary_files_have_the_same_name(tmp_path):
    seen = set()
    for _ in range(20):
        with replacing(tmp_path / "file") as temporary:
            temporary.touch()
            seen.add(temporary.name)
    assert len(seen) == 20


@pytest.mark.parametrize("again", ["save", "load"])
def test_what_a_killed_process_leaves_is_removed_by_the_next_save_or_load(tmp_path, again):
    file = tmp_path / "file"

    def write_half():
        with replacing(file) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    write(file, "whole")
    in_a_killed_child(write_half)
    assert len(names(tmp_path)) == 2
    if again == "save":
        write(file, "whole")
    else:
        remove_leftovers(file)
    assert names(tmp_path) == ["file"]
    assert file.read_text() == "whole"


def test_what_a_living_process_writes_stays(tmp_path):
    file = tmp_path / "file"
    with replacing(file) as temporary:
        temporary.write_text("first")
        in_a_killed_child(lambda: write(file, "of another process"))
        assert file.read_text() == "of another process"
        remove_leftovers(file)
        assert temporary.exists()
    assert file.read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_only_leftovers_of_the_same_file_are_removed(tmp_path):
    others = [".file.tmp", ".file.notes.tmp", f".file.other.{'a' * 16}.tmp", f".other.{'a' * 16}.tmp", "file.1.tmp"]
    for name in [*others, ".file.123.tmp", f".file.{'a' * 16}.tmp"]:
        (tmp_path / name).touch()
    (tmp_path / f".file.{'b' * 16}.tmp").mkdir()
    os.mkfifo(tmp_path / f".file.{'c' * 16}.tmp")
    remove_leftovers(tmp_path / "file")
    assert names(tmp_path) == sorted([*others, f".file.{'b' * 16}.tmp", f".file.{'c' * 16}.tmp"])


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path):
    file = tmp_path / "file"
    write(file, "old")

    def fail(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: .*file'") as caught:
        overwrite(file, fail)
    assert caught.value.errno == errno.ENOSPC
    assert (file.read_text(), names(tmp_path)) == ("old", ["file"])


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_nothing_but_a_file_is_replaced(tmp_path, kind):
    path = tmp_path / "it"
    (path.mkdir if kind == "folder" else lambda: os.mkfifo(path))()
    with pytest.raises(OSError, match=r"this is a folder|this is no file that could be replaced"):
        write(path, "new")
    assert names(tmp_path) == ["it"]


def test_a_file_is_read_up_to_a_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert read_within(tmp_path / "file", 100) == b"x" * 100
    with pytest.raises(FileError, match="file is larger than 99 bytes"):
        read_within(tmp_path / "file", 99)
