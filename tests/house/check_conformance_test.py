"""The page of conformance names tests that are there and run; wrong names are found."""

import unittest

from check_harness import Check

CHECK = Check("check_conformance.py")
PAGE = "| case | what | tests |\n|---|---|---|\n| A1 | pages | {} |\n\n| a | b |\n|---|---|\n| c | Other |\n"
TREE = {
    "tests/a/CMakeLists.txt": "pagetide_test(a_test SRCS a.cc b.cc\n  LIBS x LABELS integration conformance)\n"
                              "pagetide_test(c_test SRCS c.cc LIBS x)\n",
    "tests/a/a.cc": "TEST(ATest, First) {}\n",
    "tests/a/b.cc": "TEST_F(BTest,\n       Second) {}\nTEST_P(BTest, Third) {}\n",
    "tests/a/c.cc": "TEST(CTest, Unlabelled) {}\n",
}


class CheckConformanceTest(unittest.TestCase):
    def check(self, names):
        files = dict(TREE)
        if names is not None:
            files["docs/conformance.md"] = PAGE.format(names)
        return CHECK.on_files(files)

    def test_this_tree_has_what_its_page_names(self):
        code, output = CHECK.on_this_tree()
        self.assertEqual(code, 0, output)

    def test_tests_of_every_form_are_found(self):
        code, output = self.check("First, Second, Third")
        self.assertEqual(code, 0, output)

    def test_wrong_names_fail(self):
        for name, why in [("Fourth", "is not there"), ("Unlabelled", "does not carry the label")]:
            code, output = self.check(f"First, {name}")
            self.assertEqual(code, 1, output)
            self.assertIn(f"docs/conformance.md:3: test {name} {why}", output)
            self.assertNotIn("First", output)

    def test_a_page_that_names_nothing_is_not_a_pass(self):
        self.assertEqual(self.check(None)[0], 1)


if __name__ == "__main__":
    unittest.main()
