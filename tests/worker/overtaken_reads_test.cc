// Calls that read wait in line for frames, and hold nothing while they wait: edits, and appends
// that need no frame, pass them. What a read then answers with is what the sequence holds when its
// turn comes, never rows that were given up meanwhile.
#include <gtest/gtest.h>

#include <thread>

#include "kvstore/fault_injecting_page_store.h"
#include "tests/support/timing.h"
#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;

constexpr uint32_t kPageTokens = 16;

SequenceHandle HandleOf(const SequenceInfo& info) {
  return {info.id, info.epoch, std::nullopt};
}

// One sequence whose first page lies in the store, and a write at the head of the line that can not
// have its frames for now. A call that needs the first page waits behind it.
class OvertakenRead : public ::testing::Test {
 protected:
  ~OvertakenRead() override {
    LeaveTheLine();
    if (reader_.joinable()) reader_.join();
  }

  static MonotonicTime Late() { return HostUnderTest::In(absl::Minutes(3)); }

  // A write that needs every frame of the pool.
  void BlockTheLine() {
    auto opened = t_.host->Open(t_.tenant, {}, {}, {});
    ASSERT_TRUE(opened.ok()) << opened.status();
    blocker_ = opened->info;
    const uint64_t waits = t_.host->Counters().acquire_waits;
    head_ = std::thread([this] {
      const std::vector<uint32_t> two_pages = Tokens(5000, 2 * kPageTokens);
      blocked_ = t_.host
                     ->BeginAppend(t_.tenant, HandleOf(*blocker_), "b", 0, two_pages, {},
                                   /*pin_prefix=*/false, Late())
                     .status();
    });
    ASSERT_TRUE(Eventually([&] { return t_.host->Counters().acquire_waits > waits; }));
  }
  // Returns when `read` waits in line.
  template <typename Read>
  void Start(Read read) {
    const uint64_t waits = t_.host->Counters().acquire_waits;
    reader_ = std::thread(read);
    ASSERT_TRUE(Eventually([&] { return t_.host->Counters().acquire_waits > waits; }));
  }
  void StartPinRows(uint64_t begin, uint64_t end) {
    Start(
        [this, begin, end] { rows_ = t_.host->PinRows(t_.tenant, a_.id, 0, begin, end, Late()); });
  }
  void StartAttend(uint64_t position) {
    Start([this, position] { attended_ = AttendAt(position); });
  }
  absl::StatusOr<AttendOutput> AttendAt(uint64_t position) {
    const std::vector<float> queries = {1, -2, 3, -4, 5, -6, 7, -8};
    AttendQuery query{.sequence = a_.id, .epoch = a_.epoch};
    query.num_queries = 1;
    query.query_heads = 1;
    query.first_position = position;
    query.queries = queries;
    return t_.host->Attend(t_.tenant, query, Late());
  }
  void LeaveTheLine() {
    if (!blocker_) return;
    EXPECT_TRUE(t_.host->Close(t_.tenant, blocker_->id, blocker_->epoch).ok());
    blocker_.reset();
    if (head_.joinable()) head_.join();
    EXPECT_EQ(GetReason(blocked_), "SEQUENCE_NOT_FOUND") << blocked_;
  }
  // The write leaves, and the call that waited behind it answers.
  void Finish() {
    LeaveTheLine();
    reader_.join();
  }
  // Of the K rows of layer 0 that were pinned, those that are not the rows of `tokens`.
  uint64_t WrongPinnedRows(std::span<const uint32_t> tokens) {
    const uint32_t row_bytes = t_.model->geometry().group(0).row_bytes(RowKind::kK);
    uint64_t wrong = 0;
    for (const auto& run : (*rows_)->Runs(0, RowKind::kK)) {
      std::vector<std::byte> bytes(run.num_bytes);
      EXPECT_TRUE(t_.host->pool().Read(run.offset, bytes).ok());
      const std::vector<std::byte> expected = RowOracle::Rows(
          tokens, run.first_token, run.first_token + run.num_tokens, 0, 0, RowKind::kK, row_bytes);
      for (uint32_t i = 0; i < run.num_tokens; ++i) {
        wrong += std::memcmp(bytes.data() + i * row_bytes, expected.data() + i * row_bytes,
                             row_bytes) != 0;
      }
    }
    return wrong;
  }

  MemoryPageStore memory_;
  FaultInjectingPageStore store_{&memory_};
  // Nothing is spilled for the rest of the test once a spill has failed.
  HostUnderTest t_{{.page_tokens = kPageTokens,
                    .num_frames = 2,
                    .write_through = false,
                    .store = &store_,
                    .store_backoff = absl::Hours(1)}};
  SequenceInfo a_;
  absl::StatusOr<std::shared_ptr<const ModelHost::PinnedRows>> rows_;
  absl::StatusOr<AttendOutput> attended_;

 private:
  std::optional<SequenceInfo> blocker_;
  absl::Status blocked_;
  std::thread head_;
  std::thread reader_;
};

// 25 rows: the first page in the store, the other one in a frame that it cannot leave.
class ReadOvertakenByAnAppend : public OvertakenRead {
 protected:
  void SetUp() override {
    const std::vector<uint32_t> tokens = Tokens(0, 25);
    auto filled = t_.OpenAndFill(std::span(tokens).first(24));
    ASSERT_TRUE(filled.ok()) << filled.status();
    ASSERT_TRUE(t_.host->EvictPages(0, t_.Soon()).ok());
    auto stepped = t_.Step(*filled, tokens);  // brings back the tail alone, and changes it
    ASSERT_TRUE(stepped.ok()) << stepped.status();
    a_ = *stepped;
    store_.FailWith(absl::UnavailableError("full"));
    ASSERT_TRUE(t_.host->EvictPages(0, t_.Soon()).ok());
    store_.FailWith(absl::OkStatus());
    ASSERT_EQ(t_.host->Usage().front().free_frames, 1u);
    BlockTheLine();
  }
  // Rows [20, 25) are given up, and their slots written anew.
  void GiveUpAndAppend(uint32_t count) {
    auto cut = t_.host->Rewind(t_.tenant, HandleOf(a_), 20);
    ASSERT_TRUE(cut.ok()) << cut.status();
    now_ = Concat(Tokens(0, 20), Tokens(900, count));
    auto appended = t_.Append(cut->info, now_);
    ASSERT_TRUE(appended.ok()) << appended.status();
    ASSERT_EQ(t_.host->Usage().front().free_frames, 0u) << "it was not written in place";
  }

  std::vector<uint32_t> now_;
};

TEST_F(ReadOvertakenByAnAppend, ReadsTheRowsThatThereAreNow) {
  StartPinRows(0, 0);
  GiveUpAndAppend(2);
  Finish();
  ASSERT_TRUE(rows_.ok()) << rows_.status();
  EXPECT_EQ((*rows_)->end(), 22u);
  EXPECT_EQ(WrongPinnedRows(now_), 0u);
}

TEST_F(ReadOvertakenByAnAppend, ReadsTheNewRowsInTheSameSlots) {
  StartPinRows(0, 0);
  GiveUpAndAppend(5);
  Finish();
  ASSERT_TRUE(rows_.ok()) << rows_.status();
  EXPECT_EQ((*rows_)->end(), 25u);
  EXPECT_EQ(WrongPinnedRows(now_), 0u);
}

TEST_F(ReadOvertakenByAnAppend, IsRefusedRowsThatWereGivenUp) {
  StartPinRows(0, 25);
  GiveUpAndAppend(2);
  Finish();
  EXPECT_TRUE(absl::IsInvalidArgument(rows_.status())) << rows_.status();
}

TEST_F(ReadOvertakenByAnAppend, AttendsToNoRowThatWasGivenUp) {
  StartAttend(24);
  GiveUpAndAppend(2);
  Finish();
  EXPECT_TRUE(absl::IsAborted(attended_.status())) << attended_.status();
  EXPECT_TRUE(AttendAt(21).ok());
}

TEST_F(ReadOvertakenByAnAppend, AttendsToTheNewRowsInTheSameSlots) {
  StartAttend(24);
  GiveUpAndAppend(5);
  Finish();
  ASSERT_TRUE(attended_.ok()) << attended_.status();
  const auto again = AttendAt(24);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(attended_->outputs, again->outputs);
  EXPECT_EQ(attended_->log_sum_exp, again->log_sum_exp);
}

// Two pages of 32 rows, both in the store; an edit puts another page in the place of the second.
class ReadOvertakenByAnEdit : public OvertakenRead {
 protected:
  void SetUp() override {
    auto a = t_.OpenAndFill(Tokens(0, 32));
    ASSERT_TRUE(a.ok()) << a.status();
    a_ = *a;
    // Keeps the page known that `a` gives up.
    auto fork = t_.host->Fork(t_.tenant, HandleOf(a_), std::nullopt, t_.Soon());
    ASSERT_TRUE(fork.ok()) << fork.status();
    ASSERT_TRUE(t_.host->EvictPages(0, t_.Soon()).ok());
    auto donor = t_.OpenAndFill(Tokens(700, 32));
    ASSERT_TRUE(donor.ok()) << donor.status();
    donor_ = *donor;
    ASSERT_TRUE(t_.host->EvictPages(0, t_.Soon()).ok());
    auto held = t_.host->PinRows(t_.tenant, donor_.id, 0, 0, 16, t_.Soon());
    ASSERT_TRUE(held.ok()) << held.status();
    held_ = *std::move(held);
    BlockTheLine();
  }
  void TakeTheSecondPageOfTheDonor() {
    const std::vector<SequenceHandle> both = {HandleOf(a_), HandleOf(donor_)};
    const std::vector<SequenceEdit> edits = {
        RewindEdit{a_.id.number, 16},
        CopyRangeEdit{donor_.id.number, a_.id.number, {16, 32}, false}};
    auto edited = t_.host->Edit(t_.tenant, both, edits);
    ASSERT_TRUE(edited.ok()) << edited.status();
    ASSERT_EQ(edited->infos[0].length, 32u);
    // Not before the write has left the line: it would be granted its frames.
    LeaveTheLine();
    held_.reset();
  }

  SequenceInfo donor_;
  std::shared_ptr<const ModelHost::PinnedRows> held_;  // keeps one of the two frames
};

TEST_F(ReadOvertakenByAnEdit, ReadsThePageThatThereIsNow) {
  StartPinRows(16, 32);
  TakeTheSecondPageOfTheDonor();
  Finish();
  ASSERT_TRUE(rows_.ok()) << rows_.status();
  EXPECT_EQ(WrongPinnedRows(Tokens(700, 32)), 0u);
}

TEST_F(ReadOvertakenByAnEdit, AttendsToNoPageThatIsNotPinned) {
  StartAttend(31);
  TakeTheSecondPageOfTheDonor();
  Finish();
  EXPECT_TRUE(absl::IsAborted(attended_.status())) << attended_.status();
  EXPECT_TRUE(AttendAt(31).ok());
}

}  // namespace
}  // namespace pagetide
