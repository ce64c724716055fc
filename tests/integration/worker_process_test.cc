// pagetide-worker as a program: start, serve, die, stop; with an embedded store and with
// pagetide-store. Prints one JSON line a campaign: a test that did nothing shows it there.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "kvstore/remote_page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::Promised;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TempDir;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

constexpr uint64_t kFrames = 16;

class WorkerProcessTest : public ::testing::Test {
 protected:
  uint64_t PoolBytes() const { return kFrames * model_->geometry().bytes_per_page_of_tokens(); }
  std::string store_dir() const { return dir_ / "store"; }

  // Registers the model as a router would, in a store that no process has open.
  void RegisterInStoreDir() {
    auto store = RocksdbPageStore::Open({.dir = store_dir()});
    ASSERT_TRUE(store.ok()) << store.status();
    const absl::Status registered = RegisterTestModel(*model_, store->get());
    ASSERT_TRUE(registered.ok()) << registered;
  }
  // At a socket file: a TCP port could be another's by the time the store starts again.
  void StartStore() {
    auto store = ChildProcess::Start({.program = "pagetide-store",
                                      .args = {"--data-dir", store_dir(), "--listen",
                                               absl::StrCat("unix:", dir_ / "store.sock")}});
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
    store_address_ = store_->Address("grpc");
  }
  void RegisterInRemoteStore() {
    RemotePageStore remote(MakeChannel(store_address_));
    const absl::Status registered = RegisterTestModel(*model_, &remote);
    ASSERT_TRUE(registered.ok()) << registered;
  }
  std::unique_ptr<ChildProcess> StartWorker(std::vector<std::string> args) {
    args.push_back(absl::StrCat("--pool-bytes=", PoolBytes()));
    auto worker = ChildProcess::Start({.program = "pagetide-worker", .args = std::move(args)});
    EXPECT_TRUE(worker.ok()) << worker.status();
    return worker.ok() ? *std::move(worker) : nullptr;
  }
  std::unique_ptr<ChildProcess> StartWithStoreDir() {
    return StartWorker({"--store-dir", store_dir()});
  }
  std::unique_ptr<ChildProcess> StartWithRemoteStore(const std::string& id) {
    return StartWorker({"--store", store_address_, "--worker-id", id});
  }
  static v1::GetMemoryBreakdownResponse Memory(WorkerClient& client) {
    TestContext context;
    v1::GetMemoryBreakdownResponse response;
    EXPECT_TRUE(v1::AdminService::NewStub(client.channel())
                    ->GetMemoryBreakdown(&context, {}, &response)
                    .ok());
    return response;
  }
  // Opens a sequence over `tokens`, appends what was not reused, and answers its state.
  static absl::StatusOr<v1::SequenceState> OpenAndFill(WorkerClient& client,
                                                       const std::vector<uint32_t>& tokens,
                                                       uint64_t* reused = nullptr) {
    PT_ASSIGN_OR_RETURN(v1::OpenSequenceResponse open, client.Open(tokens));
    PT_RETURN_IF_ERROR(client.WaitReady(open.state().sequence_id()).status());
    PT_ASSIGN_OR_RETURN(v1::SequenceState state, client.Get(open.state().sequence_id()));
    if (reused != nullptr) *reused = state.length();
    PT_ASSIGN_OR_RETURN(v1::AppendTokensResponse appended,
                        client.Append(state, tokens, tokens.size()));
    return appended.state();
  }

  TempDir dir_;
  std::shared_ptr<const Model> model_ = std::make_shared<const Model>(MakeTestModel());
  std::string store_address_;
  std::unique_ptr<ChildProcess> store_;
};

TEST_F(WorkerProcessTest, AStoryFromOpenToClose) {
  RegisterInStoreDir();
  auto worker = StartWithStoreDir();
  ASSERT_NE(worker, nullptr);
  WorkerClient client(worker->Address("grpc"), model_);
  const auto tokens = TestTokens(1, 70);
  auto state = OpenAndFill(client, tokens);
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_TRUE(client.Verify(state->sequence_id(), tokens, 0, 70).ok());
  auto fork = client.Fork(*state, 50);
  ASSERT_TRUE(fork.ok()) << fork.status();
  auto other = tokens;
  for (size_t i = 50; i < other.size(); ++i) other[i] ^= 1;
  ASSERT_TRUE(client.Append(fork->state(), other, 70).ok());
  auto rewound = client.Rewind(*state, 33);
  ASSERT_TRUE(rewound.ok()) << rewound.status();
  EXPECT_TRUE(client.Verify(fork->state().sequence_id(), other, 0, 70).ok());
  EXPECT_TRUE(client.Verify(state->sequence_id(), tokens, 0, 33).ok());
  EXPECT_TRUE(client.Close(rewound->state()).ok());
  EXPECT_TRUE(client.Close(fork->state()).ok());
  auto code = worker->Terminate();
  ASSERT_TRUE(code.ok()) << code.status();
  EXPECT_EQ(*code, 0);
}

TEST_F(WorkerProcessTest, TwoHundredSequencesThroughSixteenFrames) {
  constexpr int kClients = 8;
  constexpr int kSequencesAClient = 25;
  RegisterInStoreDir();
  auto worker = StartWithStoreDir();
  ASSERT_NE(worker, nullptr);
  struct Open {
    v1::SequenceState state;
    std::vector<uint32_t> tokens;
  };
  std::vector<std::vector<Open>> open(kClients);
  Mutex mu;
  std::vector<absl::Status> failures;
  std::atomic<uint64_t> verified_bytes{0};  // relaxed: a sum, read after the joins
  std::atomic<uint64_t> num_wrong{0};       // reads of a whole sequence; likewise
  const auto parallel = [&](const std::function<absl::Status(int, WorkerClient&)>& work) {
    std::vector<std::thread> threads;
    for (int c = 0; c < kClients; ++c) {
      threads.emplace_back([&, c] {
        WorkerClient client(worker->Address("grpc"), model_);
        const absl::Status status = work(c, client);
        MutexLock lock(&mu);
        if (!status.ok()) failures.push_back(status);
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
  const absl::Time began = absl::Now();
  parallel([&](int c, WorkerClient& client) -> absl::Status {
    std::mt19937_64 random(1000 + c);
    for (int i = 0; i < kSequencesAClient; ++i) {
      // 2 to 6 pages of 16 tokens, the last mostly partial; appended in two calls.
      const size_t length = 17 + random() % 80;
      Open o;
      o.tokens = TestTokens(static_cast<uint64_t>(c) * 1000 + i, length);
      PT_ASSIGN_OR_RETURN(v1::OpenSequenceResponse opened, client.Open({}));
      PT_ASSIGN_OR_RETURN(v1::AppendTokensResponse first,
                          client.Append(opened.state(), o.tokens, 1 + random() % length));
      o.state = first.state();
      if (o.state.length() < length) {
        PT_ASSIGN_OR_RETURN(v1::AppendTokensResponse second,
                            client.Append(o.state, o.tokens, length));
        o.state = second.state();
      }
      open[c].push_back(std::move(o));
    }
    return absl::OkStatus();
  });
  ASSERT_THAT(failures, ::testing::IsEmpty());
  parallel([&](int c, WorkerClient& client) -> absl::Status {
    std::mt19937_64 random(2000 + c);
    for (int round = 0; round < 2; ++round) {
      std::shuffle(open[c].begin(), open[c].end(), random);
      for (const Open& o : open[c]) {
        const absl::StatusOr<uint64_t> bytes =
            client.Verify(o.state.sequence_id(), o.tokens, 0, o.tokens.size());
        if (absl::IsDataLoss(bytes.status())) {
          ++num_wrong;
          ADD_FAILURE() << bytes.status();
          continue;
        }
        PT_RETURN_IF_ERROR(bytes.status());
        verified_bytes += *bytes;
      }
    }
    return absl::OkStatus();
  });
  ASSERT_THAT(failures, ::testing::IsEmpty());
  EXPECT_EQ(num_wrong, 0u);
  WorkerClient client(worker->Address("grpc"), model_);
  uint64_t sequence_pages = 0;
  uint64_t expected_bytes = 0;
  for (const auto& sequences : open) {
    for (const Open& o : sequences) {
      sequence_pages += model_->geometry().PagesFor(o.tokens.size());
      expected_bytes +=
          2 * o.tokens.size() * 2 * 2 * 64;  // rounds × tokens × layers × K, V × bytes
    }
  }
  EXPECT_EQ(verified_bytes, expected_bytes);
  // The counters follow with the next tick.
  EXPECT_TRUE(Eventually(
      [&] { return client.Stat("pagetide_worker_pages_restored_total").value_or(0) > 0; }));
  const double spilled = client.Stat("pagetide_worker_pages_spilled_total").value_or(0);
  const double written = client.Stat("pagetide_worker_pages_written_through_total").value_or(0);
  const double restored = client.Stat("pagetide_worker_pages_restored_total").value_or(0);
  EXPECT_GT(spilled + written, 0);
  EXPECT_GT(restored, 0);
  parallel([&](int c, WorkerClient& each) -> absl::Status {
    for (const Open& o : open[c]) PT_RETURN_IF_ERROR(each.Close(o.state));
    return absl::OkStatus();
  });
  ASSERT_THAT(failures, ::testing::IsEmpty());
  const auto admin = v1::AdminService::NewStub(client.channel());
  uint64_t free_frames = 0;
  uint64_t pinned_frames = 1;
  EXPECT_TRUE(Eventually([&] {
    TestContext context;
    v1::ClearCacheResponse cleared;
    EXPECT_TRUE(admin->ClearCache(&context, {}, &cleared).ok());
    const v1::GetMemoryBreakdownResponse memory = Memory(client);
    free_frames = memory.pools(0).free_frames();
    pinned_frames = memory.pools(0).pinned_frames();
    return free_frames == kFrames && pinned_frames == 0;
  })) << free_frames
      << " free, " << pinned_frames << " pinned of " << kFrames;
  std::printf(
      "{\"test\":\"200 sequences, 16 frames\",\"clients\":%d,\"sequences\":%d,\"pages\":%llu,"
      "\"verified_bytes\":%llu,\"wrong\":%llu,\"spilled\":%.0f,\"written_through\":%.0f,"
      "\"restored\":%.0f,\"free_frames\":%llu,\"seconds\":%.2f}\n",
      kClients, kClients * kSequencesAClient, static_cast<unsigned long long>(sequence_pages),
      static_cast<unsigned long long>(verified_bytes.load()),
      static_cast<unsigned long long>(num_wrong.load()), spilled, written, restored,
      static_cast<unsigned long long>(free_frames), absl::ToDoubleSeconds(absl::Now() - began));
}

TEST_F(WorkerProcessTest, KilledInTheMiddleOfAppendsItLosesNothingThatWasStored) {
  StartStore();
  RegisterInRemoteStore();
  constexpr int kKills = 5;
  uint64_t reused_tokens = 0;
  uint64_t verified_bytes = 0;
  uint64_t num_wrong = 0;  // reads of a whole sequence
  std::vector<std::vector<uint32_t>> acknowledged;
  std::mt19937_64 random(7);
  for (int kill = 0; kill < kKills; ++kill) {
    auto worker = StartWithRemoteStore("worker-1");
    ASSERT_NE(worker, nullptr);
    {
      WorkerClient client(worker->Address("grpc"), model_);
      for (const auto& tokens : acknowledged) {  // what earlier lives wrote
        uint64_t reused = 0;
        auto state = OpenAndFill(client, tokens, &reused);
        ASSERT_TRUE(state.ok()) << state.status();
        reused_tokens += reused;
        auto bytes = client.Verify(state->sequence_id(), tokens, 0, tokens.size());
        if (absl::IsDataLoss(bytes.status())) ++num_wrong;
        EXPECT_TRUE(bytes.ok()) << bytes.status();
        verified_bytes += bytes.value_or(0);
        ASSERT_TRUE(client.Close(*state).ok());
      }
    }
    std::atomic<bool> ended{false};       // set once by the killer
    std::atomic<uint64_t> num_filled{0};  // in this life
    Mutex mu;
    std::thread appender([&] {
      WorkerClient client(worker->Address("grpc"), model_);
      for (uint64_t i = 0; !ended; ++i) {
        const auto tokens = TestTokens(5000 + kill * 1000 + i, 60);
        if (!OpenAndFill(client, tokens).ok()) break;  // the worker is gone
        MutexLock lock(&mu);
        acknowledged.push_back(tokens);
        ++num_filled;
      }
    });
    {
      // Some appends are acknowledged and some of their pages stored; the rest is on its way.
      WorkerClient client(worker->Address("grpc"), model_);
      const uint64_t enough = 2 + random() % 20;
      EXPECT_TRUE(Eventually([&] {
        return num_filled >= enough &&
               client.Stat("pagetide_worker_pages_written_through_total").value_or(0) > 0;
      }));
    }
    worker->Kill();
    ended = true;
    appender.join();
    if (acknowledged.size() > 40) {
      acknowledged.erase(acknowledged.begin(), acknowledged.end() - 40);
    }
  }
  EXPECT_GT(acknowledged.size(), 5);
  EXPECT_GT(reused_tokens, 0);
  EXPECT_GT(verified_bytes, 0);
  std::printf(
      "{\"test\":\"kill -9 worker mid-append\",\"kills\":%d,\"reused_tokens\":%llu,"
      "\"verified_bytes\":%llu,\"wrong\":%llu}\n",
      kKills, static_cast<unsigned long long>(reused_tokens),
      static_cast<unsigned long long>(verified_bytes), static_cast<unsigned long long>(num_wrong));
}

TEST_F(WorkerProcessTest, AnotherWorkerGoesOnWhereAKilledOneStood) {
  StartStore();
  RegisterInRemoteStore();
  auto first = StartWithRemoteStore("worker-1");
  auto second = StartWithRemoteStore("worker-2");
  ASSERT_NE(first, nullptr);
  ASSERT_NE(second, nullptr);
  const auto tokens = TestTokens(1, 150);
  WorkerClient writer(first->Address("grpc"), model_);
  auto state = OpenAndFill(writer, {tokens.begin(), tokens.begin() + 100});
  ASSERT_TRUE(state.ok()) << state.status();
  // The six full pages are on their way to the store.
  ASSERT_TRUE(Eventually(
      [&] { return writer.Stat("pagetide_worker_pages_written_through_total").value_or(0) == 6; }));
  first->Kill();
  EXPECT_EQ(writer.Get(state->sequence_id()).status().code(), absl::StatusCode::kUnavailable);
  WorkerClient reader(second->Address("grpc"), model_);
  uint64_t reused = 0;
  auto resumed = OpenAndFill(reader, tokens, &reused);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(reused, 96);
  auto verified = reader.Verify(resumed->sequence_id(), tokens, 0, tokens.size());
  EXPECT_TRUE(verified.ok()) << verified.status();
  // The dead worker's sequence is unknown here, whoever asks.
  EXPECT_EQ(reader.Get(state->sequence_id()).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(WorkerProcessTest, RowsOfAPageThatAnotherWorkerMadeAreReused) {
  StartStore();
  RegisterInRemoteStore();
  auto first = StartWithRemoteStore("worker-1");
  auto second = StartWithRemoteStore("worker-2");
  ASSERT_NE(first, nullptr);
  ASSERT_NE(second, nullptr);
  const auto tokens = TestTokens(1, 60);  // three full pages of 16
  WorkerClient writer(first->Address("grpc"), model_);
  ASSERT_TRUE(OpenAndFill(writer, tokens).ok());
  ASSERT_TRUE(writer.EventuallyStat("pagetide_worker_pages_written_through_total", 3));
  // Common are two pages and 11 rows of the third.
  std::vector<uint32_t> prompt(tokens.begin(), tokens.begin() + 43);
  const auto other = TestTokens(2, 30);
  prompt.insert(prompt.end(), other.begin(), other.end());
  WorkerClient reader(second->Address("grpc"), model_);
  // A store that is slow for once is a miss: the next prompt is another chance.
  absl::StatusOr<v1::OpenSequenceResponse> open;
  ASSERT_TRUE(Eventually([&] {
    open = reader.Open(prompt);
    if (!open.ok()) return false;
    if (reader.WaitReady(open->state().sequence_id()).value_or(0) == 43) return true;
    (void)reader.Close(open->state());
    return false;
  })) << open.status();
  auto state = reader.Get(open->state().sequence_id());
  ASSERT_TRUE(state.ok()) << state.status();
  auto opened = reader.Append(*state, prompt, prompt.size());
  ASSERT_TRUE(opened.ok()) << opened.status();
  auto verified = reader.Verify(state->sequence_id(), prompt, 0, prompt.size());
  EXPECT_TRUE(verified.ok()) << verified.status();
}

TEST_F(WorkerProcessTest, AStoreThatIsDownIsASlowdown) {
  StartStore();
  RegisterInRemoteStore();
  auto worker = StartWithRemoteStore("worker-1");
  ASSERT_NE(worker, nullptr);
  WorkerClient client(worker->Address("grpc"), model_);
  const auto kept = TestTokens(1, 40);
  auto before = OpenAndFill(client, kept);
  ASSERT_TRUE(before.ok()) << before.status();
  store_->Kill();
  // New work is served, and nothing durable is needed for it.
  const auto tokens = TestTokens(2, 60);
  const absl::Time began = absl::Now();
  auto state = OpenAndFill(client, tokens);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_LT(absl::Now() - began, Promised(absl::Seconds(5)));
  EXPECT_TRUE(client.Verify(state->sequence_id(), tokens, 0, 60).ok());
  EXPECT_TRUE(client.Verify(before->sequence_id(), kept, 0, 40).ok());
  // Back again, with the same address: spilling resumes, and the pool serves more than it holds.
  StartStore();
  std::vector<std::pair<v1::SequenceState, std::vector<uint32_t>>> more;
  for (int i = 0; i < 12; ++i) {
    const auto prompt = TestTokens(100 + i, 48);
    auto filled = OpenAndFill(client, prompt);
    ASSERT_TRUE(filled.ok()) << filled.status();
    more.emplace_back(*filled, prompt);
  }
  for (const auto& [each, prompt] : more) {
    auto bytes = client.Verify(each.sequence_id(), prompt, 0, prompt.size());
    EXPECT_TRUE(bytes.ok()) << bytes.status();
  }
}

TEST_F(WorkerProcessTest, AStoreThatStandsStillDoesNotStopNewWork) {
  StartStore();
  RegisterInRemoteStore();
  auto worker = StartWithRemoteStore("worker-1");
  ASSERT_NE(worker, nullptr);
  WorkerClient client(worker->Address("grpc"), model_);
  ASSERT_TRUE(OpenAndFill(client, TestTokens(1, 40)).ok());
  store_->Stop();
  const auto tokens = TestTokens(2, 60);
  const absl::Time began = absl::Now();
  auto state = OpenAndFill(client, tokens);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_LT(absl::Now() - began, Promised(absl::Seconds(5)));
  EXPECT_TRUE(client.Verify(state->sequence_id(), tokens, 0, 60).ok());
  store_->Continue();
  auto code = worker->Terminate();
  ASSERT_TRUE(code.ok()) << code.status();
  EXPECT_EQ(*code, 0);
}

TEST_F(WorkerProcessTest, TerminationWaitsForARunningAppend) {
  RegisterInStoreDir();
  auto worker = StartWithStoreDir();
  ASSERT_NE(worker, nullptr);
  WorkerClient client(worker->Address("grpc"), model_);
  auto open = client.Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  std::thread appender([&] {
    auto state = open->state();
    const auto tokens = TestTokens(3, 200);
    for (size_t end = 1; end <= 200; ++end) {
      auto appended = client.Append(state, tokens, end);
      if (!appended.ok()) return;  // the server went away between two calls
      state = appended->state();
    }
  });
  absl::SleepFor(absl::Milliseconds(50));
  auto code = worker->Terminate();
  appender.join();
  ASSERT_TRUE(code.ok()) << code.status();
  EXPECT_EQ(*code, 0);
}

// Memory of the process that it shares with files and other processes: the pools, above all.
uint64_t SharedResidentBytes(pid_t pid) {
  std::ifstream status(absl::StrCat("/proc/", pid, "/status"));
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("RssShmem:", 0) == 0) return std::stoull(line.substr(9)) * kKiB;
  }
  ADD_FAILURE() << "no RssShmem of process " << pid;
  return 0;
}

TEST_F(WorkerProcessTest, AReservedPoolIsResidentBeforeItsFirstRow) {
  constexpr uint64_t kPoolBytes = 64 * kMiB;
  RegisterInStoreDir();
  for (const bool reserve : {true, false}) {
    auto worker = ChildProcess::Start(
        {.program = "pagetide-worker",
         .args = {"--store-dir", store_dir(), absl::StrCat("--pool-bytes=", kPoolBytes),
                  reserve ? "--reserve-memory=true" : "--reserve-memory=false"}});
    ASSERT_TRUE(worker.ok()) << worker.status();
    WorkerClient client((*worker)->Address("grpc"), model_);
    ASSERT_TRUE(client.Open(TestTokens(1, 5)).ok());  // loads the model
    const uint64_t resident = SharedResidentBytes((*worker)->pid());
    if (reserve) {
      EXPECT_GE(resident, kPoolBytes * 9 / 10);
    } else {
      EXPECT_LE(resident, kPoolBytes / 10);
    }
    auto code = (*worker)->Terminate();
    ASSERT_TRUE(code.ok()) << code.status();
  }
}

std::string RunToFailure(std::vector<std::string> args) {
  auto worker = ChildProcess::Start({.program = "pagetide-worker", .args = std::move(args)});
  EXPECT_FALSE(worker.ok());
  EXPECT_EQ(worker.status().code(), absl::StatusCode::kFailedPrecondition) << worker.status();
  return std::string(worker.status().message());
}

TEST_F(WorkerProcessTest, AnUnknownKeyInTheConfigurationIsNamed) {
  const std::string path = dir_ / "worker.textproto";
  std::ofstream(path) << "worker_id: \"w\"\npool_byte: \"1GiB\"\n";
  const std::string output = RunToFailure({"--config", path});
  EXPECT_THAT(output, HasSubstr(absl::StrCat(path, ":2:")));
  EXPECT_THAT(output, HasSubstr("pool_byte"));
}

TEST_F(WorkerProcessTest, WrongOptionsAreNamedWithTheirNumbers) {
  EXPECT_THAT(RunToFailure({"--pool-bytes=12parsecs"}), HasSubstr("pool_bytes"));
  EXPECT_THAT(RunToFailure({"--pool-bytes=0"}), HasSubstr("pool_bytes is 0"));
  EXPECT_THAT(RunToFailure({"--pool-bytes=10", "--model-pool-bytes=11"}),
              HasSubstr("model_pool_bytes 11 is above pool_bytes 10"));
  EXPECT_THAT(RunToFailure({"--spill-high-watermark=1.5"}), HasSubstr("1.5"));
  EXPECT_THAT(RunToFailure({"--worker-id=Not A Name"}), HasSubstr("worker id"));
  EXPECT_THAT(RunToFailure({"--listen=0.0.0.0:0"}), HasSubstr("0.0.0.0"));
  EXPECT_THAT(RunToFailure({"--store=127.0.0.1:1", "--store-dir=x"}), HasSubstr("store_dir"));
  EXPECT_THAT(RunToFailure({"--config=/does/not/exist"}), HasSubstr("/does/not/exist"));
  EXPECT_THAT(RunToFailure({"--device=gpu"}),
              HasSubstr("device is \"gpu\", must be cpu, cuda, cuda:N or auto"));
}

// With and without CUDA in the build, with and without GPUs in the machine: this process sees none.
const std::pair<std::string, std::string> kNoGpu = {"CUDA_VISIBLE_DEVICES", ""};

TEST_F(WorkerProcessTest, WithoutAGpuItSaysWhyAndOffersTheCpuDevice) {
  for (const std::string wanted : {"cuda", "cuda:3"}) {
    auto worker = ChildProcess::Start({.program = "pagetide-worker",
                                       .args = {absl::StrCat("--device=", wanted)},
                                       .environment = {kNoGpu}});
    ASSERT_FALSE(worker.ok());
    EXPECT_EQ(worker.status().code(), absl::StatusCode::kFailedPrecondition) << worker.status();
    const std::string output(worker.status().message());
    EXPECT_THAT(output, HasSubstr(absl::StrCat("pagetide-worker: device ", wanted,
                                               ": use cuda:", wanted == "cuda" ? "0" : "3", ": ")));
    EXPECT_THAT(output, HasSubstr("device cpu needs no GPU"));
  }
}

TEST_F(WorkerProcessTest, WithoutAGpuAutoServesFromHostMemoryAndSaysWhy) {
  RegisterInStoreDir();
  auto started = ChildProcess::Start({.program = "pagetide-worker",
                                      .args = {"--device=auto", "--store-dir", store_dir(),
                                               absl::StrCat("--pool-bytes=", PoolBytes())},
                                      .environment = {kNoGpu}});
  ASSERT_TRUE(started.ok()) << started.status();
  const std::unique_ptr<ChildProcess> worker = *std::move(started);
  WorkerClient client(worker->Address("grpc"), model_);
  TestContext context;
  v1::GetCapabilitiesResponse response;
  ASSERT_TRUE(
      v1::AdminService::NewStub(client.channel())->GetCapabilities(&context, {}, &response).ok());
  EXPECT_THAT(response.capabilities(), ::testing::Contains("device:cpu"));
  const auto tokens = TestTokens(1, 20);
  const auto state = OpenAndFill(client, tokens);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_TRUE(client.Verify(state->sequence_id(), tokens, 0, 20).ok());
  EXPECT_EQ(*worker->Terminate(), 0);
  EXPECT_THAT(worker->Log(), HasSubstr("frames lie in host memory: use cuda:0: "));
}

}  // namespace
}  // namespace pagetide
