// The contract suite over a store behind gRPC: RemotePageStore → PageStoreService → a store.
#include "services/page_store_service.h"

#include "kvstore/memory_page_store.h"
#include "kvstore/page_record.h"
#include "kvstore/remote_page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/channel.h"
#include "rpc/server.h"
#include "tests/contract/page_store_contract.h"
#include "tests/kvstore/store_test_util.h"
#include "tests/support/timing.h"

namespace pagetide {
namespace {

// Serves `store` on a port of its own for as long as it lives.
class ServedStore {
 public:
  ServedStore(PageStore* store, const Clock* clock, PageStoreServiceOptions options = {})
      : service_(store, clock, options) {
    auto server = RpcServer::Create({}, {&service_}, std::make_shared<PrometheusMetrics>());
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    server_->OnDrain([this] { service_.EndStreams(); });
    channel_ = MakeChannel(server_->addresses()[0]);
    client_ = std::make_unique<RemotePageStore>(channel_);
  }
  ~ServedStore() { server_->Drain(absl::Seconds(5)); }
  RemotePageStore* client() { return client_.get(); }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }

 private:
  PageStoreServiceImpl service_;
  std::unique_ptr<RpcServer> server_;
  std::shared_ptr<grpc::Channel> channel_;  // shared with the stubs
  std::unique_ptr<RemotePageStore> client_;
};

class RemoteMemoryHarness final : public PageStoreHarness {
 public:
  PageStore* store() override { return served_.client(); }
  FakeClock* clock() override { return &clock_; }
  void RunUpkeep() override {}
  void FlipStoredBit(const PageKey& key, uint64_t bit) override {
    ASSERT_TRUE(store_.FlipBit(key, bit));
  }

 private:
  FakeClock clock_;
  MemoryPageStore store_{{.clock = &clock_}};
  ServedStore served_{&store_, &clock_};
};

class RemoteRocksdbHarness final : public PageStoreHarness {
 public:
  RemoteRocksdbHarness() {
    auto store = RocksdbPageStore::Open({.dir = dir_.path(), .clock = &clock_});
    EXPECT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
    served_ = std::make_unique<ServedStore>(store_.get(), &clock_);
  }
  PageStore* store() override { return served_->client(); }
  FakeClock* clock() override { return &clock_; }
  void RunUpkeep() override { store_->WaitForUpkeep(); }
  void FlipStoredBit(const PageKey& key, uint64_t bit) override {
    const FoundRecord record = FindStoredRecord(dir_.path(), key);
    ASSERT_FALSE(record.file.empty());
    FlipFileBit(record.file,
                (record.offset + PageRecordHeaderBytes(MakeTestPage(0).meta)) * 8 + bit);
  }

 private:
  TempDir dir_;
  FakeClock clock_;
  std::unique_ptr<RocksdbPageStore> store_;
  std::unique_ptr<ServedStore> served_;
};

std::unique_ptr<PageStoreHarness> MakeRemoteMemory() {
  return std::make_unique<RemoteMemoryHarness>();
}
std::unique_ptr<PageStoreHarness> MakeRemoteRocksdb() {
  return std::make_unique<RemoteRocksdbHarness>();
}

INSTANTIATE_TEST_SUITE_P(RemoteMemory, PageStoreContract, ::testing::Values(&MakeRemoteMemory));
INSTANTIATE_TEST_SUITE_P(RemoteRocksdb, PageStoreContract, ::testing::Values(&MakeRemoteRocksdb));

// ---- bad input and plain protobuf clients ------------------------------------------------------

// The first message of a put of `page` at PROCESS, with the first `body_bytes` of its body.
v1::PutPagesRequest FirstOf(const TestPage& page, size_t body_bytes) {
  v1::PutPagesRequest request;
  request.set_level(v1::DURABILITY_PROCESS);
  v1::PageHeader* header = request.mutable_header();
  header->set_page_key(page.meta.key.digest.ToBytes());
  header->set_fingerprint(page.meta.fingerprint.ToBytes());
  header->set_body_bytes(page.meta.body_bytes);
  header->mutable_checksum()->set_low(page.meta.checksum.low);
  header->mutable_checksum()->set_high(page.meta.checksum.high);
  request.set_body(std::string(reinterpret_cast<const char*>(page.body.data()), body_bytes));
  return request;
}

class PageStoreServiceTest : public ::testing::Test {
 protected:
  // What a client without our raw path sends and gets.
  grpc::Status PutWith(const std::vector<v1::PutPagesRequest>& messages,
                       v1::PutPagesResponse* response) {
    grpc::ClientContext context;
    const auto writer = stub_->PutPages(&context, response);
    for (const v1::PutPagesRequest& message : messages) {
      if (!writer->Write(message)) break;
    }
    writer->WritesDone();
    return writer->Finish();
  }
  uint64_t NumPages() { return store_.GetStats(MonotonicTime::InfiniteFuture())->pages; }

  MemoryPageStore store_;
  ServedStore served_{&store_, Clock::Real()};
  std::unique_ptr<v1::PageStoreService::Stub> stub_ =
      v1::PageStoreService::NewStub(served_.channel());
};

TEST_F(PageStoreServiceTest, IsPlainProtobufOnTheWire) {
  const TestPage page = MakeTestPage(1, 3 << 19);
  v1::PutPagesRequest second;
  v1::PutPagesRequest first = FirstOf(page, 1 << 20);
  second.set_body(std::string(reinterpret_cast<const char*>(page.body.data()) + (1 << 20),
                              page.body.size() - (1 << 20)));
  v1::PutPagesResponse response;
  const grpc::Status put = PutWith({first, second}, &response);
  ASSERT_TRUE(put.ok()) << put.error_message();
  ASSERT_EQ(response.results_size(), 1);
  EXPECT_EQ(response.results(0).code(), 0);

  grpc::ClientContext context;
  v1::GetPagesRequest request;
  request.add_page_keys(page.meta.key.digest.ToBytes());
  request.add_page_keys(MakeTestPage(2).meta.key.digest.ToBytes());
  const auto reader = stub_->GetPages(&context, request);
  std::string body;
  std::vector<v1::GetPagesResponse> messages;
  for (v1::GetPagesResponse message; reader->Read(&message);) {
    body += message.body();
    messages.push_back(message);
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(body, std::string(reinterpret_cast<const char*>(page.body.data()), page.body.size()));
  ASSERT_EQ(messages.size(), 3u);
  EXPECT_EQ(messages[0].outcome(), v1::GetPagesResponse::OUTCOME_HIT);
  EXPECT_EQ(messages[0].header().body_bytes(), page.body.size());
  EXPECT_EQ(messages[1].index(), 0u);
  EXPECT_EQ(messages[2].outcome(), v1::GetPagesResponse::OUTCOME_MISS);
  EXPECT_EQ(messages[2].index(), 1u);
}

TEST_F(PageStoreServiceTest, RefusesAStreamThatEndsInsideAPage) {
  v1::PutPagesResponse response;
  const grpc::Status status = PutWith({FirstOf(MakeTestPage(1), 4095)}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), ::testing::HasSubstr("4096, received 4095"));
  EXPECT_EQ(NumPages(), 0u);
}

TEST_F(PageStoreServiceTest, RefusesMoreBytesThanTheHeaderSays) {
  v1::PutPagesRequest more;
  more.set_body("x");
  v1::PutPagesResponse response;
  const grpc::Status status = PutWith({FirstOf(MakeTestPage(1), 4096), more}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), ::testing::HasSubstr("4096, received 4097"));
  EXPECT_EQ(NumPages(), 0u);
}

TEST_F(PageStoreServiceTest, RefusesMoreTokensThanAPageCanHave) {
  v1::PutPagesRequest request = FirstOf(MakeTestPage(1), 4096);
  for (uint64_t i = 0; i <= kMaxIndexedPageTokens; ++i) request.mutable_header()->add_tokens(1);
  v1::PutPagesResponse response;
  const grpc::Status status = PutWith({request}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(),
              ::testing::HasSubstr("page 0: tokens has 4097 entries, at most 4096"));
  EXPECT_EQ(NumPages(), 0u);
}

TEST(PutMemoryTest, StreamsHoldNoMoreThanTheyMayAndGiveItBack) {
  MemoryPageStore store;
  ServedStore served(&store, Clock::Real(), {.max_put_bytes = 3 << 20});
  const auto stub = v1::PageStoreService::NewStub(served.channel());
  const TestPage page = MakeTestPage(1, 4 << 20);
  const auto part = [&](int i) {
    if (i == 0) return FirstOf(page, 1 << 20);
    v1::PutPagesRequest request;
    request.set_body(
        std::string(reinterpret_cast<const char*>(page.body.data()) + (i << 20), 1 << 20));
    return request;
  };
  const auto end = [&](int num_parts) {
    grpc::ClientContext context;
    v1::PutPagesResponse response;
    const auto writer = stub->PutPages(&context, &response);
    for (int i = 0; i < num_parts && writer->Write(part(i)); ++i) {
    }
    writer->WritesDone();
    return writer->Finish();
  };
  // One page that is larger than all may hold.
  const grpc::Status alone = end(4);
  EXPECT_EQ(alone.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(alone.error_message(), ::testing::HasSubstr("at most 3145728"));
  // What it held is free again.
  const TestPage small = MakeTestPage(2, 1 << 20);
  const PutPage put{small.meta, small.body};
  const auto result = served.client()->PutPages({&put, 1}, Durability::kProcess,
                                                Clock::Real()->MonotonicNow() + absl::Seconds(20));
  EXPECT_TRUE(result[0].status.ok()) << result[0].status;
}

TEST(IdlePutTest, AStreamOfWhichNothingComesEndsAndGivesItsMemoryBack) {
  FakeClock clock;
  MemoryPageStore store({.clock = &clock});
  InMemoryMetrics metrics;
  ServedStore served(&store, &clock, {.max_put_bytes = 3 << 20, .metrics = &metrics});
  const auto stub = v1::PageStoreService::NewStub(served.channel());
  const auto first_part = [](uint64_t seed) {
    const TestPage page = MakeTestPage(seed, 2 << 20);
    v1::PutPagesRequest request;
    request.set_level(v1::DURABILITY_PROCESS);
    v1::PageHeader* header = request.mutable_header();
    header->set_page_key(page.meta.key.digest.ToBytes());
    header->set_fingerprint(page.meta.fingerprint.ToBytes());
    header->set_body_bytes(page.meta.body_bytes);
    header->mutable_checksum()->set_low(page.meta.checksum.low);
    header->mutable_checksum()->set_high(page.meta.checksum.high);
    request.set_body(std::string(reinterpret_cast<const char*>(page.body.data()), 1 << 20));
    return request;
  };
  // Two thirds of what all may hold, by a client without a deadline that sends no more.
  grpc::ClientContext context;
  v1::PutPagesResponse response;
  const auto silent = stub->PutPages(&context, &response);
  ASSERT_TRUE(silent->Write(first_part(1)));
  v1::PutPagesRequest rest;
  rest.set_body(std::string(1 << 19, 'x'));
  ASSERT_TRUE(silent->Write(rest));
  const TestPage page = MakeTestPage(2, 2 << 20);
  const PutPage put{page.meta, page.body};
  const auto try_put = [&] {
    return served.client()
        ->PutPages({&put, 1}, Durability::kProcess,
                   Clock::Real()->MonotonicNow() + absl::Seconds(20))[0]
        .status;
  };
  // It holds them still, as long as it is not idle for a minute.
  EXPECT_TRUE(testing::Eventually([&] { return absl::IsResourceExhausted(try_put()); }));
  EXPECT_EQ(metrics.Value("pagetide_store_idle_streams_total"), 0);
  clock.Advance(absl::Seconds(61));
  const grpc::Status ended = silent->Finish();
  EXPECT_EQ(ended.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << ended.error_message();
  EXPECT_THAT(ended.error_message(), ::testing::HasSubstr("nothing came for 1m"));
  EXPECT_EQ(metrics.Value("pagetide_store_idle_streams_total"), 1);
  EXPECT_TRUE(testing::Eventually([&] { return try_put().ok(); }));
}

TEST_F(PageStoreServiceTest, NamesTheFieldOfABadHeader) {
  v1::PutPagesResponse response;
  v1::PutPagesRequest request = FirstOf(MakeTestPage(1), 4096);
  request.mutable_header()->set_page_key("short");
  grpc::Status status = PutWith({request}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), ::testing::HasSubstr("page_key has 5 bytes"));

  request = FirstOf(MakeTestPage(1), 4096);
  request.mutable_header()->set_body_bytes(uint64_t{1} << 62);  // must not be believed
  status = PutWith({request}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), ::testing::HasSubstr("body_bytes is 4611686018427387904"));

  request = FirstOf(MakeTestPage(1), 4096);
  request.clear_level();
  status = PutWith({request}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), ::testing::HasSubstr("level"));

  v1::PutPagesRequest headless;
  headless.set_level(v1::DURABILITY_CACHE);
  headless.set_body("body");
  status = PutWith({headless}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(NumPages(), 0u);
}

TEST_F(PageStoreServiceTest, ACancelledGetLeavesTheServerWhole) {
  const TestPage page = MakeTestPage(1, 3 << 20);
  const PutPage put = page.put();
  ASSERT_TRUE(store_.PutPages({&put, 1}, Durability::kCache, MonotonicTime::InfiniteFuture())[0]
                  .status.ok());
  for (int i = 0; i < 50; ++i) {
    grpc::ClientContext context;
    v1::GetPagesRequest request;
    for (int k = 0; k < 8; ++k) request.add_page_keys(page.meta.key.digest.ToBytes());
    const auto reader = stub_->GetPages(&context, request);
    v1::GetPagesResponse message;
    for (int n = 0; n < i % 5; ++n) reader->Read(&message);
    context.TryCancel();
    reader->Finish();
  }
  std::vector<std::byte> body(page.body.size());
  const GetPage get{page.meta.key, body, {}};
  const auto result = served_.client()->GetPages({&get, 1}, MonotonicTime::InfiniteFuture());
  EXPECT_EQ(result[0].outcome, GetOutcome::kHit) << result[0].status;
  EXPECT_TRUE(body == page.body);
}

TEST(RemotePageStoreTest, AStoreThatIsDownIsUnavailableInTime) {
  RemotePageStore store(MakeChannel("127.0.0.1:1"));
  const TestPage page = MakeTestPage(1);
  const PutPage put = page.put();
  const MonotonicTime start = Clock::Real()->MonotonicNow();
  const MonotonicTime deadline = start + absl::Seconds(60);
  EXPECT_EQ(store.PutPages({&put, 1}, Durability::kLocal, deadline)[0].status.code(),
            absl::StatusCode::kUnavailable);
  std::vector<std::byte> body(page.body.size());
  const GetPage get{page.meta.key, body, {}};
  EXPECT_EQ(store.GetPages({&get, 1}, deadline)[0].status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(store.GetStats(deadline).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_LT(Clock::Real()->MonotonicNow() - start, absl::Seconds(60));
}

}  // namespace
}  // namespace pagetide
