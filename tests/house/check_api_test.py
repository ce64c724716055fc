"""Every rpc of this tree names its retry, and the check finds those of a planted tree that do not."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CHECK = ROOT / "tools" / "check_api.py"


def run(root):
    done = subprocess.run([sys.executable, str(CHECK), "--root", str(root)], text=True,
                          capture_output=True, check=False)
    return done.returncode, done.stdout + done.stderr


class CheckApiTest(unittest.TestCase):
    def check(self, proto):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "proto" / "pagetide" / "v1" / "a.proto"
            file.parent.mkdir(parents=True)
            file.write_text(proto, encoding="utf-8")
            return run(folder)

    def test_every_rpc_of_this_tree_names_its_retry(self):
        code, output = run(ROOT)
        self.assertEqual(code, 0, output)

    def test_an_rpc_without_comment_is_found(self):
        code, output = self.check("service S {\n  // Reads. May be retried.\n"
                                  "  rpc Read(A) returns (B);\n  rpc Write(A) returns (B);\n}\n")
        self.assertEqual(code, 1)
        self.assertEqual(output, "proto/pagetide/v1/a.proto:4: rpc Write has no comment\n")

    def test_a_comment_that_is_silent_on_retry_is_found(self):
        code, output = self.check("service S {\n  // Writes.\n  rpc Write(stream A) returns (B);\n}\n")
        self.assertEqual(code, 1)
        self.assertIn("rpc Write does not say whether it may be retried", output)

    def test_a_comment_apart_from_its_rpc_does_not_count(self):
        code, _ = self.check("service S {\n  // May be retried.\n\n  rpc Write(A) returns (B);\n}\n")
        self.assertEqual(code, 1)

    def test_an_empty_tree_is_not_a_pass(self):
        code, _ = self.check("syntax = \"proto3\";\n")
        self.assertEqual(code, 1)


if __name__ == "__main__":
    unittest.main()
