"""Draws results/terminal.svg for README: the end of a training in the terminal.

    python tools/terminal.py

Trains mnist_cnn with its default settings in a terminal of its own, in a temporary folder.
"""

import io
import os
import pathlib
import pty
import re
import sys
import tempfile

from common.cli import Parser, UserError, run_script
from common.records import write_file

from rich.console import Console
from rich.text import Text

ROOT = pathlib.Path(__file__).parent.parent
COLUMNS, LINES = 80, 22  # LINES: how many of the last lines to draw.


def main() -> None:
    Parser(__doc__).parse_args()
    output = b""

    def read(terminal: int) -> bytes:
        nonlocal output
        text = os.read(terminal, 1024)
        output += text
        return text

    os.environ |= {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        status = pty.spawn([sys.executable, str(ROOT / "recipes" / "mnist_cnn.py"), "--data", "tfds"], read)
    if status:
        raise UserError(f"mnist_cnn: exited with {os.waitstatus_to_exitcode(status)}; see its output above")
    path = ROOT / "results" / "terminal.svg"
    text = output.decode().replace(str(pathlib.Path(sys.executable).parent), ".venv/bin")
    write_file(path, drawn(text, "scripts/run.sh mnist_cnn"))
    print(f"wrote {path}")


def drawn(output: str, title: str) -> str:
    """Draws the last lines that a program wrote to a terminal, as SVG without external fonts."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in output.rstrip().replace("\r\n", "\n").split("\n")[-LINES:]:
        console.print(Text.from_ansi(line.rpartition("\r")[2].replace("\b", "")))  # The last state of a progress bar.
    console.print()  # Rich cuts the last line.
    return re.sub(r"@font-face {.*?}\s*", "", console.export_svg(title=title, unique_id="terminal"), flags=re.DOTALL)


if __name__ == "__main__":
    run_script(main)
