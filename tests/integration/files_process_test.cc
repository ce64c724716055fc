// pagetide import and export as programs against a worker, a router and a store as programs: files
// that llama.cpp and mlx-lm wrote, and one put together as LLamaSharp does, come out as they went
// in; broken ones change nothing. Prints a JSON line a file.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "formats/llama_sharp.h"
#include "kvstore/remote_page_store.h"
#include "rpc/channel.h"
#include "tests/formats/format_test_util.h"
#include "tests/services/session_files_models.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::Eventually;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TempDir;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

class FilesProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Start("pagetide-store", {absl::StrCat("--data-dir=", dir_ / "store")}, &store_process_);
    const std::string store = absl::StrCat("--store=", store_process_->Address("grpc"));
    Start("pagetide-router", {store}, &router_);
    Start("pagetide-worker",
          {store, absl::StrCat("--router=", router_->Address("grpc")), "--pool-bytes=16MiB",
           "--model-pool-bytes=1MiB", absl::StrCat("--import-dir=", dir_.path()),
           "--import-max-bytes=1MiB"},
          &worker_);
    store_ = std::make_unique<RemotePageStore>(
        MakeChannel(store_process_->Address("grpc"), {.own_connection = true}));
  }
  void Start(const std::string& program, std::vector<std::string> args,
             std::unique_ptr<ChildProcess>* process) {
    args.push_back("--listen=127.0.0.1:0");
    args.push_back("--metrics-listen=127.0.0.1:0");
    auto started = ChildProcess::Start({.program = program, .args = args});
    ASSERT_TRUE(started.ok()) << started.status();
    *process = *std::move(started);
  }
  std::shared_ptr<const Model> Register(const ModelSpec& spec) {
    auto model = std::make_shared<const Model>(Model::Create(spec).value());
    EXPECT_TRUE(RegisterTestModel(*model, store_.get()).ok());
    return model;
  }
  // What the program wrote.
  std::string Run(const std::vector<std::string>& args, int expected_code = 0) {
    auto process = ChildProcess::Start({.program = "pagetide", .args = args, .wait_ready = false});
    EXPECT_TRUE(process.ok()) << process.status();
    if (!process.ok()) return "";
    EXPECT_EQ((*process)->Wait(absl::Seconds(90)).value_or(-1), expected_code)
        << absl::StrJoin(args, " ") << ": " << (*process)->Log();
    return (*process)->Log();
  }
  std::string Write(const std::string& name, const std::string& bytes) {
    std::ofstream(dir_ / name, std::ios::binary) << bytes;
    return dir_ / name;
  }
  std::vector<std::string> ImportArgs(const Model& model, const std::string& path,
                                      const std::vector<uint32_t>& tokens) {
    std::vector<std::string> args = {
        "import", path, "--model", model.digest().ToHex(), "--worker", worker_->Address("grpc"),
        "--json"};
    if (!tokens.empty()) {
      args.push_back("--tokens-file");
      args.push_back(Write("tokens", absl::StrJoin(tokens, "\n")));
    }
    return args;
  }
  // In by one process, out by another; the id of the sequence.
  std::string RoundTrip(const Model& model, const std::string& name, const std::string& file,
                        const std::string& format, const std::vector<uint32_t>& tokens = {},
                        std::vector<std::string> more = {}) {
    const std::string layout = dir_ / "layout.json", out = dir_ / "again";
    std::vector<std::string> args = ImportArgs(model, Write("file", file), tokens);
    args.insert(args.end(), {"--layout-out", layout});
    args.insert(args.end(), more.begin(), more.end());
    const auto answer = nlohmann::json::parse(Run(args), nullptr, /*allow_exceptions=*/false);
    EXPECT_TRUE(answer.is_object()) << name;
    if (!answer.is_object()) return "";
    const std::string id = answer["state"]["sequence_id"];
    EXPECT_THAT(Run({"export", id, out, "--format", format, "--layout", layout, "--worker",
                     worker_->Address("grpc")}),
                HasSubstr("exported "));
    const bool is_same = ReadFile(out) == file;
    EXPECT_TRUE(is_same) << name;
    std::printf("{\"test\":\"file_round_trip\",\"file\":\"%s\",\"bytes\":%zu,\"same\":%s}\n",
                name.c_str(), file.size(), is_same ? "true" : "false");
    return id;
  }

  TempDir dir_;
  std::unique_ptr<ChildProcess> store_process_, router_, worker_;
  std::unique_ptr<RemotePageStore> store_;
};

TEST_F(FilesProcessTest, FilesOfOtherProgramsComeOutAsTheyWentIn) {
  const auto llama = Register(LlamaSpec());
  std::string id;
  for (const std::string name : {"llama_cpp_v2_full_plain", "llama_cpp_v3_full_transposed"}) {
    id = RoundTrip(*llama, name, TestFile(name + ".ggsq"), "llama.cpp");
  }
  const std::string memory = TestFile("llama_cpp_v2_full_transposed.mem");
  RoundTrip(*llama, "llama_cpp_v2_full_transposed.mem", memory, "llama.cpp", LlamaTokens());
  RoundTrip(*llama, "llama_sharp", LlamaSharpPrefix("", 20) + memory, "llamasharp", LlamaTokens());
  RoundTrip(*Register(InterleavedSpec(8)), "llama_cpp_v2_iswa", TestFile("llama_cpp_v2_iswa.ggsq"),
            "llama.cpp");
  RoundTrip(*Register(SpecOf("q8", 2, 1, 32, DataType::kQ8_0, DataType::kQ8_0)),
            "llama_cpp_v3_full_q8_0", TestFile("llama_cpp_v3_full_q8_0.ggsq"), "llama.cpp", {},
            {"--basis", "plain"});
  RoundTrip(*Register(SpecOf("mlx", 2, 2, 8)), "mlx_v0_32_plain",
            TestFile("mlx_v0_32_plain.safetensors"), "mlx", TestTokens(3, 7));
  using Type = LayerGroupSpec::WindowType;
  RoundTrip(*Register(WindowSpec(2, Type::kStandard, 8)), "mlx_v0_32_ring",
            TestFile("mlx_v0_32_ring.safetensors"), "mlx", TestTokens(3, 14));
  RoundTrip(*Register(WindowSpec(1, Type::kChunked, 8)), "mlx_v0_32_chunked_trimmed",
            TestFile("mlx_v0_32_chunked_trimmed.safetensors"), "mlx", TestTokens(3, 12));
  RoundTrip(*Register(PackedSpec()), "mlx_v0_32_quantized",
            TestFile("mlx_v0_32_quantized.safetensors"), "mlx", TestTokens(3, 4));
  // The router knows where a sequence is once its worker has told it.
  const std::string found = dir_ / "found";
  ASSERT_TRUE(Eventually([&] {
    auto process = ChildProcess::Start({.program = "pagetide",
                                        .args = {"export", id, found, "--format", "llama.cpp",
                                                 "--router", router_->Address("grpc")},
                                        .wait_ready = false});
    return process.ok() && (*process)->Wait(absl::Seconds(90)).value_or(-1) == 0;
  }));
  // Without a layout it is the file of version 2, plain: the rows of both are the same.
  EXPECT_EQ(ReadFile(found).size(), TestFile("llama_cpp_v2_full_plain.ggsq").size());
}

TEST_F(FilesProcessTest, AnImportWhoseLayoutCannotBeKeptStillTellsItsId) {
  const auto model = Register(LlamaSpec());
  WorkerClient client(worker_->Address("grpc"), model);
  const std::string file = Write("file", TestFile("llama_cpp_v2_full_plain.ggsq"));
  const auto open_sequences = [&] {
    v1::ListWorkerSequencesResponse list;
    testing::TestContext context;
    EXPECT_TRUE(client.sequences().ListWorkerSequences(&context, {}, &list).ok());
    return list.sequences_size();
  };
  // Where nothing can be written, nothing is imported.
  std::vector<std::string> args = ImportArgs(*model, file, {});
  args.insert(args.end(), {"--layout-out", dir_ / "no-such-folder/layout.json"});
  EXPECT_THAT(Run(args, 1), HasSubstr("cannot be opened; nothing was imported"));
  EXPECT_EQ(open_sequences(), 0);
  // A name that cannot be taken is noticed only when the sequence is open.
  ASSERT_TRUE(std::filesystem::create_directory(dir_ / "folder"));
  args.back() = dir_ / "folder";
  const std::string log = Run(args, 1);
  EXPECT_THAT(log, HasSubstr("is open, but its layout is not kept"));
  EXPECT_FALSE(std::ifstream(dir_ / "folder.partial").is_open());
  EXPECT_EQ(open_sequences(), 1);
  const size_t at = log.find("\"sequence_id\"");
  ASSERT_NE(at, std::string::npos) << log;
  const size_t begin = log.find('"', log.find(':', at)) + 1;
  const std::string id = log.substr(begin, log.find('"', begin) - begin);
  EXPECT_TRUE(client.Get(id).ok()) << id;
}

TEST_F(FilesProcessTest, BrokenFilesChangeNothing) {
  const auto model = Register(LlamaSpec());
  WorkerClient client(worker_->Address("grpc"), model);
  const std::string file = TestFile("llama_cpp_v2_full_plain.ggsq");
  const std::string id = RoundTrip(*model, "llama_cpp_v2_full_plain", file, "llama.cpp");
  const auto before = client.Get(id);
  ASSERT_TRUE(before.ok()) << before.status();
  std::string hostile = file;
  hostile.replace(8, 4, "\xff\xff\xff\x7f");
  const struct {
    const char* what;
    std::string bytes;
    const char* text;
  } cases[] = {
      {"cut in its rows", file.substr(0, file.size() / 2), "DATA_LOSS"},
      {"cut in its header", file.substr(0, 9), "DATA_LOSS"},
      {"2^31 - 1 tokens", hostile, "DATA_LOSS"},
      {"nothing", "", "INVALID_ARGUMENT"},
      {"no format", "what is this?", "INVALID_ARGUMENT"},
      {"above --import-max-bytes", std::string((1 << 20) + 1, 'x'), "the limit is 1048576"},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.what);
    EXPECT_THAT(Run(ImportArgs(*model, Write("broken", c.bytes), {}), 1), HasSubstr(c.text));
  }
  EXPECT_THAT(
      Run({"export", id, dir_ / "none", "--format", "mlx", "--layout",
           Write("bad.json", "{\"mlx_layout\":\"AAAA\"}"), "--worker", worker_->Address("grpc")},
          1),
      HasSubstr("layout.mlx_layout"));
  EXPECT_FALSE(std::ifstream(dir_ / "none").is_open());
  EXPECT_FALSE(std::ifstream(dir_ / "none.partial").is_open());
  const auto after = client.Get(id);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->SerializeAsString(), before->SerializeAsString());
  EXPECT_THAT(Run({"export", id, dir_ / "whole", "--format", "llama.cpp", "--layout",
                   dir_ / "layout.json", "--worker", worker_->Address("grpc")}),
              HasSubstr("exported 20 tokens"));
  EXPECT_TRUE(ReadFile(dir_ / "whole") == file);
  EXPECT_TRUE(client.EventuallyStat("pagetide_worker_imports_refused_total", 6));
  EXPECT_TRUE(client.EventuallyStat("pagetide_worker_imported_bytes_total",
                                    static_cast<double>(file.size())));
  EXPECT_TRUE(client.EventuallyStat("pagetide_worker_exported_bytes_total",
                                    static_cast<double>(2 * file.size())));
  EXPECT_EQ(worker_->Terminate().value_or(-1), 0);
}

}  // namespace
}  // namespace pagetide
