// Drift of endless generation against the number of shifts, for f16 and quantised K: a sequence of
// the service whose window is shifted again and again, against the same rows in plain arrays that
// are turned by float64 and rounded to the type once (what the service promises), or not at all
// (what rounding costs). Prints the table of docs/kshift.md.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clients/cpp/client.h"
#include "decoder/decoder.h"
#include "decoder/pagetide_kv_backend.h"
#include "kvstore/memory_page_store.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/conformance/edited_kv_backend.h"
#include "tests/support/process.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

constexpr uint32_t kPageTokens = 16;
constexpr uint64_t kFrames = 8;
constexpr int64_t kCapacity = kPageTokens * (kFrames - 2);
constexpr int64_t kKeep = 4;  // the attention sink: these rows stay for ever
constexpr int64_t kDiscard = 8;

// The table of docs/kshift.md is of 100.
int NumShifts() {
  const char* const text = std::getenv("PAGETIDE_DRIFT_SHIFTS");
  return text == nullptr ? 20 : std::max(11, std::atoi(text));
}

// Root mean square, and the largest.
struct Error {
  double squares = 0;
  double worst = 0;
  uint64_t count = 0;
  void Add(double e) {
    squares += e * e;
    worst = std::max(worst, std::fabs(e));
    ++count;
  }
  double rms() const { return count == 0 ? 0 : std::sqrt(squares / static_cast<double>(count)); }
};

struct Drift {
  Error promised;  // against rows rounded to the type after one turn
  Error exact;     // against rows that are turned and not rounded
  Error logits;    // the logits themselves, for scale
};

struct DriftCase {
  kernels::KvType type;
  bool apply;  // Compact{apply_shifts} after each shift: one rounding a shift, not one in all
};

class ShiftDriftTest : public ::testing::TestWithParam<DriftCase> {
 protected:
  void SetUp() override {
    config_.num_layers = 2;
    config_.width = 64;
    config_.num_q_heads = 4;
    config_.num_kv_heads = 2;
    config_.head_dim = 32;
    config_.ffn_width = 96;
    config_.kv_type = GetParam().type;
    decoder_ = Decoder::Create(config_).value();
    model_ = std::make_shared<const Model>(
        Model::Create(ModelSpecOf(*decoder_, "tiny", kPageTokens)).value());
    ASSERT_TRUE(testing::RegisterTestModel(*model_, &store_).ok());
    WorkerRole::Options options;
    // With shifts applied, old and new pages are there together for a moment.
    options.worker.pool_bytes =
        (GetParam().apply ? 2 : 1) * kFrames * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = "a secret of tests";
    options.local_plane.socket_path = dir_ / "worker.sock";
    role_ = WorkerRole::Start(options, &store_, Clock::Real()).value();
    ClientOptions client_options;
    client_options.worker_address = role_->address();
    client_ = Client::Create(client_options).value();
    sequence_ = client_->Open(model_, {}).value();
  }
  std::vector<float> Logits(uint32_t token, KvBackend& kv) {
    auto logits = decoder_->Forward({&token, 1}, kv);
    EXPECT_TRUE(logits.ok()) << logits.status();
    return logits.ok() ? *std::move(logits)
                       : std::vector<float>(DecoderConfig::kVocabularySize, 1e9f);
  }
  void ApplyShifts() {
    for (int64_t moved = 1; moved > 0;) {
      v1::CompactSequenceRequest request;
      request.mutable_sequence()->set_sequence_id(sequence_->id());
      request.mutable_sequence()->set_epoch(sequence_->state().epoch());
      request.set_apply_shifts(true);
      v1::CompactSequenceResponse response;
      testing::TestContext context;
      const absl::Status status =
          FromGrpcStatus(sequence_->worker().edits()->Compact(&context, request, &response));
      ASSERT_TRUE(status.ok()) << status;
      moved = response.moved_rows();
      ASSERT_TRUE(sequence_->Refresh().ok());
    }
  }

  testing::TempDir dir_;
  MemoryPageStore store_;
  DecoderConfig config_;
  std::unique_ptr<Decoder> decoder_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<Sequence> sequence_;
};

TEST_P(ShiftDriftTest, OneRoundingHoweverOftenTheWindowMoves) {
  PageTideKvBackend paged(config_, sequence_.get());
  EditedKvBackend promised(config_);
  EditedKvBackend exact(config_, EditedKvBackend::Turned::kExact);
  std::vector<uint32_t> prompt = TokensOf(
      "The quick brown fox jumps over the lazy dog, and then it sits down to read the paper.");
  prompt.resize(kCapacity - 8, ' ');
  for (KvBackend* kv : {static_cast<KvBackend*>(&paged), static_cast<KvBackend*>(&promised),
                        static_cast<KvBackend*>(&exact)}) {
    ASSERT_TRUE(decoder_->Forward(prompt, *kv).ok());
  }
  uint32_t next = prompt.back();
  std::map<int, Drift> drift;  // by shifts so far, up to
  const int num_shifts = NumShifts();
  for (int shifts = 0; shifts < num_shifts;) {
    if (sequence_->length() >= kCapacity) {
      ASSERT_TRUE(sequence_->ShiftWindow(kKeep, kDiscard).ok());
      if (GetParam().apply) {
        ASSERT_NO_FATAL_FAILURE(ApplyShifts());
      }
      for (EditedKvBackend* kv : {&promised, &exact}) {
        kv->Remove(kKeep, kKeep + kDiscard);
        kv->Shift(kKeep, -kDiscard);
      }
      ++shifts;
    }
    const std::vector<float> got = Logits(next, paged);
    const std::vector<float> rounded = Logits(next, promised);
    const std::vector<float> unrounded = Logits(next, exact);
    const int bucket = shifts == 0 ? 0 : shifts <= 1 ? 1 : shifts <= 10 ? 10 : num_shifts;
    for (size_t i = 0; i < got.size(); ++i) {
      drift[bucket].promised.Add(got[i] - rounded[i]);
      drift[bucket].exact.Add(got[i] - unrounded[i]);
      drift[bucket].logits.Add(unrounded[i]);
    }
    // All three go on with the same token: errors of rows are compared, not of texts. Any does;
    // the greedy one soon repeats itself.
    next = (Decoder::Greedy(unrounded) + static_cast<uint32_t>(shifts) * 31) % 256;
    ASSERT_TRUE(sequence_->Refresh().ok());
    ASSERT_LE(sequence_->state().num_pages(), kFrames);
  }
  const Drift& last = drift[num_shifts];
  const double scale = last.logits.rms();
  std::string line = std::string("| ") + kernels::KvTypeName(GetParam().type) + " | " +
                     (GetParam().apply ? "each" : "lazy");
  for (int bucket : {0, 1, 10, num_shifts}) {
    char text[80];
    std::snprintf(text, sizeof(text), " | %.1e | %.1e", drift[bucket].exact.rms() / scale,
                  drift[bucket].exact.worst / scale);
    line += text;
  }
  std::printf("%s | %.1e |\n", line.c_str(), last.promised.rms() / scale);
  EXPECT_EQ(drift[0].promised.worst, 0.0) << "nothing was turned: the same bits";
  if (!GetParam().apply) {
    // The number of shifts does not count: a row is turned by their sum, and rounded once. (Two
    // times, because different tokens are decoded in each span.)
    EXPECT_LE(last.exact.rms(), 2 * drift[10].exact.rms() + 1e-6 * scale);
    // The service turns in f32 and the reference in float64: what they round differently is a part
    // of what rounding costs, where it costs anything.
    EXPECT_LE(last.promised.rms(), std::max(last.exact.rms(), 1e-5 * scale));
  }
}

INSTANTIATE_TEST_SUITE_P(Types, ShiftDriftTest, ::testing::ValuesIn([] {
                           std::vector<DriftCase> cases;
                           for (const bool apply : {false, true}) {
                             for (const kernels::KvType type :
                                  {kernels::KvType::kF32, kernels::KvType::kF16,
                                   kernels::KvType::kBF16, kernels::KvType::kQ8_0,
                                   kernels::KvType::kQ5_1, kernels::KvType::kQ4_0}) {
                               cases.push_back({type, apply});
                             }
                           }
                           return cases;
                         }()),
                         [](const auto& info) {
                           return std::string(kernels::KvTypeName(info.param.type)) +
                                  (info.param.apply ? "_applied" : "_lazy");
                         });

}  // namespace
}  // namespace pagetide
