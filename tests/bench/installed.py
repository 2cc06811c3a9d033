# SPDX-License-Identifier: GPL-2.0-or-later
"""luksrotd as a user has it: installed, and compiled beforehand.

The tests run the source tree, whose modules Python may have to compile each time, and find it by a hook that takes as
long as a quarter of all imports.
"""

import compileall
import importlib.util
import shutil
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.stage import BENCH
from tests.support.daemon_process import ENVIRONMENT
from tests.support.testbed import PROJECT

_SCRIPT: Final = """\
#!{python}
import sys
from luksrotd.ctl.program import command
if __name__ == "__main__":
    sys.exit(command())
"""


@dataclass(frozen=True, slots=True)
class Program:
    """luksrotctl as a command, and what its environment is to say."""

    command: Sequence[str]
    environment: Mapping[str, str]


#: As it is here, where it does not matter how long it takes to start.
SOURCE_TREE: Final = Program((sys.executable, "-m", "luksrotd.ctl"), ENVIRONMENT)


def installed(folder: Path = BENCH / "installed") -> Program:
    """In a virtual environment that ``folder`` becomes, with a copy of the source tree's package.

    What luksrotd depends on is that of the interpreter that runs this.
    """
    venv.create(folder, clear=True, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    shutil.copytree(PROJECT / "luksrotd", packages / "luksrotd", ignore=shutil.ignore_patterns("__pycache__"))
    if not compileall.compile_dir(packages, quiet=1):
        raise RuntimeError("luksrotd could not be compiled")
    (packages / "dependencies.pth").write_text(f"{_others()}\n")
    python, script = folder / "bin" / Path(sys.executable).name, folder / "bin" / "luksrotctl"
    script.write_text(_SCRIPT.format(python=python))
    script.chmod(0o755)
    return Program((str(script),), {"PYTHONPATH": ""})


def _others() -> Path:
    """The folder of the packages that luksrotd depends on."""
    found = importlib.util.find_spec("_cffi_backend")
    if found is None or found.origin is None:
        raise RuntimeError("cffi is not installed")
    return Path(found.origin).parent
