"""The layer check holds on this tree, and finds crossings that are planted in a tree of its own."""

import unittest

from check_harness import Check

CHECK = Check("check_layers.py")


class CheckLayersTest(unittest.TestCase):
    def test_this_tree_keeps_its_layers(self):
        code, output = CHECK.on_this_tree()
        self.assertEqual(code, 0, output)

    def test_good_includes_pass(self):
        code, output = CHECK.on_files({
            "core/a.h": '#include <vector>\n#include "absl/status/status.h"\n#include "base/mutex.h"\n',
            "rpc/b.cc": '#include <grpcpp/grpcpp.h>\n#include <sys/socket.h>\n#include "core/a.h"\n',
            "worker/a_service.cc": '#include <grpcpp/grpcpp.h>\n#include "worker/b_service.h"\n',
            "services/c_main.cc": '#include <CLI/CLI.hpp>\n#include "worker/d.h"\n',
        })
        self.assertEqual(code, 0, output)

    def test_planted_crossings_fail(self):
        for path, include in [
            ("core/a.cc", '"rpc/server.h"'),
            ("core/a.cc", '"kvstore/memory_page_store.h"'),
            ("core/a.h", "<grpcpp/grpcpp.h>"),
            ("core/a.h", "<rocksdb/db.h>"),
            ("core/a.h", "<unistd.h>"),
            ("core/a.cc", '"spdlog/spdlog.h"'),
            ("base/a.h", '"core/page.h"'),
            ("base/a.h", "<openssl/evp.h>"),
            ("kernels/a_host.cc", '"base/mutex.h"'),
            ("kernels/a.h", "<cuda_runtime.h>"),
            ("kvstore/a.cc", '"rpc/channel.h"'),
            ("kvstore/a.cc", '"kvstore/remote_page_store.h"'),
            ("kvstore/a.cc", '"pagetide/v1/types.pb.h"'),
            ("rpc/a.cc", '"worker/frame_pool.h"'),
            ("worker/a.cc", "<grpcpp/grpcpp.h>"),
            ("worker/a.cc", "<nccl.h>"),
            ("worker/a.cc", '"worker/sequence_service.h"'),
            ("worker/a_service.cc", '"services/router_service.h"'),
            ("services/router.cc", "<CLI/CLI.hpp>"),
            ("services/router.cc", "<rocksdb/db.h>"),
            ("clients/cpp/a.cc", '"worker/a.h"'),
            ("cli/a.cc", '"tests/support/process.h"'),
            ("cli/a.cc", '"neighbour.h"'),
        ]:
            code, output = CHECK.on_files({path: f"#include <string>\n  #  include {include}\n"})
            self.assertEqual(code, 1, f"{path} {include}: {output}")
            self.assertIn(f"{path}:2: includes", output)

    def test_an_empty_tree_is_not_a_pass(self):
        code, _ = CHECK.on_files({"README.md": "nothing"})
        self.assertEqual(code, 1)


if __name__ == "__main__":
    unittest.main()
