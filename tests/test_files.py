"""Files are written whole or not at all; what is no regular file is never replaced."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest
from bsfa_kernels.files import destination, write_together, write_whole

from bsfa_cli import errors, files


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_file_is_new_or_replaced_and_keeps_its_permissions(tmp_path):
    path = tmp_path / ("n" * 255)
    write_whole(path, b"one")
    assert path.read_bytes() == b"one" and stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()
    path.chmod(0o440)
    write_whole(path, b"two")
    assert path.read_bytes() == b"two" and stat.S_IMODE(path.stat().st_mode) == 0o440
    assert list(tmp_path.iterdir()) == [path]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_stood_there_stays_when_writing_fails(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    write_together({first: b"one", second: b"two"})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(first, b"three")
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(descriptor) or len(calls) < 2 or full())
    with pytest.raises(OSError, match="No space"):
        write_together({first: b"three", second: b"four"})
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_the_file_and_its_folder_are_flushed(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    write_whole(tmp_path / "file", b"one")
    part, folder = flushed
    assert part.startswith(f"{tmp_path}/.file.") and part.endswith(".part") and folder == str(tmp_path)


def test_links_are_followed_and_stay_links(tmp_path):
    (tmp_path / "real").mkdir()
    target, link, chain = tmp_path / "real" / "file", tmp_path / "link", tmp_path / "chain"
    link.symlink_to("real/file")
    chain.symlink_to(link)
    for content in (b"made", b"replaced"):
        write_whole(chain, content)
        assert target.read_bytes() == content and not target.is_symlink()
    assert link.is_symlink() and chain.is_symlink() and destination(chain) == target
    assert sorted(tmp_path.iterdir()) == [chain, link, tmp_path / "real"]
    assert list((tmp_path / "real").iterdir()) == [target]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="[Ss]ymbolic links"):
        write_whole(loop, b"")


def test_a_link_planted_at_a_name_of_ours_is_never_written_through(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "file.part").symlink_to(victim)
    monkeypatch.setattr("bsfa_kernels.files.secrets.token_hex", lambda size: "guessed")
    (tmp_path / ".file.guessed.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "file", b"one")
    assert victim.read_bytes() == b"precious"


def pipe(path):
    os.mkfifo(path)


def listening(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize("make, kind", [(pipe, "named pipe"), (listening, "socket"), (os.mkdir, "directory")])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket has to be short
    make("there")
    (tmp_path / "link").symlink_to("there")
    before = os.lstat("there")
    for path in (tmp_path / "there", tmp_path / "link"):
        with pytest.raises(OSError, match=f"it is a {kind}, and only regular files are written"):
            write_whole(path, b"content")
        for refused in (lambda path=path: files.write_whole(path, b""), lambda path=path: files.check_writable(path)):
            with pytest.raises(errors.UsageError, match=f"cannot write {path}: it is a {kind}"):
                refused()
    after = os.lstat("there")
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode) and (tmp_path / "link").is_symlink()


def test_the_tool_makes_folders_and_says_why_it_cannot_write(tmp_path, monkeypatch):
    target = tmp_path / "new" / "file"
    files.write_whole(target, b"one")
    files.check_writable(target)
    (tmp_path / "link").symlink_to("other/file")
    files.write_whole(tmp_path / "link", b"one")
    assert (tmp_path / "other" / "file").read_bytes() == b"one"
    with pytest.raises(errors.UsageError, match="cannot write"):
        files.write_whole(target / "below", b"two")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(errors.MachineError, match="no space left"):
        files.write_whole(target, b"two")
    assert target.read_bytes() == b"one" and os.listdir(target.parent) == ["file"]


@pytest.mark.parametrize("kind", [files.THRESHOLDS, files.RESULT, files.PAGE, files.CAPTURE])
def test_an_output_replaces_its_like_alone(tmp_path, kind):
    def header(metadata: dict) -> bytes:
        text = json.dumps({"__metadata__": metadata}).encode()
        return len(text).to_bytes(8, "little") + text

    likes = {
        files.THRESHOLDS: header({"bsfa": ""}), files.CAPTURE: header({"bsfa_capture": ""}),
        files.RESULT: b'{"kind": "bsfa verify"}', files.PAGE: b"<!DOCTYPE html>\n",
        "weights": header({"format": "pt"}), "settings": b'{"architectures": []}', "text": b"x",
        "cut": b"\xff" * 8 + b"{",
    }  # fmt: skip
    path = tmp_path / "file"
    files.check_writable(path, kind)
    path.touch()
    files.check_writable(path, kind)
    for name, content in likes.items():
        path.write_bytes(content)
        if name == kind:
            files.check_writable(path, kind)
        else:
            with pytest.raises(errors.UsageError, match=f"would be replaced by {kind}"):
                files.check_writable(path, kind)


def test_no_output_option_replaces_a_named_pipe(run, one_sentence, tmp_path):
    out = tmp_path / "pipe"
    pipe(out)
    result = Path(__file__).parent.parent / "profiles/results/methods-frames.nvidia-h200.json"
    for command in (
        ("calibrate", "-o", out),
        ("capture", "-o", out),
        ("compare", "--length", "256", "-o", out),
        ("compare", "--length", "256", "--plot", out),
        ("profile", "--profile", "tiny", "-o", out),
        ("profile", "--profile", "tiny", "--plot", out),
        ("report", result, "-o", out),
    ):
        device = () if command[0] == "report" else ("--device", "cpu")
        one_sentence(run(*command, *device), 2, str(out))
        assert stat.S_ISFIFO(os.lstat(out).st_mode), command
