"""A mistake of the user ends a program with one line, a fault of the program with its traceback."""

import subprocess
import sys

import pytest


PROGRAM = """
import errno, os, signal, sys
from hfclip_errors import UsageError, run

class Refused(UsageError):
    exit_status = 1

def main():
    {main}

run(main, interrupted="Stopped. Run it again.")
"""


def start(main: str) -> subprocess.CompletedProcess:
    program = PROGRAM.format(main=main)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("main", "status", "line"),
    [
        ("raise UsageError('--out: found https://me:secret@host/x, expected a folder.')", 2, "error: --out: found https://***@host/x, expected a folder."),
        ("raise Refused('The Hub said no.')", 1, "error: The Hub said no."),
        ("raise OSError(errno.ENOSPC, 'No space left on device', '/out')", 2, "error: [Errno 28] No space left on device: '/out'"),
        ("os.kill(os.getpid(), signal.SIGINT); signal.pause()", 130, "Stopped. Run it again."),
        ("print('done')", 0, ""),
    ],
)  # fmt: skip
def test_ends_with_one_line_and_a_status(main, status, line):
    process = start(main)
    assert (process.returncode, process.stderr.strip()) == (status, line)


def test_fault_of_the_program_keeps_its_traceback():
    process = start("int('x')")
    assert process.returncode == 1 and "Traceback" in process.stderr and "in main" in process.stderr


def test_output_that_nobody_reads_any_more_is_no_error():
    program = PROGRAM.format(main="[print('line ' * 100) for _ in range(10000)]")
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


def test_is_imported_without_torch_and_is_the_same_in_the_library():
    code = "import sys, hfclip_errors as light; assert 'torch' not in sys.modules\n"
    code += "from hfclip.errors import UsageError; assert UsageError is light.UsageError"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
