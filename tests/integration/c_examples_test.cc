// The examples in C against a real worker: what they say of rows is compared with the rows that
// were written, and what they store with what a client reads.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kvstore/remote_page_store.h"
#include "pagetide/v1/model.pb.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TempDir;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestRows;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

constexpr uint64_t kPage = 16;

// FNV-1a, as the examples print it.
std::string HashOf(const std::string& bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (char byte : bytes) hash = (hash ^ static_cast<uint8_t>(byte)) * 0x100000001b3u;
  return absl::StrCat(absl::Hex(hash, absl::kZeroPad16));
}

class CExamplesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto store =
        ChildProcess::Start({.program = "pagetide-store",
                             .args = {"--data-dir", dir_ / "store", "--listen", "127.0.0.1:0"}});
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
    RemotePageStore remote(MakeChannel(store_->Address("grpc")));
    ASSERT_TRUE(RegisterTestModel(*model_, &remote).ok());
    auto worker = ChildProcess::Start(
        {.program = "pagetide-worker",
         .args = {
             "--listen", "127.0.0.1:0", "--store", store_->Address("grpc"), "--local-socket",
             socket(),
             absl::StrCat("--pool-bytes=", 32 * model_->geometry().bytes_per_page_of_tokens())}});
    ASSERT_TRUE(worker.ok()) << worker.status();
    worker_ = *std::move(worker);
    client_ = std::make_unique<WorkerClient>(worker_->Address("grpc"), model_);
  }
  std::string socket() const { return dir_ / "w.sock"; }
  std::string digest() const { return model_->digest().ToHex(); }
  const GroupGeometry& group() const { return model_->geometry().group(0); }

  // Its exit code; what it wrote is in *said.
  int Run(const std::string& program, std::vector<std::string> args, std::string* said) {
    auto example =
        ChildProcess::Start({.program = program, .args = std::move(args), .wait_ready = false});
    EXPECT_TRUE(example.ok()) << example.status();
    if (!example.ok()) return -1;
    const auto code = (*example)->Wait(absl::Seconds(90));
    *said = (*example)->Log();
    EXPECT_TRUE(code.ok()) << code.status();
    return code.value_or(-1);
  }
  int RunOwnedPages(const std::string& sequence, std::string* said) {
    return Run("pagetide-c-owned-pages",
               {worker_->Address("grpc"), socket(), digest(), sequence,
                absl::StrCat(group().num_layers()), absl::StrCat(kPage),
                absl::StrCat(group().k_row_bytes()), absl::StrCat(group().v_row_bytes())},
               said);
  }
  int RunEnginePool(const std::vector<uint32_t>& tokens, std::string* said) {
    const uint32_t heads = group().spec().kv_heads;
    return Run("pagetide-c-engine-pool",
               {worker_->Address("grpc"), socket(), digest(), absl::StrCat(group().num_layers()),
                absl::StrCat(heads), absl::StrCat(group().k_row_bytes() / heads),
                absl::StrCat(v1::DATA_TYPE_F32), absl::StrJoin(tokens, ",")},
               said);
  }

  TempDir dir_;
  std::shared_ptr<const Model> model_ = std::make_shared<const Model>(MakeTestModel());
  std::unique_ptr<ChildProcess> store_;
  std::unique_ptr<ChildProcess> worker_;
  std::unique_ptr<WorkerClient> client_;
};

TEST_F(CExamplesTest, RowsOfTheWorkersFramesAreReadInPlace) {
  const std::vector<uint32_t> tokens = TestTokens(1, 3 * kPage + 5);
  auto open = client_->Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  ASSERT_TRUE(client_->Append(open->state(), tokens, tokens.size()).ok());
  std::string said;
  ASSERT_EQ(RunOwnedPages(open->state().sequence_id(), &said), 0) << said;
  for (uint32_t layer = 0; layer < group().num_layers(); ++layer) {
    for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
      const std::string rows = TestRows(group(), tokens, 0, tokens.size(), layer, kind);
      EXPECT_THAT(said, HasSubstr(absl::StrCat("layer ", layer, kind == RowKind::kK ? " K" : " V",
                                               " rows ", tokens.size(), " hash ", HashOf(rows))));
    }
  }
  // What it may not see it does not see.
  EXPECT_EQ(RunOwnedPages("no-such-sequence", &said), 1);
  EXPECT_THAT(said, HasSubstr("code 3"));
  ASSERT_TRUE(client_->Close(open->state()).ok());
  EXPECT_EQ(RunOwnedPages(open->state().sequence_id(), &said), 1);
  EXPECT_THAT(said, HasSubstr("code 5"));
}

TEST_F(CExamplesTest, AnEnginesPoolIsLoadedIntoAndStoredFrom) {
  // What a client appended the engine loads.
  const std::vector<uint32_t> known = TestTokens(2, 4 * kPage);
  auto open = client_->Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  ASSERT_TRUE(client_->Append(open->state(), known, known.size()).ok());
  std::string said, all;
  ASSERT_EQ(RunEnginePool(known, &said), 0) << said;
  for (uint32_t layer = 0; layer < group().num_layers(); ++layer) {
    for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
      all += TestRows(group(), known, 0, known.size(), layer, kind);
    }
  }
  EXPECT_THAT(said, HasSubstr(absl::StrCat("loaded 64 of 64 tokens, hash ", HashOf(all))));
  EXPECT_THAT(said, HasSubstr("stored: 64 tokens are known now, 0 pages copied, 4 were known"));
  EXPECT_THAT(said, HasSubstr("loaded again: 64 tokens, 0 wrong rows"));

  // What the engine computed a client reads.
  const std::vector<uint32_t> computed = TestTokens(3, 2 * kPage + 7);
  ASSERT_EQ(RunEnginePool(computed, &said), 0) << said;
  EXPECT_THAT(said, HasSubstr("loaded 0 of 39 tokens"));
  EXPECT_THAT(said, HasSubstr("stored: 32 tokens are known now, 2 pages copied, 0 were known"));
  EXPECT_THAT(said, HasSubstr("loaded again: 32 tokens, 0 wrong rows"));
  auto found = client_->Open(computed);
  ASSERT_TRUE(found.ok()) << found.status();
  ASSERT_EQ(found->state().length(), 32u);
  TestContext context;
  v1::ReadRowsRequest request;
  request.set_sequence_id(found->state().sequence_id());
  request.set_end(32);
  const auto reader = client_->sequences().ReadRows(&context, request);
  v1::ReadRowsResponse part;
  uint64_t compared = 0, wrong = 0;
  while (reader->Read(&part)) {
    const int kind = part.kind() == v1::ROW_KIND_K ? 0 : 1;
    const uint64_t row_bytes = kind == 0 ? group().k_row_bytes() : group().v_row_bytes();
    for (size_t i = 0; i < part.data().size(); ++i) {
      const uint64_t token = part.first_token() + i / row_bytes;
      const auto expected = static_cast<uint8_t>(computed[token] * 31 + token * 7 +
                                                 part.layer() * 101 + kind * 37 + i % row_bytes);
      wrong += static_cast<uint8_t>(part.data()[i]) != expected;
      ++compared;
    }
  }
  ASSERT_TRUE(reader->Finish().ok());
  EXPECT_EQ(compared, 32 * group().num_layers() * (group().k_row_bytes() + group().v_row_bytes()));
  EXPECT_EQ(wrong, 0u);

  // It leaves nothing behind, and is refused what is not the model's.
  const auto pools = client_->Stat("pagetide_engine_pools");
  ASSERT_TRUE(pools.ok()) << pools.status();
  EXPECT_EQ(*pools, 0);
  EXPECT_EQ(
      Run("pagetide-c-engine-pool",
          {worker_->Address("grpc"), socket(), digest(), "3", "2", "32", "1", "1,2,3"}, &said),
      1);
  EXPECT_THAT(said, HasSubstr("code 3"));
}

}  // namespace
}  // namespace pagetide
