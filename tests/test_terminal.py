"""What a command writes to a terminal."""

import subprocess
import sys


def test_a_librarys_own_chatter_is_not_the_commands():
    """Dask gives its loggers a level of their own, INFO: with it a traceback was printed for a lost connection."""
    code = (
        "import logging; from s4v.terminal import set_up_output; set_up_output(); log = logging.getLogger('library');"
        "log.setLevel(logging.INFO); log.info('a connection was closed'); log.warning('a disk is slow')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == "WARNING: a disk is slow\n"
