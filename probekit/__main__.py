"""``python -m probekit``: see :mod:`probekit.cli.main`."""

import gc
import os
import sys

from probekit.cli.main import main


def start_in_utf8_mode() -> None:
    """Start anew in Python's UTF-8 mode where the locale has another encoding.

    Names of files, and what a library reads and writes without naming an encoding, would depend on
    it. What is printed keeps the terminal's encoding.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding().lower() == "utf-8":
        return
    environment = os.environ | {
        "PYTHONUTF8": "1",
        "PYTHONIOENCODING": f"{sys.stdout.encoding}:replace",
    }
    command = [sys.executable, "-m", "probekit", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    start_in_utf8_mode()
    exit_code = main()
    gc.freeze()  # or the end takes a second longer, to look through all objects of torch again
    sys.exit(exit_code)
