"""Standard streams that are closed, or whose reader is gone, change where words go and not what a command does."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bsfa_cli import errors, streams

RESULT = next(Path(__file__).parents[1].glob("profiles/results/*.nvidia-h200.json"))


def shell(script: str) -> tuple[int, str]:
    """(exit code, what the command wrote to a stream that was left open) of a line of bash, in which BSFA stands for
    bsfa and RESULT for a file that it can inspect.
    """
    script = script.replace("BSFA", f"{sys.executable} -m bsfa_cli").replace("RESULT", str(RESULT))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command, code, words",
    [
        ("BSFA inspect RESULT >&-", 0, "NVIDIA H200"),
        ("BSFA inspect RESULT 2>&-", 0, ""),
        ("BSFA env <&- >&- 2>&-", 0, ""),
        ("BSFA env --json 2>&-", 0, '"backends"'),
        ("BSFA env --json >&-", 2, "it prints on stdout, which is closed"),
        ("BSFA env --json >&- 2>&-", 2, ""),
        ("BSFA report >&-", 2, "bsfa: which results?"),
        ("BSFA report 2>&-", 2, ""),
        ("BSFA --version >&-", 0, ""),
    ],
)
def test_closed_streams(command, code, words):
    found, output = shell(command)
    assert found == code and words in output
    assert "Traceback" not in output and "bug" not in output


@pytest.mark.parametrize(
    "command",
    [
        "BSFA inspect RESULT --json",
        "BSFA inspect RESULT 2>&1",
        "BSFA env --help",
        "BSFA report 2>&1",
    ],
)
def test_a_reader_that_is_gone(command):
    # The reader is gone for certain before the first word comes.
    found, output = shell(f"{{ sleep 0.3; {command}; echo $? >&3; }} 3>&2 | true")
    assert found == 0 and output.split() == ["2" if "report" in command else "141"]


def test_a_file_opened_later_does_not_take_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import sys; from bsfa_cli import streams; streams.open_closed_streams()\n"
        f"kept = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('words'); print('words', file=sys.stderr); kept.write(str(kept.fileno()))"
    )
    assert shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-') == (0, "")
    assert int((tmp_path / "file").read_text()) > 2


def test_a_stream_that_cannot_be_written_is_a_sentence():
    reader, writer = os.pipe()
    with pytest.raises(errors.UsageError, match="cannot write to stdout: Bad file descriptor"):
        streams.write(Unwritable(writer), "words")
    os.close(reader)
    os.close(writer)


class Unwritable(io.StringIO):
    """Stands for a stdout that was opened for reading only."""

    name = "<stdout>"

    def __init__(self, descriptor: int):
        super().__init__()
        self.fileno = lambda: descriptor

    def flush(self):
        raise OSError(9, "Bad file descriptor")


def test_a_message_stays_on_one_line(run, one_sentence):
    one_sentence(run("report", "no\nsuch\x1b[2J file", "-o", "x.html"), 4, r"no\nsuch\x1b[2J file")
