"""Every rpc of this tree names its retry, and the check finds those of a planted tree that do not."""

import unittest

from check_harness import Check


class CheckApiTest(unittest.TestCase):
    def check(self, proto):
        return Check("check_api.py").on_files({"proto/pagetide/v1/a.proto": proto})

    def test_every_rpc_of_this_tree_names_its_retry(self):
        code, output = Check("check_api.py").on_this_tree()
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
