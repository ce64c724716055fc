// The C++ client and the decoder's backend against a real store, router and worker: both data
// planes, forks, rewinds, reads, refusals.
#include "clients/cpp/client.h"

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "decoder/decoder.h"
#include "decoder/local_kv_backend.h"
#include "decoder/pagetide_kv_backend.h"
#include "gtest/gtest.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

using testing::ChildProcess;
using testing::TempDir;

class ClientTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Start("pagetide-store", {absl::StrCat("--data-dir=", dir_ / "store")}, &store_);
    const std::string store = absl::StrCat("--store=", store_->Address("grpc"));
    Start("pagetide-router", {store}, &router_);
    Start("pagetide-worker",
          {"--worker-id=w1", store, absl::StrCat("--router=", router_->Address("grpc")),
           absl::StrCat("--local-socket=", dir_ / "w1.sock"), "--pool-bytes=8MiB"},
          &worker_);
    decoder_ = Decoder::Create(DecoderConfig()).value();
  }
  void Start(const std::string& program, std::vector<std::string> args,
             std::unique_ptr<ChildProcess>* process) {
    args.push_back("--listen=127.0.0.1:0");
    args.push_back("--metrics-listen=127.0.0.1:0");
    auto started = ChildProcess::Start({.program = program, .args = args});
    ASSERT_TRUE(started.ok()) << started.status();
    *process = *std::move(started);
  }
  std::unique_ptr<Client> MakeClient(bool use_local_plane) {
    ClientOptions options;
    options.router_address = router_->Address("grpc");
    options.use_local_plane = use_local_plane;
    return Client::Create(options).value();
  }
  std::shared_ptr<const Model> Register(Client& client) {
    auto model = client.RegisterModel(ModelSpecOf(*decoder_, "decoder-test"));
    EXPECT_TRUE(model.ok()) << model.status();
    return *std::move(model);
  }
  std::vector<float> Expected(const std::vector<uint32_t>& tokens) {
    LocalKvBackend kv(decoder_->config());
    return decoder_->Prefill(tokens, kv).value();
  }
  // Prefill of what the sequence lacks; the logits of the last token.
  absl::StatusOr<std::vector<float>> Compute(Sequence& sequence,
                                             const std::vector<uint32_t>& tokens,
                                             int64_t chunk = 128) {
    PageTideKvBackend kv(decoder_->config(), &sequence);
    return decoder_->Prefill(tokens, kv, chunk);
  }

  TempDir dir_;
  std::unique_ptr<ChildProcess> store_, router_, worker_;
  std::unique_ptr<Decoder> decoder_;
};

std::vector<uint32_t> Tokens(size_t n, uint32_t seed) {
  std::vector<uint32_t> tokens(n);
  for (size_t i = 0; i < n; ++i) tokens[i] = static_cast<uint32_t>(i * 31 + i / 7 + seed) % 256;
  return tokens;
}

TEST_F(ClientTest, SharedMemoryAndRpcGiveTheSameBits) {
  for (const bool local : {true, false}) {
    auto client = MakeClient(local);
    const auto model = Register(*client);
    std::vector<uint32_t> tokens = Tokens(300, local);
    auto sequence = client->Open(model, tokens);
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    ASSERT_TRUE(Compute(**sequence, tokens).ok());
    {
      auto step = (*sequence)->BeginStep(1);
      ASSERT_TRUE(step.ok()) << step.status();
      EXPECT_EQ((*step)->is_local(), local);
      EXPECT_EQ((*step)->first_position(), 300u);
    }  // given back
    for (int i = 0; i < 5; ++i) {
      tokens.push_back(65 + i);
      const auto logits = Compute(**sequence, tokens, /*chunk=*/1);
      ASSERT_TRUE(logits.ok()) << logits.status();
      EXPECT_EQ(*logits, Expected(tokens)) << "local " << local << ", token " << i;
    }
    EXPECT_TRUE((*sequence)->Close().ok());
  }
}

TEST_F(ClientTest, ForkAndRewindLeaveTheOtherSequenceAlone) {
  auto client = MakeClient(true);
  const auto model = Register(*client);
  const std::vector<uint32_t> tokens = Tokens(300, 7);
  auto sequence = client->Open(model, tokens).value();
  ASSERT_TRUE(Compute(*sequence, tokens).ok());
  auto fork = sequence->Fork(280);
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_EQ((*fork)->length(), 280u);
  std::vector<uint32_t> branch(tokens.begin(), tokens.begin() + 280);
  branch.insert(branch.end(), {1, 2, 3, 4});
  EXPECT_EQ(Compute(**fork, branch).value(), Expected(branch));

  EXPECT_EQ(sequence->Rewind(301).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(sequence->Rewind(-1).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(sequence->Rewind(100).ok());
  EXPECT_EQ(sequence->length(), 100u);
  std::vector<uint32_t> again(tokens.begin(), tokens.begin() + 100);
  again.push_back(9);
  EXPECT_EQ(Compute(*sequence, again).value(), Expected(again));
  EXPECT_EQ((*fork)->length(), 284u);
}

TEST_F(ClientTest, ReadsBackWhatWasAppendedAndStopsWhenToldTo) {
  auto client = MakeClient(true);
  const auto model = Register(*client);
  const std::vector<uint32_t> tokens = Tokens(600, 3);
  auto sequence = client->Open(model, tokens).value();
  ASSERT_TRUE(Compute(*sequence, tokens, 512).ok());
  LocalKvBackend oracle(decoder_->config());
  ASSERT_TRUE(decoder_->Prefill(tokens, oracle).ok());
  const size_t row_bytes = decoder_->config().row_bytes();
  const std::vector<uint32_t> layers = {2};
  uint64_t rows = 0;
  ASSERT_TRUE(sequence
                  ->ReadRows(0, 100, 550, layers,
                             [&](const RowsPart& part) {
                               const auto all =
                                   part.kind == RowKind::kK ? oracle.k_rows(2) : oracle.v_rows(2);
                               EXPECT_EQ(part.layer, 2u);
                               EXPECT_EQ(0, std::memcmp(part.bytes.data(),
                                                        all.data() + part.first_token * row_bytes,
                                                        part.bytes.size()));
                               rows += part.num_tokens;
                               return absl::OkStatus();
                             })
                  .ok());
  EXPECT_EQ(rows, 2u * 450u);
  const absl::Status stopped = sequence->ReadRows(
      0, 0, 0, {}, [](const RowsPart&) { return absl::OutOfRangeError("enough"); });
  EXPECT_EQ(stopped.message(), "enough");
}

TEST_F(ClientTest, AnAppendThatIsDroppedChangesNothing) {
  auto client = MakeClient(true);
  const auto model = Register(*client);
  const std::vector<uint32_t> tokens = Tokens(50, 5);
  auto sequence = client->Open(model, tokens).value();
  {
    auto append = sequence->BeginAppend(tokens);
    ASSERT_TRUE(append.ok()) << append.status();
    const std::vector<std::byte> rows(50 * decoder_->config().row_bytes());
    ASSERT_TRUE((*append)->WriteRows(0, 0, RowKind::kK, 0, rows).ok());
    // All layers are missing: refused, nothing committed.
    EXPECT_FALSE((*append)->Commit().ok());
  }
  {
    auto append = sequence->BeginAppend(tokens);
    ASSERT_TRUE(append.ok()) << append.status();
  }  // cancelled
  ASSERT_TRUE(sequence->Refresh().ok());
  EXPECT_EQ(sequence->length(), 0u);
  EXPECT_EQ(Compute(*sequence, tokens).value(), Expected(tokens));
}

TEST_F(ClientTest, UnknownModelIsNotFoundAndADeadWorkerUnavailable) {
  auto client = MakeClient(true);
  const auto model = Register(*client);
  EXPECT_TRUE(client->FindModel("decoder-test").ok());
  EXPECT_EQ(client->FindModel("no-such-model").status().code(), absl::StatusCode::kNotFound);
  const std::vector<uint32_t> tokens = Tokens(40, 1);
  auto sequence = client->Open(model, tokens).value();
  worker_->Kill();
  EXPECT_TRUE(absl::IsUnavailable(Compute(*sequence, tokens).status()));
  EXPECT_TRUE(absl::IsUnavailable(client->Open(model, tokens).status()));
}

}  // namespace
}  // namespace pagetide
