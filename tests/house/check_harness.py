"""Runs a check of tools/ on this tree, or on one that is made for it."""

import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


class Check:
    """One check of tools/, by its file's name."""

    def __init__(self, name):
        self._tool = ROOT / "tools" / name

    def on_this_tree(self):
        """Returns the check's exit code and all that it printed."""
        return self._run(ROOT)

    def on_files(self, files):
        """The same on a tree of nothing but these files: texts by their paths."""
        with tempfile.TemporaryDirectory() as folder:
            for path, text in files.items():
                file = pathlib.Path(folder) / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            return self._run(folder)

    def _run(self, root):
        done = subprocess.run([sys.executable, str(self._tool), "--root", str(root)], text=True,
                              capture_output=True, check=False)
        return done.returncode, done.stdout + done.stderr
