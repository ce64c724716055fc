"""docs/metrics.md names every metric of this tree, and the check finds what a planted page lacks or invents."""

import unittest

from check_harness import Check

CHECK = Check("check_metrics.py")


class CheckMetricsTest(unittest.TestCase):
    def check(self, code, page):
        return CHECK.on_files({"rpc/a.cc": code, "docs/metrics.md": page})

    def test_the_page_names_every_metric_of_this_tree(self):
        code, output = CHECK.on_this_tree()
        self.assertEqual(code, 0, output)

    def test_a_page_that_is_complete_passes(self):
        code, output = self.check('GetCounter("pagetide_rpc_calls_total", "Calls")',
                                  "## `pagetide_rpc_`\n| `pagetide_rpc_calls_total` | counter |\n")
        self.assertEqual(code, 0, output)

    def test_a_metric_without_a_row_is_found(self):
        code, output = self.check('GetGauge("pagetide_rpc_open", "Open"); "pagetide_service_lister"', "# Metrics\n")
        self.assertEqual(code, 1)
        self.assertEqual(output, "pagetide_rpc_open: registered by the code, no row in docs/metrics.md\n")

    def test_a_row_without_a_metric_is_found(self):
        code, output = self.check('"pagetide_rpc_open"',
                                  "| `pagetide_rpc_open` | gauge |\n| `pagetide_rpc_gone` | gauge |\n")
        self.assertEqual(code, 1)
        self.assertIn("pagetide_rpc_gone: in docs/metrics.md", output)

    def test_an_alarm_on_nothing_is_found(self):
        code, output = self.check('"pagetide_rpc_open"',
                                  "| `pagetide_rpc_open` | gauge |\n| `pagetide_rpc_gone{a=\"b\"}` > 0 | look |\n")
        self.assertEqual(code, 1)
        self.assertIn("pagetide_rpc_gone: in docs/metrics.md", output)

    def test_an_empty_tree_is_not_a_pass(self):
        code, _ = self.check("", "")
        self.assertEqual(code, 1)


if __name__ == "__main__":
    unittest.main()
