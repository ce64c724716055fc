// Compressed page records through real processes: a store that is killed, told to compress, killed
// again and damaged, behind a worker that never gives a wrong byte.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "kvstore/page_record.h"
#include "kvstore/remote_page_store.h"
#include "rpc/channel.h"
#include "tests/contract/test_page.h"
#include "tests/kvstore/store_test_util.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

constexpr uint64_t kPageBytes = 32 << 10;
constexpr size_t kPageTokens = 16;

class CompressionProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(StartStore("none"));
    model_ = std::make_shared<const Model>(
        MakeTestModel({.page_tokens = kPageTokens, .num_layers = 4, .kv_heads = 2, .dim = 32}));
    ASSERT_EQ(model_->geometry().bytes_per_page_of_tokens(), kPageBytes);
    ASSERT_TRUE(RegisterTestModel(*model_, store_.get()).ok());
    StartWorker();
  }
  void TearDown() override {
    engine_.reset();
    store_.reset();
    for (ChildProcess* process : {worker_.get(), store_process_.get()}) {
      if (process == nullptr) continue;
      EXPECT_EQ(process->Terminate().value_or(-1), 0);
    }
  }
  void StartWorker() {
    auto started =
        ChildProcess::Start({.program = "pagetide-worker",
                             .args = {"--listen=127.0.0.1:0", "--pool-bytes=1MiB",
                                      absl::StrCat("--store=unix:", sockets_ / "store.sock")}});
    ASSERT_TRUE(started.ok()) << started.status();
    worker_ = *std::move(started);
    engine_ = std::make_unique<WorkerClient>(worker_->Address("grpc"), model_);
  }
  // At a socket file, so that it comes back at the same address.
  void StartStore(const std::string& compression) {
    auto started = ChildProcess::Start(
        {.program = "pagetide-store",
         .args = {absl::StrCat("--listen=unix:", sockets_ / "store.sock"),
                  absl::StrCat("--data-dir=", data_.path()), "--segment-size=1MiB",
                  absl::StrCat("--compression=", compression)}});
    ASSERT_TRUE(started.ok()) << started.status();
    store_process_ = *std::move(started);
    store_ = std::make_unique<RemotePageStore>(
        MakeChannel(store_process_->Address("grpc"), {.own_connection = true}));
    ASSERT_TRUE(store_->GetStats(Soon()).ok());
  }
  // Everything the worker had in memory goes with it; the new one finds the new store at once.
  void KillAndRestartBoth(const std::string& compression) {
    worker_->Kill();
    store_process_->Kill();
    ASSERT_NO_FATAL_FAILURE(StartStore(compression));
    StartWorker();
  }
  static MonotonicTime Soon() { return Clock::Real()->MonotonicNow() + absl::Seconds(60); }
  StoreStats Stats() { return store_->GetStats(Soon()).value(); }

  // A sequence of these tokens, whose full pages are in the store when this returns.
  void FillAndStore(const std::vector<uint32_t>& tokens) {
    const uint64_t before = Stats().pages;
    const auto open = engine_->Open({});
    ASSERT_TRUE(open.ok()) << open.status();
    const auto appended = engine_->Append(open->state(), tokens, tokens.size());
    ASSERT_TRUE(appended.ok()) << appended.status();
    ASSERT_TRUE(
        testing::Eventually([&] { return Stats().pages >= before + tokens.size() / kPageTokens; }));
    ASSERT_TRUE(engine_->Close(appended->state()).ok());
  }
  // Opens over the tokens until all but the last are reused (a store that is slow for once is a
  // miss), and compares their rows.
  void ReuseAndVerify(const std::vector<uint32_t>& tokens) {
    const uint64_t want = tokens.size() - 1;
    absl::StatusOr<v1::OpenSequenceResponse> open;
    ASSERT_TRUE(testing::Eventually([&] {
      open = engine_->Open(tokens);
      if (!open.ok()) return false;
      if (engine_->WaitReady(open->state().sequence_id()).value_or(0) == want) return true;
      (void)engine_->Close(open->state());
      return false;
    })) << open.status();
    const std::string id = open->state().sequence_id();
    const auto compared = engine_->Verify(id, tokens, 0, want);
    EXPECT_TRUE(compared.ok()) << compared.status();
    EXPECT_TRUE(engine_->Close(*engine_->Get(id)).ok());
  }

  testing::TempDir sockets_;
  TempDir data_;
  std::unique_ptr<ChildProcess> store_process_, worker_;
  std::unique_ptr<RemotePageStore> store_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerClient> engine_;
};

TEST_F(CompressionProcessTest, PagesOfBeforeAndOfNowOutliveEveryProcess) {
  const std::vector<uint32_t> raw = TestTokens(1, 8 * kPageTokens);
  const std::vector<uint32_t> packed = TestTokens(2, 8 * kPageTokens);
  FillAndStore(raw);
  StoreStats stats = Stats();
  EXPECT_EQ(stats.stored_bytes, 8 * kPageBytes);
  EXPECT_EQ(stats.codec_bytes.raw.in, 8 * kPageBytes);

  ASSERT_NO_FATAL_FAILURE(KillAndRestartBoth("zstd"));
  FillAndStore(packed);
  stats = Stats();
  EXPECT_EQ(stats.logical_bytes, 16 * kPageBytes);
  EXPECT_LT(stats.stored_bytes, (8 + 8 * 15.0 / 16) * kPageBytes);
  EXPECT_GT(stats.codec_bytes.zstd.in, 0u);
  EXPECT_LT(stats.codec_bytes.zstd.out, stats.codec_bytes.zstd.in * 3 / 4);
  EXPECT_GT(stats.compress_time, absl::ZeroDuration());

  ASSERT_NO_FATAL_FAILURE(KillAndRestartBoth("zstd"));
  ASSERT_NO_FATAL_FAILURE(ReuseAndVerify(raw));
  ASSERT_NO_FATAL_FAILURE(ReuseAndVerify(packed));
  stats = Stats();
  EXPECT_EQ(stats.pages_quarantined, 0u);
  EXPECT_GE(stats.decompressed_bytes, 8 * kPageBytes);
  EXPECT_GT(stats.decompress_time, absl::ZeroDuration());

  // Turned off again, what is packed is still read.
  ASSERT_NO_FATAL_FAILURE(KillAndRestartBoth("none"));
  ReuseAndVerify(packed);
}

TEST_F(CompressionProcessTest, D4APageThatDoesNotPayIsStoredAsItIs) {
  ASSERT_NO_FATAL_FAILURE(KillAndRestartBoth("zstd"));
  const TestPage noise = MakeTestPage(1, kPageBytes);
  // Floats of one magnitude, whose upper bytes are all alike.
  TestPage floats = MakeTestPage(2, kPageBytes);
  for (uint32_t i = 0; i < kPageBytes / sizeof(float); ++i) {
    const float x = 1.0f + static_cast<float>(i * 7919 % 65536) / 65536;
    std::memcpy(floats.body.data() + i * sizeof(float), &x, sizeof(float));
  }
  floats.meta.checksum = ChecksumOf(floats.body);
  const StoreCodecBytes before = Stats().codec_bytes;
  const std::vector<PutPage> puts = {noise.put(), floats.put()};
  for (const PutPageResult& result : store_->PutPages(puts, Durability::kLocal, Soon())) {
    ASSERT_TRUE(result.status.ok()) << result.status;
  }
  const StoreCodecBytes after = Stats().codec_bytes;
  EXPECT_EQ(after.raw.in - before.raw.in, kPageBytes);
  EXPECT_EQ(after.raw.out - before.raw.out, kPageBytes);
  const auto packed = [&](auto bytes) {
    return bytes(after.lz4) + bytes(after.zstd) - bytes(before.lz4) - bytes(before.zstd);
  };
  EXPECT_EQ(packed([](const StoreCodecBytes::InOut& codec) { return codec.in; }), kPageBytes);
  EXPECT_LT(packed([](const StoreCodecBytes::InOut& codec) { return codec.out; }),
            kPageBytes * 3 / 4);
  for (const TestPage* page : std::initializer_list<const TestPage*>{&noise, &floats}) {
    std::vector<std::byte> body(kPageBytes);
    const std::vector<GetPage> gets = {{.key = page->meta.key, .body = body}};
    ASSERT_EQ(store_->GetPages(gets, Soon())[0].outcome, GetOutcome::kHit);
    EXPECT_EQ(body, page->body);
  }
}

TEST_F(CompressionProcessTest, ADamagedCompressedRecordIsAMissNeverWrongBytes) {
  ASSERT_NO_FATAL_FAILURE(KillAndRestartBoth("zstd"));
  const std::vector<uint32_t> tokens = TestTokens(3, 4 * kPageTokens);
  FillAndStore(tokens);
  // The key of the third page, by the tokens, as the worker makes it.
  const auto table_of = [&] {
    const auto open = engine_->Open(tokens);
    v1::GetBlockTableRequest request;
    request.set_sequence_id(open->state().sequence_id());
    v1::GetBlockTableResponse table;
    TestContext context;
    EXPECT_TRUE(engine_->sequences().GetBlockTable(&context, request, &table).ok());
    EXPECT_TRUE(engine_->Close(open->state()).ok());
    return table;
  };
  const v1::GetBlockTableResponse table = table_of();
  ASSERT_GE(table.extents_size(), 3);
  const PageKey key{Digest::FromBytes(table.extents(2).page_key()).value()};
  worker_->Kill();
  // What no barrier covered is verified by an opening; a barrier makes the damage a surprise.
  ASSERT_TRUE(store_->Barrier(Durability::kLocal, Soon()).ok());
  store_process_->Kill();
  const FoundRecord record = FindStoredRecord(data_.path(), key);
  ASSERT_FALSE(record.file.empty());
  FlipFileBit(record.file, (record.offset + kPageRecordFixedBytes + 1234) * 8 + 3);
  ASSERT_NO_FATAL_FAILURE(StartStore("zstd"));
  ASSERT_NO_FATAL_FAILURE(StartWorker());
  absl::StatusOr<v1::OpenSequenceResponse> open;
  ASSERT_TRUE(testing::Eventually([&] {
    open = engine_->Open(tokens);
    return open.ok() &&
           engine_->WaitReady(open->state().sequence_id()).value_or(0) == 2 * kPageTokens;
  })) << open.status();
  const auto compared = engine_->Verify(open->state().sequence_id(), tokens, 0, 2 * kPageTokens);
  EXPECT_TRUE(compared.ok()) << compared.status();
  EXPECT_EQ(Stats().pages_quarantined, 1u);
}

TEST_F(CompressionProcessTest, AnUnknownCompressionIsRefusedByName) {
  auto refused = ChildProcess::Start(
      {.program = "pagetide-store",
       .args = {absl::StrCat("--data-dir=", data_.path(), "/other"), "--compression=gzip"},
       .wait_ready = false});
  ASSERT_TRUE(refused.ok()) << refused.status();
  EXPECT_EQ((*refused)->Wait(absl::Seconds(90)).value_or(0), 1);
  EXPECT_THAT((*refused)->Log(), HasSubstr("compression = \"gzip\" is not none, lz4 or zstd"));
}

}  // namespace
}  // namespace pagetide
