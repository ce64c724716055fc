#!/usr/bin/env python3
"""Enforces the layers of docs/architecture.md by reading every #include line.

    tools/check_layers.py [--root DIR]

Prints one line a crossing (file:line: who may not include what, and why) and exits 1 if there is one.
All headers of the system lie in one folder, so link targets cannot enforce this: this check does.
"""

import argparse
import fnmatch
import pathlib
import re
import sys

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
SUFFIXES = {".h", ".cc", ".cu", ".cuh"}

# What an include means. The first pattern that matches decides; paths of the project are matched by
# their top folder below. "std" is everything without a slash and without ".h": the C++ library.
EXTERNALS = [
    ("absl", ["absl/*"]),
    ("grpc", ["grpc/*", "grpcpp/*"]),
    ("protobuf", ["google/*"]),
    ("proto", ["pagetide/*"]),
    ("rocksdb", ["rocksdb/*"]),
    ("cuda", ["cuda*", "cub/*", "cooperative_groups*", "nccl.h"]),
    ("openssl", ["openssl/*"]),
    ("spdlog", ["spdlog/*"]),
    ("xxhash", ["xxhash.h"]),
    ("prometheus", ["prometheus/*", "CivetServer.h", "civetweb.h"]),
    ("cli11", ["CLI/*"]),
    ("json", ["nlohmann/*"]),
    ("asio", ["asio.hpp", "asio/*"]),
    ("codec", ["zstd.h", "lz4.h", "lz4hc.h", "isa-l.h", "isa-l/*"]),
    ("simd", ["immintrin.h", "x86intrin.h", "arm_neon.h"]),
    ("test", ["gtest/*", "gmock/*", "benchmark/*", "rapidcheck*"]),
]

# Parts of a folder that stand a layer higher than the rest of it: those that speak gRPC.
SUBFOLDERS = [
    ("kvstore-wire", ["kvstore/remote*", "kvstore/page_store_codec.*",
                      "kvstore/retrying_page_store.*"]),
    ("worker-wire", ["worker/*_service.*", "worker/session_service_files.*", "worker/import_stream.*",
                     "worker/service_support.*", "worker/row_wire.*",
                     "worker/lent_frames.*", "worker/local_plane*", "worker/router_link.*",
                     "worker/grpc_collective.*", "worker/sequence_sender.*",
                     "worker/shard_group_*", "worker/shard_peers.*",
                     "worker/transfer_wire.*"]),
    # What every program's services share; lower than the rest of services/.
    ("services-common", ["services/admin_common.*", "services/tenant.*"]),
]
BELOW_SERVICES = {"base", "core", "formats", "kernels", "decoder", "kvstore", "rpc", "worker",
                  "kvstore-wire", "worker-wire", "services-common"}

# (files or subfolder, what they may include of the project, what they may include of others). The first row whose
# pattern matches a file decides. "std" and "absl" are allowed everywhere; "posix" means C headers.
RULES = [
    ("base/*.h", {"base"}, set()),
    ("base/*.cc", {"base"}, {"posix", "openssl", "spdlog", "xxhash"}),
    ("core/*", {"base", "core"}, set()),
    ("formats/*", {"base", "core", "formats"}, {"json"}),
    ("kernels/*.cu", {"kernels"}, {"cuda"}),
    ("kernels/*.cuh", {"kernels"}, {"cuda"}),
    ("kernels/*", {"kernels"}, {"simd"}),
    ("decoder/pagetide_kv_backend.*", {"base", "core", "kernels", "decoder", "clients"}, set()),
    ("decoder/*", {"base", "core", "kernels", "decoder"}, set()),
    ("kvstore-wire", {"base", "core", "kvstore", "kvstore-wire", "rpc"},
     {"posix", "grpc", "protobuf", "proto"}),
    ("kvstore/*", {"base", "core", "kernels", "kvstore"}, {"posix", "rocksdb", "codec", "xxhash"}),
    ("rpc/*", {"base", "core", "rpc"}, {"posix", "grpc", "protobuf", "proto", "prometheus"}),
    ("worker/cuda_*", {"base", "core", "kernels", "worker"}, {"posix", "cuda"}),
    ("worker/nccl_*", {"base", "core", "kernels", "worker"}, {"posix", "cuda"}),
    ("services-common", {"base", "core", "rpc", "services-common"},
     {"posix", "grpc", "protobuf", "proto"}),
    ("worker-wire", {"base", "core", "formats", "kernels", "kvstore", "rpc", "worker", "worker-wire",
                     "services-common"},
     {"posix", "grpc", "protobuf", "proto"}),
    ("worker/*", {"base", "core", "formats", "kernels", "worker"}, {"posix", "simd"}),
    ("services/*_main.cc", BELOW_SERVICES | {"services"},
     {"posix", "grpc", "protobuf", "proto", "cli11"}),
    ("services/config_flags.*", {"services"}, {"protobuf", "proto", "cli11"}),
    ("services/*", BELOW_SERVICES | {"services"}, {"posix", "grpc", "protobuf", "proto"}),
    ("clients/*", {"base", "core", "rpc", "clients"}, {"posix", "grpc", "protobuf", "proto"}),
    ("replay/live_r[eu]*", {"base", "core", "clients", "replay"}, {"posix", "json"}),
    ("replay/*", {"base", "core", "replay"}, {"json"}),
    ("cli/*", BELOW_SERVICES | {"services", "clients", "replay", "cli"},
     {"posix", "grpc", "protobuf", "proto", "cli11", "json"}),
]
ALWAYS = {"std", "absl"}
PROJECT = {"base", "core", "formats", "kernels", "decoder", "kvstore", "rpc", "worker", "services",
           "clients", "replay", "cli", "bench", "tests"}


def subfolder_of(path):
    for name, patterns in SUBFOLDERS:
        if any(fnmatch.fnmatch(path, p) for p in patterns):
            return name
    return None


def kind_of(include, quote):
    """Returns ("project", folder) or ("external", kind)."""
    for kind, patterns in EXTERNALS:
        if any(fnmatch.fnmatch(include, p) for p in patterns):
            return "external", kind
    top = include.split("/", 1)[0]
    if quote == '"' and "/" in include and top in PROJECT:
        return "project", subfolder_of(include) or top
    if quote == '"':
        return "external", "path that does not start at the root of the repository"
    if "/" not in include and not include.endswith(".h"):
        return "external", "std"
    if include.endswith(".h") and ("/" not in include or include.split("/")[0] in
                                   {"sys", "netinet", "arpa", "linux", "net"}):
        return "external", "posix"
    return "external", include


def rule_for(path):
    subfolder = subfolder_of(path)
    for pattern, project, external in RULES:
        if pattern == subfolder or (subfolder is None and fnmatch.fnmatch(path, pattern)):
            return pattern, project, external
    return None


def crossings(root):
    """Yields one line a crossing; returns after all files under the folders of RULES were read."""
    num_files = 0
    for folder in sorted({p.split("/")[0] for p, _, _ in RULES if "/" in p}):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix not in SUFFIXES:
                continue
            num_files += 1
            path = file.relative_to(root).as_posix()
            rule = rule_for(path)
            text = file.read_text(encoding="utf-8")
            for number, line in enumerate(text.splitlines(), 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                where, kind = kind_of(match[2], match[1])
                allowed = rule[1] if where == "project" else rule[2] | ALWAYS
                if kind not in allowed:
                    yield (f"{path}:{number}: includes {match[2]} ({kind}); files {rule[0]} may include "
                           f"{', '.join(sorted(rule[1] | rule[2] | ALWAYS))}")
    if num_files == 0:
        yield f"{root}: no source file found: nothing was checked"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path,
                        default=pathlib.Path(__file__).resolve().parent.parent)
    found = list(crossings(parser.parse_args().root))
    for line in found:
        print(line)
    print(f"layers: {len(found)} crossings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
