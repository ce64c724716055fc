"""Adds the generated modules to the build; all else is in pyproject.toml."""

import pathlib
import subprocess
import sys

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithStubs(build_py):
    def run(self) -> None:
        super().run()
        # Also for editable installs, which take the sources as they lie.
        out = (pathlib.Path(__file__).parent / "src" if self.editable_mode else
               pathlib.Path(self.build_lib))
        generate = pathlib.Path(__file__).resolve().with_name("generate.py")
        subprocess.run([sys.executable, str(generate), str(out)], check=True)


setup(cmdclass={"build_py": BuildWithStubs})
