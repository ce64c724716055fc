// The algebra by logits: a decoder over the service, whose sequence is edited, against one over
// plain arrays that keeps the same rows and turns them itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/status_macros.h"
#include "clients/cpp/client.h"
#include "decoder/decoder.h"
#include "decoder/pagetide_kv_backend.h"
#include "kernels/paged_attention.h"
#include "kvstore/memory_page_store.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/conformance/edited_kv_backend.h"
#include "tests/support/process.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

DecoderConfig ConfigOf(kernels::KvType type) {
  DecoderConfig config;
  config.num_layers = 2;
  config.width = 64;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.ffn_width = 96;
  config.kv_type = type;
  return config;
}

std::vector<uint32_t> Text(size_t num_tokens) {
  std::string text;
  while (text.size() < num_tokens) text += "The quick brown fox jumps over the lazy dog. ";
  std::vector<uint32_t> tokens = TokensOf(text);
  tokens.resize(num_tokens);
  return tokens;
}

// A draft tree in a PageTide sequence: one reservation, of which a path is accepted afterwards.
class DraftTreeBackend final : public KvBackend {
 public:
  DraftTreeBackend(const DecoderConfig& config, Sequence* sequence)
      : config_(config), sequence_(sequence) {}

  // Of the tokens of the next append: the index of the one before, -1 for the last committed one.
  void SetParents(std::vector<int32_t> parents) { parents_ = std::move(parents); }

  int64_t length() const override { return static_cast<int64_t>(sequence_->length()); }
  int64_t next_position() const override { return static_cast<int64_t>(sequence_->end_position()); }
  int64_t position_of(int64_t index) const override {
    int64_t depth = 0;
    for (int32_t at = parents_[index]; at >= 0; at = parents_[at]) ++depth;
    return next_position() + depth;
  }
  absl::Status BeginAppend(std::span<const uint32_t> tokens) override {
    testing::TestContext context;
    v1::ReserveSlotsRequest request;
    auto* item = request.add_items();
    *item->mutable_sequence() = Ref();
    item->set_num_tokens(static_cast<uint32_t>(tokens.size()));
    item->mutable_parents()->Add(parents_.begin(), parents_.end());
    request.set_pin_prefix(true);
    v1::ReserveSlotsResponse response;
    PT_RETURN_IF_ERROR(FromGrpcStatus(
        sequence_->worker().sequences()->ReserveSlots(&context, request, &response)));
    slot_ = response.slots(0);
    return absl::OkStatus();
  }
  absl::Status AppendRows(int, std::span<const std::byte> k,
                          std::span<const std::byte> v) override {
    k_.assign(reinterpret_cast<const char*>(k.data()), k.size());
    v_.assign(reinterpret_cast<const char*>(v.data()), v.size());
    return absl::OkStatus();
  }
  absl::Status Attend(int layer, std::span<const float> queries, std::span<float> out) override {
    testing::TestContext context;
    v1::AttendRequest request;
    request.set_sequence_id(sequence_->id());
    request.set_epoch(sequence_->state().epoch());
    request.set_reservation_id(slot_.reservation_id());
    request.set_layer(static_cast<uint32_t>(layer));
    request.set_num_queries(slot_.num_tokens());
    request.set_query_heads(static_cast<uint32_t>(config_.num_q_heads));
    request.set_first_position(slot_.first_position());
    request.set_queries(queries.data(), queries.size_bytes());
    request.set_k_rows(k_);
    request.set_v_rows(v_);
    v1::AttendResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(sequence_->worker().sequences()->Attend(&context, request, &response)));
    if (response.outputs().size() != out.size_bytes()) return absl::InternalError("short answer");
    std::memcpy(out.data(), response.outputs().data(), out.size_bytes());
    return absl::OkStatus();
  }
  absl::Status Commit() override { return absl::OkStatus(); }  // Accept does
  void Abort() override {}

  absl::Status Accept(const std::vector<uint32_t>& indices, const std::vector<uint32_t>& tokens) {
    testing::TestContext context;
    v1::AcceptRequest request;
    *request.mutable_item()->mutable_sequence() = Ref();
    request.mutable_item()->set_reservation_id(slot_.reservation_id());
    request.mutable_item()->mutable_indices()->Add(indices.begin(), indices.end());
    request.mutable_item()->mutable_tokens()->Add(tokens.begin(), tokens.end());
    v1::AcceptResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(sequence_->worker().sequences()->Accept(&context, request, &response)));
    return sequence_->Refresh();
  }

 private:
  v1::SequenceRef Ref() const {
    v1::SequenceRef ref;
    ref.set_sequence_id(sequence_->id());
    ref.set_epoch(sequence_->state().epoch());
    return ref;
  }

  const DecoderConfig config_;
  Sequence* const sequence_;
  std::vector<int32_t> parents_;
  v1::ReserveSlotsResponse::Slot slot_;
  std::string k_, v_;  // of the layer at hand
};

class AlgebraLogitsTest : public ::testing::TestWithParam<kernels::KvType> {
 protected:
  void Start(uint32_t page_tokens, uint64_t frames) {
    config_ = ConfigOf(GetParam());
    auto decoder = Decoder::Create(config_);
    ASSERT_TRUE(decoder.ok()) << decoder.status();
    decoder_ = *std::move(decoder);
    model_ = std::make_shared<const Model>(
        Model::Create(ModelSpecOf(*decoder_, "tiny", page_tokens)).value());
    ASSERT_TRUE(testing::RegisterTestModel(*model_, &store_).ok());
    WorkerRole::Options options;
    options.worker.pool_bytes = frames * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = "a secret of tests";
    options.local_plane.socket_path = dir_ / "worker.sock";
    auto role = WorkerRole::Start(options, &store_, Clock::Real());
    ASSERT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
    ClientOptions client_options;
    client_options.worker_address = role_->address();
    auto client = Client::Create(client_options);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    auto sequence = client_->Open(model_, {});
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    sequence_ = *std::move(sequence);
    paged_ = std::make_unique<PageTideKvBackend>(config_, sequence_.get());
    plain_ = std::make_unique<EditedKvBackend>(config_);
  }
  // One forward pass over both; the largest difference of their logits.
  float Compare(std::span<const uint32_t> tokens, uint32_t* next = nullptr) {
    auto got = decoder_->Forward(tokens, *paged_);
    auto expected = decoder_->Forward(tokens, *plain_);
    EXPECT_TRUE(got.ok()) << got.status();
    EXPECT_TRUE(expected.ok()) << expected.status();
    if (!got.ok() || !expected.ok()) return 1e9f;
    float worst = 0;
    for (size_t i = 0; i < got->size(); ++i) {
      worst = std::max(worst, std::fabs((*got)[i] - (*expected)[i]));
    }
    if (next != nullptr) *next = Decoder::Greedy(*expected);
    return worst;
  }
  // Logits are of the order of one; a K row that is turned wrongly moves them by tenths.
  static float Tolerance() { return GetParam() == kernels::KvType::kF32 ? 2e-4f : 5e-3f; }

  testing::TempDir dir_;
  MemoryPageStore store_;
  DecoderConfig config_;
  std::unique_ptr<Decoder> decoder_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<Sequence> sequence_;
  std::unique_ptr<PageTideKvBackend> paged_;
  std::unique_ptr<EditedKvBackend> plain_;
};

TEST_P(AlgebraLogitsTest, RemovedAndShiftedRowsGiveTheLogitsOfRowsTurnedDirectly) {
  Start(16, 64);
  const std::vector<uint32_t> tokens = Text(90);
  const std::span<const uint32_t> all(tokens);
  EXPECT_EQ(Compare(all.subspan(0, 60)), 0.0f);
  ASSERT_TRUE(sequence_->RemoveRange(10, 25).ok());
  plain_->Remove(10, 25);
  EXPECT_EQ(Compare(all.subspan(60, 1)), 0.0f);  // a gap, nothing turned: the same bits
  ASSERT_TRUE(sequence_->ShiftPositions(25, -1, -15).ok());
  plain_->Shift(10, -15);
  for (size_t i = 61; i < 80; ++i) EXPECT_LE(Compare(all.subspan(i, 1)), Tolerance()) << i;
  // The same rows turned once and for all.
  v1::CompactSequenceRequest compact;
  compact.mutable_sequence()->set_sequence_id(sequence_->id());
  compact.mutable_sequence()->set_epoch(sequence_->state().epoch());
  compact.set_apply_shifts(true);
  v1::CompactSequenceResponse compacted;
  testing::TestContext context;
  ASSERT_TRUE(sequence_->worker().edits()->Compact(&context, compact, &compacted).ok());
  EXPECT_GT(compacted.moved_rows(), 0);
  ASSERT_TRUE(sequence_->Refresh().ok());
  for (size_t i = 80; i < 90; ++i) EXPECT_LE(Compare(all.subspan(i, 1)), Tolerance()) << i;
}

TEST_P(AlgebraLogitsTest, EndlessGenerationStaysInThePool) {
  constexpr uint32_t kPageTokens = 16;
  constexpr uint64_t kFrames = 8;
  constexpr int64_t kCapacity = kPageTokens * (kFrames - 2);  // two frames stay for the next pages
  constexpr int64_t kKeep = 4;                                // the attention sink
  Start(kPageTokens, kFrames);
  uint32_t next = 0;
  const std::vector<uint32_t> prompt = Text(40);
  EXPECT_EQ(Compare(prompt, &next), 0.0f);
  int64_t generated = 40;
  int shifts = 0;
  float worst_in_tenth = 0;
  std::string drift;
  uint64_t most_pages = 0;
  while (generated < static_cast<int64_t>(10 * kPageTokens * kFrames)) {
    if (sequence_->length() >= kCapacity) {
      const int64_t discard = (kCapacity - kKeep) / 2;
      ASSERT_TRUE(sequence_->ShiftWindow(kKeep, discard).ok());
      plain_->Remove(kKeep, kKeep + discard);
      plain_->Shift(kKeep, -discard);
      ++shifts;
    }
    const std::vector<uint32_t> token = {next};
    const float difference = Compare(token, &next);
    ASSERT_LE(difference, Tolerance()) << "token " << generated << " after " << shifts << " shifts";
    worst_in_tenth = std::max(worst_in_tenth, difference);
    ++generated;
    if (generated % (kPageTokens * kFrames) == 0) {
      drift += " " + std::to_string(shifts) + ":" + std::to_string(worst_in_tenth);
      worst_in_tenth = 0;
    }
    ASSERT_TRUE(sequence_->Refresh().ok());
    most_pages = std::max<uint64_t>(most_pages, sequence_->state().num_pages());
  }
  EXPECT_LE(most_pages, kFrames);
  EXPECT_GT(shifts, 20);
  std::printf("%ld tokens, %d shifts, at most %lu pages; worst difference by shifts:%s\n",
              static_cast<long>(generated), shifts, static_cast<unsigned long>(most_pages),
              drift.c_str());
}

// Greedy decoding with a draft that guesses two tokens each, right about every other time, as a
// tree of seven: the accepted tokens and their logits are those of decoding one by one, bit for
// bit.
TEST_P(AlgebraLogitsTest, SpeculativeDecodingWithADraftTreeDecodesWhatPlainDecodingDoes) {
  Start(16, 64);
  constexpr size_t kGenerated = 120;
  const std::vector<uint32_t> prompt = Text(50);
  // Plain decoding: the logits behind the prompt and behind each token.
  std::vector<std::vector<float>> expected;
  std::vector<uint32_t> reference;
  auto logits = decoder_->Forward(prompt, *plain_);
  ASSERT_TRUE(logits.ok()) << logits.status();
  while (reference.size() < kGenerated + 8) {
    reference.push_back(Decoder::Greedy(*logits));
    logits = decoder_->Forward({&reference.back(), 1}, *plain_);
    ASSERT_TRUE(logits.ok()) << logits.status();
    expected.push_back(*logits);
  }
  ASSERT_TRUE(decoder_->Forward(prompt, *paged_).ok());

  // 0 is known; 1 and 2 follow it; 3 and 4 follow 1, 5 and 6 follow 2.
  const std::vector<int32_t> parents = {-1, 0, 0, 1, 1, 2, 2};
  DraftTreeBackend tree(config_, sequence_.get());
  tree.SetParents(parents);
  uint32_t random = 1;
  const auto guess = [&](uint32_t right) {
    random = random * 1664525 + 1013904223;
    return (random >> 16) % 2 == 0 ? right : (right + 1 + (random >> 20) % 250) % 256;
  };
  size_t done = 0, passes = 0, not_prefixes = 0;
  while (done < kGenerated) {
    std::vector<uint32_t> draft(7);
    draft[0] = reference[done];
    for (int i = 1; i < 7; ++i) draft[i] = guess(reference[done + (i < 3 ? 1 : 2)]);
    auto all = decoder_->Forward(draft, tree, Decoder::LogitsOf::kAllTokens);
    ASSERT_TRUE(all.ok()) << all.status();
    ++passes;
    const auto logits_of = [&](uint32_t i) {
      return std::span(*all).subspan(i * DecoderConfig::kVocabularySize,
                                     DecoderConfig::kVocabularySize);
    };
    // The path along which the draft guessed what the model says.
    std::vector<uint32_t> path = {0};
    for (bool goes_on = true; goes_on;) {
      goes_on = false;
      const uint32_t next = Decoder::Greedy(logits_of(path.back()));
      for (uint32_t i = path.back() + 1; i < draft.size() && !goes_on; ++i) {
        if (parents[i] != static_cast<int32_t>(path.back()) || draft[i] != next) continue;
        path.push_back(i);
        goes_on = true;
      }
    }
    std::vector<uint32_t> tokens;
    for (uint32_t i : path) {
      ASSERT_EQ(draft[i], reference[done]) << "token " << done;
      ASSERT_TRUE(std::ranges::equal(logits_of(i), expected[done])) << "token " << done;
      tokens.push_back(draft[i]);
      ++done;
    }
    if (path.back() + 1 != path.size()) ++not_prefixes;
    const absl::Status accepted = tree.Accept(path, tokens);
    ASSERT_TRUE(accepted.ok()) << accepted;
    ASSERT_EQ(sequence_->length(), prompt.size() + done);
    ASSERT_EQ(sequence_->state().canonical_length(), prompt.size() + done);
  }
  EXPECT_GT(not_prefixes, 5u);
  EXPECT_LT(passes * 4, done * 3);
  std::printf("%zu tokens in %zu passes, %zu paths that are no prefix of the tree\n", done, passes,
              not_prefixes);
}

INSTANTIATE_TEST_SUITE_P(Types, AlgebraLogitsTest,
                         ::testing::Values(kernels::KvType::kF32, kernels::KvType::kF16),
                         [](const auto& info) {
                           return info.param == kernels::KvType::kF32 ? "f32" : "f16";
                         });

}  // namespace
}  // namespace pagetide
