// The C++ client and the decoder's backend against a real store, router and worker: both data
// planes, forks, rewinds, reads, refusals.
#include "clients/cpp/client.h"

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "clients/cpp/attention_merge.h"
#include "clients/cpp/batch_step.h"
#include "clients/cpp/in_place_rows.h"
#include "decoder/decoder.h"
#include "decoder/local_kv_backend.h"
#include "decoder/pagetide_kv_backend.h"
#include "gtest/gtest.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"

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
    StartWorker("w1", &worker_);
    decoder_ = Decoder::Create(DecoderConfig()).value();
  }
  void StartWorker(const std::string& id, std::unique_ptr<ChildProcess>* worker) {
    Start("pagetide-worker",
          {absl::StrCat("--worker-id=", id), absl::StrCat("--store=", store_->Address("grpc")),
           absl::StrCat("--router=", router_->Address("grpc")),
           absl::StrCat("--local-socket=", dir_ / absl::StrCat(id, ".sock")), "--pool-bytes=8MiB"},
          worker);
  }
  void Start(const std::string& program, std::vector<std::string> args,
             std::unique_ptr<ChildProcess>* process) {
    args.push_back("--listen=127.0.0.1:0");
    args.push_back("--metrics-listen=127.0.0.1:0");
    auto started = ChildProcess::Start({.program = program, .args = args});
    ASSERT_TRUE(started.ok()) << started.status();
    *process = *std::move(started);
  }
  std::unique_ptr<Client> MakeClient(bool use_local_plane,
                                     absl::Duration step_lease = absl::Seconds(30)) {
    ClientOptions options;
    options.step_lease = step_lease;
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

// What was a step's may be another's once its lease is over or a commit took it.
TEST_F(ClientTest, AStepWritesNothingWhenItsSlotsAreNotHeldAnyMore) {
  for (const bool local : {true, false}) {
    SCOPED_TRACE(local ? "shared memory" : "RPC");
    auto client = MakeClient(local, absl::Milliseconds(300));
    const auto model = Register(*client);
    const size_t row_bytes = decoder_->config().row_bytes();
    const std::vector<std::byte> row(row_bytes, std::byte{7});
    auto sequence = client->Open(model, Tokens(2, 90)).value();
    const uint32_t tokens[] = {65};
    const auto write = [&](PendingStep& step) {
      absl::Status status;
      for (uint32_t layer = 0; layer < model->geometry().group(0).num_layers(); ++layer) {
        status.Update(step.WriteRows(0, layer, row, row));
      }
      return status;
    };
    auto late = sequence->BeginStep(1);
    ASSERT_TRUE(late.ok()) << late.status();
    ASSERT_TRUE(write(**late).ok());
    absl::Status over;  // in real time
    EXPECT_TRUE(testing::Eventually([&] { return !(over = write(**late)).ok(); }));
    EXPECT_EQ(over.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_NE(over.message().find("its lease has ended"), absl::string_view::npos) << over;
    late->reset();

    auto patient = MakeClient(local);
    auto other = patient->Open(Register(*patient), Tokens(2, 91)).value();
    auto step = other->BeginStep(1);
    ASSERT_TRUE(step.ok()) << step.status();
    ASSERT_TRUE(write(**step).ok());
    ASSERT_TRUE((*step)->Commit(tokens).ok());
    const absl::Status committed = write(**step);
    EXPECT_EQ(committed.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_NE(committed.message().find("it is over"), absl::string_view::npos) << committed;
  }
  ClientOptions options;
  options.router_address = router_->Address("grpc");
  for (const absl::Duration lease : {absl::ZeroDuration(), absl::Minutes(6)}) {
    options.step_lease = lease;
    EXPECT_EQ(Client::Create(options).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(ClientTest, AnAnswerThatIsLostEndsTheWritingOfItsStep) {
  auto client = MakeClient(true);
  const auto model = Register(*client);
  auto sequence = client->Open(model, Tokens(2, 90)).value();
  auto step = sequence->BeginStep(1);
  ASSERT_TRUE(step.ok()) << step.status();
  ASSERT_TRUE((*step)->is_local());
  const std::vector<std::byte> row(decoder_->config().row_bytes(), std::byte{7});
  ASSERT_TRUE((*step)->WriteRows(0, 0, row, row).ok());
  const uint32_t tokens[] = {65};
  worker_.reset();
  EXPECT_FALSE((*step)->Commit(tokens).ok());
  const absl::Status status = (*step)->WriteRows(0, 0, row, row);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("got no answer"), absl::string_view::npos) << status;
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

// Rows [begin, end) of every layer of `oracle`.
void AppendRowsOf(LocalKvBackend& oracle, size_t row_bytes, PendingAppend& append,
                  uint32_t num_layers, size_t begin, size_t end) {
  for (uint32_t layer = 0; layer < num_layers; ++layer) {
    const auto part = [&](auto rows) {
      return rows.subspan(begin * row_bytes, (end - begin) * row_bytes);
    };
    ASSERT_TRUE(append.WriteRows(0, layer, RowKind::kK, 0, part(oracle.k_rows(layer))).ok());
    ASSERT_TRUE(append.WriteRows(0, layer, RowKind::kV, 0, part(oracle.v_rows(layer))).ok());
  }
  ASSERT_TRUE(append.Commit().ok());
}

// docs/sequence_algebra.md, "A context over several workers".
TEST_F(ClientTest, TwoWorkersHoldOneContextAndTheirAttentionMerges) {
  std::unique_ptr<ChildProcess> other;
  StartWorker("w2", &other);
  auto client = MakeClient(true);
  const auto model = Register(*client);
  const GroupGeometry& group = model->geometry().group(0);
  const size_t row_bytes = decoder_->config().row_bytes();
  const std::vector<uint32_t> tokens = Tokens(700, 11);
  constexpr size_t kCut = 433;
  LocalKvBackend oracle(decoder_->config());
  ASSERT_TRUE(decoder_->Prefill(tokens, oracle).ok());

  OpenOptions on_w1;
  on_w1.exclude_worker_ids = {"w2"};
  auto whole = client->Open(model, tokens, on_w1).value();
  ASSERT_EQ(whole->worker_id(), "w1");
  AppendRowsOf(oracle, row_bytes, **whole->BeginAppend(tokens), group.num_layers(), 0, 700);
  auto front = whole->Fork(kCut).value();
  // The rest stands behind the front: what names the front is an input of it, so that its pages are
  // never taken for those of a prompt that begins with the rest.
  OpenOptions on_w2;
  on_w2.exclude_worker_ids = {"w1"};
  on_w2.inputs = {{0, Sha256Of(std::string(reinterpret_cast<const char*>(tokens.data()),
                                           kCut * sizeof(tokens[0])))}};
  const std::span<const uint32_t> rest = std::span(tokens).subspan(kCut);
  auto back = client->Open(model, rest, on_w2).value();
  ASSERT_EQ(back->worker_id(), "w2");
  ASSERT_EQ(back->length(), 0u);
  AppendRowsOf(oracle, row_bytes, **back->BeginAppend(rest, true, on_w2.inputs), group.num_layers(),
               kCut, 700);
  ASSERT_EQ(client->Open(model, rest, on_w2).value()->length(), rest.size() - 1) << "found again";
  OpenOptions without = on_w2;
  without.inputs.clear();
  ASSERT_EQ(client->Open(model, rest, without).value()->length(), 0u) << "another context";

  constexpr uint32_t kQueries = 6, kHeads = 8;
  const uint32_t k_dim = group.spec().k_dim, v_dim = group.spec().v_dim;
  std::vector<float> queries(kQueries * kHeads * k_dim);
  for (size_t i = 0; i < queries.size(); ++i) {
    queries[i] = std::sin(static_cast<float>(i * i % 1009));
  }
  struct Answer {
    std::vector<float> outputs, lse;
  };
  const auto attend = [&](Sequence& sequence, uint32_t layer, uint64_t first_position) {
    Answer answer{std::vector<float>(kQueries * kHeads * v_dim),
                  std::vector<float>(kQueries * kHeads)};
    AttendCall call;
    call.layer = layer;
    call.query_heads = kHeads;
    call.first_position = first_position;
    call.allow_behind_end = true;
    call.queries = queries;
    call.outputs = std::span(answer.outputs);
    call.log_sum_exp = std::span(answer.lse);
    const absl::Status status = sequence.Attend(call);
    EXPECT_TRUE(status.ok()) << status;
    return answer;
  };
  // Causal in each part: the queries' places in the back, and behind all of the front.
  for (const uint64_t first : {uint64_t{kCut}, uint64_t{kCut + 100}, uint64_t{694}}) {
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      const Answer all = attend(*whole, layer, first);
      const Answer a = attend(*front, layer, first);
      const Answer b = attend(*back, layer, first - kCut);
      const AttentionPart parts[] = {{a.outputs, a.lse}, {b.outputs, b.lse}};
      Answer merged = all;
      ASSERT_TRUE(MergeAttention(parts, std::span(merged.outputs), std::span(merged.lse)).ok());
      EXPECT_NE(a.outputs, all.outputs);
      for (size_t i = 0; i < all.outputs.size(); ++i) {
        ASSERT_NEAR(merged.outputs[i], all.outputs[i], 2e-6) << layer << ' ' << i;
      }
      for (size_t i = 0; i < all.lse.size(); ++i) ASSERT_NEAR(merged.lse[i], all.lse[i], 4e-6);
    }
  }
}

// One step of three sequences: rows as the oracle has them, for each its own.
TEST_F(ClientTest, OneStepOfManySequences) {
  const size_t row_bytes = decoder_->config().row_bytes();
  for (const bool local : {true, false}) {
    SCOPED_TRACE(local ? "shared memory" : "RPC");
    auto client = MakeClient(local);
    const auto model = Register(*client);
    const uint32_t num_layers = model->geometry().group(0).num_layers();
    std::vector<std::unique_ptr<Sequence>> sequences;
    std::vector<Sequence*> pointers;
    std::vector<std::vector<uint32_t>> tokens;
    for (uint32_t i = 0; i < 3; ++i) {
      tokens.push_back(Tokens(30 + i, 100 + i + 10 * local));
      sequences.push_back(client->Open(model, tokens[i]).value());
      ASSERT_TRUE(Compute(*sequences[i], tokens[i]).ok());
      pointers.push_back(sequences[i].get());
    }
    std::vector<std::vector<std::byte>> rows;  // [sequence], of every layer alike
    const auto step_all = [&](bool leave_one_out) {
      auto step = BatchStep::Begin(pointers, 1);
      ASSERT_TRUE(step.ok()) << step.status();
      EXPECT_EQ((*step)->is_local(), local);
      rows.clear();
      std::vector<std::span<const uint32_t>> next;
      static const std::vector<uint32_t> kToken = {77};
      for (size_t i = 0; i < pointers.size(); ++i) {
        EXPECT_EQ((*step)->first_position(i), pointers[i]->length());
        rows.emplace_back(row_bytes, static_cast<std::byte>(i + 1));
        const uint32_t layers = leave_one_out && i == 1 && !local ? num_layers - 1 : num_layers;
        for (uint32_t layer = 0; layer < layers; ++layer) {
          ASSERT_TRUE((*step)->WriteRows(i, 0, layer, rows[i], rows[i]).ok());
        }
        next.push_back(kToken);
      }
      EXPECT_EQ((*step)->WriteRows(0, 0, num_layers, rows[0], rows[0]).code(),
                absl::StatusCode::kInvalidArgument);
      EXPECT_EQ((*step)->Commit({next.data(), 2}).status().code(),
                absl::StatusCode::kInvalidArgument);
      const auto committed = (*step)->Commit(next);
      ASSERT_TRUE(committed.ok()) << committed.status();
      for (size_t i = 0; i < pointers.size(); ++i) {
        if (leave_one_out && i == 1 && !local) {
          EXPECT_EQ(GetReason((*committed)[i]), "ROWS_MISSING");
        } else {
          EXPECT_TRUE((*committed)[i].ok()) << (*committed)[i];
        }
      }
      if (!leave_one_out) {
        EXPECT_EQ((*step)->Commit(next).status().code(), absl::StatusCode::kFailedPrecondition);
      }
    };
    step_all(/*leave_one_out=*/false);
    // The one without all its rows stays as it was and can be stepped again.
    step_all(/*leave_one_out=*/true);
    EXPECT_EQ(pointers[0]->length(), 32u);
    EXPECT_EQ(pointers[1]->length(), local ? 33u : 32u);
    for (size_t i = 0; i < pointers.size(); ++i) {
      ASSERT_TRUE(pointers[i]->Refresh().ok());
      EXPECT_EQ(pointers[i]->state().pending_tokens(), 0u);
      uint64_t compared = 0;
      ASSERT_TRUE(pointers[i]
                      ->ReadRows(0, tokens[i].size(), 0, {},
                                 [&](const RowsPart& part) {
                                   for (const std::byte b : part.bytes) {
                                     EXPECT_EQ(b, static_cast<std::byte>(i + 1));
                                   }
                                   compared += part.bytes.size();
                                   return absl::OkStatus();
                                 })
                      .ok());
      EXPECT_EQ(compared, (pointers[i]->length() - tokens[i].size()) * num_layers * 2 * row_bytes);
    }
    EXPECT_EQ(BatchStep::Begin({}, 1).status().code(), absl::StatusCode::kInvalidArgument);
    pointers.push_back(pointers[0]);  // twice: refused whole
    EXPECT_FALSE(BatchStep::Begin(pointers, 1).ok());
    EXPECT_TRUE(BatchStep::Begin({pointers.data(), 3}, 1).ok());
  }
}

TEST_F(ClientTest, ReadsRowsInPlaceInTheWorkersFrames) {
  auto client = MakeClient(true);
  const auto model = Register(*client);
  const std::vector<uint32_t> tokens = Tokens(600, 9);
  auto sequence = client->Open(model, tokens).value();
  ASSERT_TRUE(Compute(*sequence, tokens, 512).ok());
  LocalKvBackend oracle(decoder_->config());
  ASSERT_TRUE(decoder_->Prefill(tokens, oracle).ok());
  auto rows = sequence->ReadInPlace(absl::Seconds(30));
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ((*rows)->length(), 600u);
  for (uint32_t layer = 0; layer < model->geometry().group(0).num_layers(); ++layer) {
    for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
      const auto expected = kind == RowKind::kK ? oracle.k_rows(static_cast<int>(layer))
                                                : oracle.v_rows(static_cast<int>(layer));
      uint64_t next = 0;
      for (const InPlaceRows::Run& run : (*rows)->Rows(0, layer, kind)) {
        EXPECT_EQ(run.first_token, next);
        next += run.num_tokens;
        EXPECT_EQ(0, std::memcmp(run.bytes.data(),
                                 expected.data() + run.first_token * decoder_->config().row_bytes(),
                                 run.bytes.size()));
      }
      EXPECT_EQ(next, 600u);
      std::vector<std::byte> copy(600 * decoder_->config().row_bytes());
      ASSERT_TRUE((*rows)->CopyRows(0, layer, kind, copy).ok());
      EXPECT_EQ(0, std::memcmp(copy.data(), expected.data(), copy.size()));
      copy.pop_back();
      EXPECT_EQ((*rows)->CopyRows(0, layer, kind, copy).code(), absl::StatusCode::kInvalidArgument);
    }
  }
  EXPECT_TRUE((*rows)->Rows(1, 0, RowKind::kK).empty());
  EXPECT_TRUE((*rows)->IsValid());
  // The frames stay although the sequence goes and others want frames.
  const std::vector<InPlaceRows::Run> runs = (*rows)->Rows(0, 0, RowKind::kK);
  ASSERT_TRUE(sequence->Close().ok());
  ASSERT_TRUE(sequence->worker().EvictPages(0).ok());
  EXPECT_EQ(0, std::memcmp(runs[0].bytes.data(), oracle.k_rows(0).data(), runs[0].bytes.size()));

  for (const absl::Duration lease : {absl::ZeroDuration(), absl::Seconds(31)}) {
    EXPECT_EQ(sequence->ReadInPlace(lease).status().code(), absl::StatusCode::kInvalidArgument);
  }
  auto remote = MakeClient(false)->Open(model, tokens);
  ASSERT_TRUE(remote.ok()) << remote.status();
  EXPECT_EQ((*remote)->ReadInPlace(absl::Seconds(1)).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(ClientTest, LentRowsAreWhatIsAppended) {
  auto client = MakeClient(true);
  const auto model = Register(*client);
  const uint32_t num_layers = model->geometry().group(0).num_layers();
  const size_t row_bytes = decoder_->config().row_bytes();
  const std::vector<uint32_t> tokens = Tokens(700, 21);
  auto sequence = client->Open(model, tokens, {.no_reuse = true}).value();
  auto rows = std::make_shared<std::vector<std::byte>>(700 * row_bytes);
  for (size_t i = 0; i < rows->size(); ++i) (*rows)[i] = static_cast<std::byte>(i * 7 / 5);
  const std::vector<std::byte> expected = *rows;
  {
    auto append = sequence->BeginAppend(tokens, /*will_attend=*/false).value();
    for (uint32_t layer = 0; layer < num_layers; ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        ASSERT_TRUE(append->WriteLentRows(0, layer, kind, 0, *rows, rows).ok());
      }
    }
    rows.reset();  // the append keeps them
    ASSERT_TRUE(append->Commit().ok());
  }
  uint64_t compared = 0;
  ASSERT_TRUE(
      sequence
          ->ReadRowPieces(0, 0, 0, {},
                          [&](const RowsPieces& part) {
                            const std::string bytes = part.bytes->ToString();
                            EXPECT_EQ(0, std::memcmp(bytes.data(),
                                                     expected.data() + part.first_token * row_bytes,
                                                     bytes.size()));
                            compared += bytes.size();
                            return absl::OkStatus();
                          })
          .ok());
  EXPECT_EQ(compared, num_layers * 2 * expected.size());
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
    EXPECT_TRUE(testing::Eventually([&] {
      return sequence->Refresh().ok() && sequence->state().pending_tokens() == 50;
    })) << "the worker has not begun it";
  }  // cancelled; the worker learns of it a moment later
  EXPECT_TRUE(testing::Eventually(
      [&] { return sequence->Refresh().ok() && sequence->state().pending_tokens() == 0; }));
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
