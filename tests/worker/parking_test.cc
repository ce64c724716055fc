// Parked sequences over ModelHost and the memory store: let go of, taken up elsewhere, taken over.
#include "worker/parking.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "base/status_macros.h"
#include "kvstore/decorating_page_store.h"
#include "tests/worker/session_fixture.h"
#include "worker/sequence_transfer.h"

namespace pagetide {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

MonotonicTime Soon() {
  return HostUnderTest::Soon();
}

// Lets a test act between the pages and the manifest of a park, and when it has given its epoch up.
class HookedStore final : public DecoratingPageStore {
 public:
  explicit HookedStore(PageStore* inner) : DecoratingPageStore(inner) {}
  absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                uint64_t expected_version,
                                                const std::optional<WriteFence>& fence,
                                                MonotonicTime deadline) override {
    if (before_manifest) std::exchange(before_manifest, nullptr)();
    return inner()->PutManifest(manifest, expected_version, fence, deadline);
  }
  absl::StatusOr<uint64_t> CompareAndSetRecord(absl::string_view kind, absl::string_view key,
                                               uint64_t expected_version,
                                               std::optional<absl::string_view> value,
                                               MonotonicTime deadline) override {
    if (!unwritable_key.empty() && key == unwritable_key) {
      return absl::InvalidArgumentError("this record cannot be written");
    }
    const auto set = inner()->CompareAndSetRecord(kind, key, expected_version, value, deadline);
    if (after_take_over && value && absl::StartsWith(*value, "worker/")) {
      std::exchange(after_take_over, nullptr)();
    }
    if (after_give_up && value == "parked") std::exchange(after_give_up, nullptr)();
    return set;
  }
  absl::StatusOr<ManifestRecord> GetManifest(absl::string_view name,
                                             MonotonicTime deadline) override {
    if (on_read) on_read();
    if (fails_next_read.exchange(false)) return absl::UnavailableError("the store is away");
    return inner()->GetManifest(name, deadline);
  }
  std::function<void()> before_manifest;
  std::function<void()> after_take_over;
  std::function<void()> on_read;
  std::atomic<bool> fails_next_read = false;
  std::function<void()> after_give_up;
  std::string unwritable_key;
};

bool WaitFor(const std::atomic<bool>& flag, absl::Duration timeout) {
  const MonotonicTime end = Clock::Real()->MonotonicNow() + timeout;
  while (!flag && Clock::Real()->MonotonicNow() < end) std::this_thread::yield();
  return flag;
}

struct ParkingWorker : SessionWorker {
  ParkingWorker(PageStore* store, const std::string& id, uint64_t incarnation)
      : SessionWorker(store, {.id = id, .incarnation = incarnation}),
        parking({}, &worker(), store, &fence()) {
    sessions = std::make_unique<Sessions>(&worker(), store, &fence(), &parking);
  }
  absl::StatusOr<ParkAnswer> Park(const SequenceInfo& info, bool keep_open = false,
                                  const std::string& request_id = "") {
    return parking.Park(tenant(), host(),
                        {.sequence = {info.id, info.epoch, std::nullopt},
                         .keep_open = keep_open,
                         .request_id = request_id,
                         .request_digest = Sha256Of(request_id)},
                        Soon());
  }
  absl::StatusOr<ResumedSequence> Resume(SequenceId id) {
    return parking.Resume(tenant(), id, /*model_digest=*/"", Soon());
  }
  // As if the process had stood still until its lease ended.
  void LoseLease() { lease().Stop(); }
  void RegainLease() { lease().Step(); }

  Parking parking;
};

class ParkingTest : public ::testing::Test {
 protected:
  SequenceInfo Fill() {
    auto info = a_.engine->OpenAndFill(tokens_);
    EXPECT_TRUE(info.ok()) << info.status();
    return *info;
  }
  uint64_t WrongRows(ParkingWorker& worker, SequenceId id, const std::vector<uint32_t>& tokens) {
    auto wrong = worker.engine->WrongRows(id, tokens);
    EXPECT_TRUE(wrong.ok()) << wrong.status();
    return wrong.value_or(~uint64_t{0});
  }

  // As workers without the store between them do it.
  absl::StatusOr<SequenceInfo> Move(ParkingWorker& from, const SequenceInfo& info,
                                    ParkingWorker& to) {
    PT_ASSIGN_OR_RETURN(const auto source,
                        TransfersOf(*from.host())
                            .BeginOutgoing(from.tenant(), {info.id, info.epoch, std::nullopt},
                                           TransferKind::kMove, "the other", Soon()));
    PT_ASSIGN_OR_RETURN(const auto target,
                        TransfersOf(*to.host()).BeginIncoming(to.tenant(), source->plan(), Soon()));
    PT_RETURN_IF_ERROR(source->ReadPages(target->wanted(), Soon(),
                                         [&](uint32_t page, std::span<const std::byte> body) {
                                           return target->Write(page, 0, body).status();
                                         }));
    PT_ASSIGN_OR_RETURN(const std::optional<SequenceInfo> moved, target->Commit());
    PT_RETURN_IF_ERROR(TransfersOf(*from.host()).CloseMoved(from.tenant(), info.id, info.epoch));
    return *moved;
  }

  MemoryPageStore memory_;
  HookedStore store_{&memory_};
  ParkingWorker a_{&store_, "a", 1};
  ParkingWorker b_{&store_, "b", 2};
  const std::vector<uint32_t> tokens_ = Tokens(100, 70);  // four full pages and 6 rows
};

TEST_F(ParkingTest, AParkedSequenceGoesOnElsewhereUnderItsId) {
  const SequenceInfo info = Fill();
  auto parked = a_.Park(info);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->version, 1u);
  EXPECT_EQ(parked->epoch, 2u);  // nobody's
  EXPECT_FALSE(parked->is_open);
  EXPECT_EQ(parked->pages, 5u);
  EXPECT_EQ(a_.host()->Load().open_sequences, 0u);
  EXPECT_EQ(GetReason(a_.host()->Get(a_.tenant(), info.id).status()), "SEQUENCE_NOT_FOUND");

  auto resumed = b_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(resumed->info.id, info.id);
  EXPECT_EQ(resumed->info.epoch, 3u);
  EXPECT_EQ(resumed->info.length, 70u);
  EXPECT_FALSE(resumed->was_taken_over);
  EXPECT_EQ(WrongRows(b_, info.id, tokens_), 0u);
  const std::vector<uint32_t> longer = Concat(tokens_, Tokens(9000, 30));
  auto appended = b_.engine->Append(resumed->info, longer);
  ASSERT_TRUE(appended.ok()) << appended.status();
  // And back again; only what is new is written.
  parked = b_.Park(*appended);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->version, 2u);
  EXPECT_EQ(parked->epoch, 4u);
  EXPECT_LE(parked->pages_written, 3u);
  resumed = a_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(resumed->info.epoch, 5u);
  EXPECT_EQ(WrongRows(a_, info.id, longer), 0u);
  // Where it is open already the answer is its state.
  auto again = a_.Resume(info.id);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->info.epoch, 5u);
}

TEST_F(ParkingTest, AMovedSequenceIsParkedWhereItIsNow) {
  const SequenceInfo first = Fill();
  auto there = Move(a_, first, b_);
  ASSERT_TRUE(there.ok()) << there.status();
  EXPECT_EQ(there->epoch, 2u);
  EXPECT_EQ(WrongRows(b_, first.id, tokens_), 0u);
  // The store knows neither of its epochs yet, and fails behind the first of them.
  const std::string key = "sequence/" + first.id.ToString();
  store_.after_take_over = [&] { store_.after_take_over = [&] { store_.unwritable_key = key; }; };
  const auto halfway = b_.Park(*there);
  EXPECT_TRUE(absl::IsInvalidArgument(halfway.status())) << halfway.status();
  EXPECT_EQ(GetReason(a_.Resume(first.id).status()), "SEQUENCE_NOT_FOUND");
  store_.unwritable_key.clear();
  // Another worker, by another move, goes on from there.
  auto back = Move(b_, *there, a_);
  ASSERT_TRUE(back.ok()) << back.status();
  auto parked = a_.Park(*back);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->epoch, 4u);
  auto resumed = b_.Resume(first.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(resumed->info.epoch, 5u);
  EXPECT_EQ(WrongRows(b_, first.id, tokens_), 0u);
  const std::vector<uint32_t> longer = Concat(tokens_, Tokens(9000, 30));
  ASSERT_TRUE(b_.engine->Append(resumed->info, longer).ok());
  EXPECT_EQ(WrongRows(b_, first.id, longer), 0u);
}

TEST_F(ParkingTest, AParkOfAMovedSequenceIsRetriedHalfway) {
  auto there = Move(a_, Fill(), b_);
  ASSERT_TRUE(there.ok()) << there.status();
  auto back = Move(b_, *there, a_);
  ASSERT_TRUE(back.ok()) << back.status();
  ASSERT_EQ(back->epoch, 3u);
  store_.after_take_over = [&] {
    store_.after_take_over = [&] { store_.unwritable_key = "sequence/" + back->id.ToString(); };
  };
  ASSERT_FALSE(a_.Park(*back).ok());
  store_.unwritable_key.clear();
  auto parked = a_.Park(*back, /*keep_open=*/true);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->epoch, 3u);
  EXPECT_TRUE(a_.parking.Owns(back->id));
  EXPECT_EQ(WrongRows(a_, back->id, tokens_), 0u);
}

TEST_F(ParkingTest, AfterATakeoverEveryDurableWriteOfTheOldOwnerIsRefused) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info, /*keep_open=*/true).ok());
  a_.LoseLease();
  auto taken = b_.Resume(info.id);
  ASSERT_TRUE(taken.ok()) << taken.status();
  EXPECT_TRUE(taken->was_taken_over);
  EXPECT_EQ(taken->info.epoch, 2u);
  // Without its lease the old owner writes nothing; with a new one it writes, but not this
  // sequence.
  EXPECT_TRUE(absl::IsUnavailable(a_.Park(info, true).status()));
  a_.RegainLease();
  const absl::Status saved = a_.Save(info, "chat").status();
  EXPECT_EQ(GetReason(saved), error_reason::kStaleEpoch) << saved;
  EXPECT_EQ(GetReason(a_.sessions->Peek(a_.tenant(), "chat", Soon()).status()),
            "SESSION_NOT_FOUND");
  // It has learnt of it: its copy is closed.
  EXPECT_EQ(GetReason(a_.Park(info, true).status()), "SEQUENCE_NOT_FOUND");
  EXPECT_FALSE(a_.parking.Owns(info.id));
  auto other = a_.engine->OpenAndFill(Tokens(5000, 20));
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_TRUE(a_.Save(*other, "other").ok());
  // The new owner is not disturbed.
  EXPECT_EQ(WrongRows(b_, info.id, tokens_), 0u);
  EXPECT_TRUE(b_.Save(taken->info, "chat").ok());
}

TEST_F(ParkingTest, AParkThatIsOvertakenWhileItRunsIsRefusedByTheStore) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info, true).ok());
  auto longer = a_.engine->Append(info, Concat(tokens_, Tokens(9000, 8)));
  ASSERT_TRUE(longer.ok()) << longer.status();
  // The old owner stands still between its pages and its manifest; its lease ends meanwhile.
  store_.before_manifest = [&] {
    a_.LoseLease();
    auto taken = b_.Resume(info.id);
    ASSERT_TRUE(taken.ok()) << taken.status();
    EXPECT_EQ(taken->info.length, 70u);
  };
  const absl::Status stale = a_.Park(*longer, true).status();
  EXPECT_EQ(GetReason(stale), error_reason::kStaleEpoch) << stale;
  EXPECT_EQ(
      memory_.GetManifest(absl::StrCat("parked/default/", info.id.ToString()), Soon())->version,
      1u);
}

TEST_F(ParkingTest, ATakeoverFencesOffWhateverTheDeadWorkerHadUnderWay) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info, true).ok());
  auto other = a_.engine->OpenAndFill(Tokens(5000, 20));  // never parked: the worker's fence
  ASSERT_TRUE(other.ok()) << other.status();
  store_.before_manifest = [&] {
    a_.LoseLease();
    ASSERT_TRUE(b_.Resume(info.id).ok());
  };
  const absl::Status stale = a_.Save(*other, "late").status();
  EXPECT_EQ(GetReason(stale), error_reason::kStaleEpoch) << stale;
  a_.RegainLease();
  EXPECT_TRUE(a_.Save(*other, "late").ok());
}

TEST_F(ParkingTest, ASequenceOfALivingWorkerIsNotTaken) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info, true).ok());
  const absl::Status refused = b_.Resume(info.id).status();
  EXPECT_EQ(GetReason(refused), error_reason::kSequenceMoved) << refused;
  EXPECT_EQ(GetReasonMetadata(refused, "worker_id"), "a");
  EXPECT_EQ(b_.host()->Load().open_sequences, 0u);
  auto parked = a_.Park(info, true);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->epoch, 1u);
  EXPECT_EQ(parked->version, 2u);
}

TEST_F(ParkingTest, ALaterLifeOfAWorkerTakesUpWhatTheEarlierOneHad) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info, true).ok());
  a_.LoseLease();
  ParkingWorker next(&store_, "a", 77);
  auto taken = next.Resume(info.id);
  ASSERT_TRUE(taken.ok()) << taken.status();
  EXPECT_TRUE(taken->was_taken_over);
  EXPECT_EQ(WrongRows(next, info.id, tokens_), 0u);
}

TEST_F(ParkingTest, OfManyWhoResumeOneWins) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info).ok());
  ParkingWorker c(&store_, "c", 3);
  std::atomic<int> won{0};
  std::vector<std::thread> threads;
  for (ParkingWorker* worker : {&b_, &c, &a_}) {
    threads.emplace_back([&, worker] {
      const auto resumed = worker->Resume(info.id);
      if (resumed.ok()) {
        ++won;
        return;
      }
      EXPECT_TRUE(absl::IsAborted(resumed.status()) ||
                  GetReason(resumed.status()) == error_reason::kSequenceMoved)
          << resumed.status();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(won, 1);
  EXPECT_EQ(a_.host()->Load().open_sequences + b_.host()->Load().open_sequences +
                c.host()->Load().open_sequences,
            1u);
  EXPECT_EQ(
      memory_.GetRecord(kOwnerRecordKind, absl::StrCat("sequence/", info.id.ToString()), Soon())
          ->version,
      3u);
}

// The second must not take the sequence over from the first, of the same worker, that is opening
// it.
TEST_F(ParkingTest, TwoResumesOnOneWorkerAreOne) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info).ok());
  std::atomic<bool> is_second_reading = false;
  absl::StatusOr<ResumedSequence> second = absl::UnknownError("never ran");
  std::thread other;
  store_.after_take_over = [&] {
    // Its own thread is the only one that reads while the first waits here.
    store_.on_read = [&] { is_second_reading = true; };
    other = std::thread([&] { second = b_.Resume(info.id); });
    EXPECT_FALSE(WaitFor(is_second_reading, absl::Milliseconds(200)));
    store_.on_read = nullptr;
  };
  const auto first = b_.Resume(info.id);
  other.join();
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->info.epoch, first->info.epoch);
  const std::vector<uint32_t> longer = Concat(tokens_, Tokens(9000, 30));
  auto appended = b_.engine->Append(first->info, longer);
  ASSERT_TRUE(appended.ok()) << appended.status();
  const auto parked = b_.Park(*appended);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->tokens, 100u);
}

// A refusal leaves the state as it was: others can resume what one could not open.
TEST_F(ParkingTest, AResumeThatCannotOpenGivesTheSequenceBack) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info).ok());
  store_.after_take_over = [&] { store_.fails_next_read = true; };
  EXPECT_EQ(b_.Resume(info.id).status().code(), absl::StatusCode::kUnavailable);
  auto resumed = a_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(WrongRows(a_, info.id, tokens_), 0u);
  ASSERT_TRUE(a_.Park(resumed->info).ok());

  // Nor can it be given back at once.
  store_.after_take_over = [&] {
    store_.fails_next_read = true;
    store_.unwritable_key = absl::StrCat("sequence/", info.id.ToString());
  };
  EXPECT_EQ(b_.Resume(info.id).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(GetReason(a_.Resume(info.id).status()), "SEQUENCE_MOVED");
  store_.unwritable_key.clear();
  b_.parking.GiveUpIdle(Soon());
  resumed = a_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(WrongRows(a_, info.id, tokens_), 0u);
}

TEST_F(ParkingTest, EditsTellAResumedSequenceFromOneOfTheSameNumber) {
  const SequenceInfo info = Fill();
  auto own = b_.engine->OpenAndFill(Tokens(5000, 20));
  ASSERT_TRUE(own.ok()) << own.status();
  ASSERT_EQ(own->id.number, info.id.number) << "the ids differ in their incarnations only";
  ASSERT_TRUE(a_.Park(info).ok());
  auto resumed = b_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_NE(resumed->info.number, own->number);
  const SequenceHandle handle{info.id, resumed->info.epoch, std::nullopt};
  const SequenceEdit remove = RemoveRangeEdit{b_.host()->NumberOf(info.id), {20, 30}};
  auto edited = b_.host()->Edit(b_.tenant(), {&handle, 1}, {&remove, 1});
  ASSERT_TRUE(edited.ok()) << edited.status();
  EXPECT_EQ(edited->infos.front().length, 60u);
  auto rewound = b_.host()->Rewind(b_.tenant(), handle, 50);
  ASSERT_TRUE(rewound.ok()) << rewound.status();
  EXPECT_EQ(rewound->info.length, 50u);
  EXPECT_EQ(b_.host()->Get(b_.tenant(), own->id)->length, 20u);
  // An edited sequence is parked as it is.
  auto parked = b_.Park(rewound->info);
  ASSERT_TRUE(parked.ok()) << parked.status();
  auto back = a_.Resume(info.id);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->info.length, 50u);
  EXPECT_LT(back->info.canonical_length, 50u);
}

TEST_F(ParkingTest, AChangeWhileItIsParkedKeepsItOpen) {
  const SequenceInfo info = Fill();
  const std::vector<uint32_t> longer = Concat(tokens_, Tokens(9000, 8));
  store_.before_manifest = [&] {
    auto appended = a_.engine->Append(info, longer);
    ASSERT_TRUE(appended.ok()) << appended.status();
  };
  const absl::Status changed = a_.Park(info).status();
  EXPECT_EQ(GetReason(changed), "REVISION_MISMATCH") << changed;
  EXPECT_EQ(WrongRows(a_, info.id, longer), 0u);
  auto parked = a_.Park(info);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->tokens, longer.size());
}

TEST_F(ParkingTest, AParkThatWasSlowDoesNotOverwriteALaterOne) {
  const SequenceInfo info = Fill();
  const std::vector<uint32_t> longer = Concat(tokens_, Tokens(9000, 100));
  store_.before_manifest = [&] {
    auto appended = a_.engine->Append(info, longer);
    ASSERT_TRUE(appended.ok()) << appended.status();
    auto later = a_.Park(*appended, /*keep_open=*/true);
    ASSERT_TRUE(later.ok()) << later.status();
    EXPECT_EQ(later->version, 1u);
  };
  auto parked = a_.Park(info, /*keep_open=*/true);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->version, 2u);
  EXPECT_EQ(parked->tokens, longer.size());
  a_.LoseLease();
  auto resumed = b_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(resumed->info.length, longer.size());
  EXPECT_EQ(WrongRows(b_, info.id, longer), 0u);
}

TEST_F(ParkingTest, AParkThatWasSlowDoesNotOverwriteTheOnlyCopy) {
  const SequenceInfo info = Fill();
  const std::vector<uint32_t> longer = Concat(tokens_, Tokens(9000, 100));
  store_.before_manifest = [&] {
    auto appended = a_.engine->Append(info, longer);
    ASSERT_TRUE(appended.ok()) << appended.status();
    auto later = a_.Park(*appended);
    ASSERT_TRUE(later.ok()) << later.status();
    EXPECT_FALSE(later->is_open);
  };
  EXPECT_FALSE(a_.Park(info, /*keep_open=*/true).ok());
  auto resumed = b_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(WrongRows(b_, info.id, longer), 0u);
}

TEST_F(ParkingTest, AResumeWhileItIsBeingGivenUpStaysTheOwner) {
  const SequenceInfo info = Fill();
  store_.after_give_up = [&] {
    auto resumed = a_.Resume(info.id);
    ASSERT_TRUE(resumed.ok()) << resumed.status();
    EXPECT_EQ(resumed->info.epoch, 3u);
  };
  ASSERT_TRUE(a_.Park(info).ok());
  EXPECT_TRUE(a_.parking.Owns(info.id));
  auto fence = a_.parking.FenceOf({info.id, 3, std::nullopt}, Soon());
  ASSERT_TRUE(fence.ok()) << fence.status();
  EXPECT_EQ(fence->epoch, 3u);
  EXPECT_NE(fence->ownership_key, a_.fence().Get(Soon())->ownership_key);
}

TEST_F(ParkingTest, WhoComesWithAnEarlierEpochClosesNothing) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info).ok());
  ASSERT_TRUE(a_.Resume(info.id).ok());
  EXPECT_EQ(GetReason(a_.Park(info).status()), error_reason::kStaleEpoch);
  a_.parking.NoteStale({absl::StrCat("sequence/", info.id.ToString()), info.epoch});
  EXPECT_TRUE(a_.parking.Owns(info.id));
  EXPECT_EQ(WrongRows(a_, info.id, tokens_), 0u);
}

// It once got the fence of the one who may write, whose sequence was then closed as overtaken.
TEST_F(ParkingTest, ASaveOrCheckpointWithAnEarlierEpochClosesNothing) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info).ok());
  const auto resumed = a_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  const std::vector<uint32_t> longer = Concat(tokens_, Tokens(9000, 30));
  const auto appended = a_.engine->Append(resumed->info, longer);
  ASSERT_TRUE(appended.ok()) << appended.status();
  const absl::Status saved = a_.Save(info, "late").status();
  EXPECT_EQ(GetReason(saved), error_reason::kStaleEpoch) << saved;
  EXPECT_EQ(GetReasonMetadata(saved, "epoch"), absl::StrCat(resumed->info.epoch));
  const absl::Status checkpoint =
      a_.sessions
          ->CreateCheckpoint(a_.tenant(), a_.host(), {info.id, info.epoch, std::nullopt},
                             {.tier = Tier::kStore}, Soon())
          .status();
  EXPECT_EQ(GetReason(checkpoint), error_reason::kStaleEpoch) << checkpoint;
  // Open as it was, with the rows that only this copy has.
  EXPECT_TRUE(a_.parking.Owns(info.id));
  EXPECT_EQ(WrongRows(a_, info.id, longer), 0u);
  EXPECT_TRUE(a_.Save(*appended, "chat").ok());
}

TEST_F(ParkingTest, APendingWriteIsNotParkedAway) {
  const SequenceInfo info = Fill();
  const ReserveItem item{{info.id, info.epoch, std::nullopt}, 1};
  auto slots = a_.host()->Reserve(a_.tenant(), {&item, 1}, absl::Seconds(30), false, Soon());
  ASSERT_TRUE(slots.ok()) << slots.status();
  EXPECT_EQ(GetReason(a_.Park(info).status()), error_reason::kPendingWrite);
  EXPECT_EQ(memory_.GetStats(Soon())->manifests, 0u);
  // What is committed can be made durable meanwhile.
  EXPECT_TRUE(a_.Park(info, /*keep_open=*/true).ok());
}

TEST_F(ParkingTest, DroppingNeedsTheEpochAndTheTenant) {
  const SequenceInfo info = Fill();
  auto parked = a_.Park(info);
  ASSERT_TRUE(parked.ok()) << parked.status();
  const Tenant other{"other", DeriveTenantSalt("secret", "other")};
  EXPECT_EQ(GetReason(b_.parking.Resume(other, info.id, "", Soon()).status()),
            "SEQUENCE_NOT_FOUND");
  EXPECT_FALSE(b_.parking.Drop(b_.tenant(), info.id, parked->epoch - 1, Soon()).value());
  EXPECT_FALSE(b_.parking.Drop(other, info.id, parked->epoch, Soon()).value());
  EXPECT_EQ(memory_.GetStats(Soon())->manifests, 1u);
  EXPECT_TRUE(b_.parking.Drop(b_.tenant(), info.id, parked->epoch, Soon()).value());
  EXPECT_EQ(memory_.GetStats(Soon())->manifests, 0u);
  EXPECT_EQ(GetReason(b_.Resume(info.id).status()), "SEQUENCE_NOT_FOUND");
  EXPECT_FALSE(b_.parking.Drop(b_.tenant(), info.id, parked->epoch, Soon()).value());
}

TEST_F(ParkingTest, AWorkerThatComesBackClosesWhatWasTaken) {
  const SequenceInfo info = Fill();
  auto kept = a_.engine->OpenAndFill(Tokens(5000, 20));
  ASSERT_TRUE(kept.ok()) << kept.status();
  ASSERT_TRUE(a_.Park(info, true).ok());
  ASSERT_TRUE(a_.Park(*kept, true).ok());
  a_.LoseLease();
  ASSERT_TRUE(b_.Resume(info.id).ok());
  a_.RegainLease();
  a_.parking.CheckOwned(Soon());
  EXPECT_EQ(GetReason(a_.host()->Get(a_.tenant(), info.id).status()), "SEQUENCE_NOT_FOUND");
  EXPECT_TRUE(a_.host()->Get(a_.tenant(), kept->id).ok());
  EXPECT_TRUE(a_.Park(*kept).ok());
}

TEST_F(ParkingTest, WhatWasParkedOfAnIdleSequenceCanBeResumedElsewhereAtOnce) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info, /*keep_open=*/true).ok());
  a_.parking.GiveUpIdle(Soon());  // nothing is idle yet
  EXPECT_TRUE(a_.parking.Owns(info.id));
  // The worker closes it because no call was made on it.
  ASSERT_TRUE(a_.host()->Close(a_.tenant(), info.id, info.epoch).ok());
  a_.parking.NoteIdle(info.id, info.epoch);
  EXPECT_EQ(GetReason(b_.Resume(info.id).status()), error_reason::kSequenceMoved)
      << "its record still names a living worker";
  a_.parking.GiveUpIdle(Soon());
  EXPECT_FALSE(a_.parking.Owns(info.id));
  const auto resumed = b_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_FALSE(resumed->was_taken_over);
  EXPECT_EQ(WrongRows(b_, info.id, tokens_), 0u);
}

TEST_F(ParkingTest, AnIdleSequenceThatCannotBeGivenUpDoesNotHoldUpTheOthers) {
  std::vector<SequenceInfo> idle;
  for (uint32_t i = 0; i < 8; ++i) {
    auto info = a_.engine->OpenAndFill(Tokens(1000 * (i + 1), 10));
    ASSERT_TRUE(info.ok()) << info.status();
    ASSERT_TRUE(a_.Park(*info, /*keep_open=*/true).ok());
    ASSERT_TRUE(a_.host()->Close(a_.tenant(), info->id, info->epoch).ok());
    a_.parking.NoteIdle(info->id, info->epoch);
    idle.push_back(*info);
  }
  store_.unwritable_key = absl::StrCat("sequence/", idle[3].id.ToString());
  a_.parking.GiveUpIdle(Soon());
  for (size_t i = 0; i < idle.size(); ++i) EXPECT_EQ(a_.parking.Owns(idle[i].id), i == 3) << i;
  store_.unwritable_key.clear();
  a_.parking.GiveUpIdle(Soon());
  EXPECT_FALSE(a_.parking.Owns(idle[3].id));
}

TEST_F(ParkingTest, AnIdleSequenceThatWasResumedHereMeanwhileIsNotGivenUp) {
  const SequenceInfo info = Fill();
  ASSERT_TRUE(a_.Park(info, /*keep_open=*/true).ok());
  ASSERT_TRUE(a_.host()->Close(a_.tenant(), info.id, info.epoch).ok());
  a_.parking.NoteIdle(info.id, info.epoch);
  const auto resumed = a_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  a_.parking.NoteIdle(info.id, info.epoch);  // late: that epoch is over
  a_.parking.GiveUpIdle(Soon());
  EXPECT_TRUE(a_.parking.Owns(info.id));
  EXPECT_TRUE(a_.Park(resumed->info, /*keep_open=*/true).ok()) << "its epoch still holds";
}

TEST_F(ParkingTest, AResumedSequenceBeginsWithoutCheckpoints) {
  const SequenceInfo info = Fill();
  for (const Tier tier : {Tier::kDevice, Tier::kHost, Tier::kStore}) {
    const auto made = a_.sessions->CreateCheckpoint(
        a_.tenant(), a_.host(), {info.id, info.epoch, std::nullopt}, {.tier = tier}, Soon());
    ASSERT_TRUE(made.ok()) << made.status();
  }
  const auto num_stored = [&] {
    return memory_.ListManifests("checkpoint/", "", 10, Soon()).value().size();
  };
  EXPECT_EQ(num_stored(), 1u);
  ASSERT_TRUE(a_.Park(info).ok());
  const auto resumed = b_.Resume(info.id);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_TRUE(b_.host()->ListCheckpoints(b_.tenant(), info.id)->empty());
  EXPECT_EQ(WrongRows(b_, info.id, tokens_), 0u);
  // Nothing stays behind in the store.
  a_.host()->Tick();
  a_.host()->Quiesce();
  EXPECT_EQ(num_stored(), 0u);
}

TEST_F(ParkingTest, ARetryGetsTheFirstAnswer) {
  const SequenceInfo info = Fill();
  auto parked = a_.Park(info, false, "r1");
  ASSERT_TRUE(parked.ok()) << parked.status();
  ParkRequest again{.request_id = "r1", .request_digest = Sha256Of("r1")};
  auto found = b_.parking.FindAnswer(b_.tenant(), info.id, again, Soon());
  ASSERT_TRUE(found.ok()) << found.status();
  ASSERT_TRUE(found->has_value());
  EXPECT_EQ((*found)->epoch, parked->epoch);
  EXPECT_EQ((*found)->version, 1u);
  EXPECT_FALSE((*found)->is_open);
  again.request_digest = Sha256Of("something else");
  EXPECT_EQ(GetReason(b_.parking.FindAnswer(b_.tenant(), info.id, again, Soon()).status()),
            "REQUEST_ID_REUSED");
}

TEST_F(ParkingTest, RefusalsNameWhatIsWrong) {
  const SequenceInfo info = Fill();
  ParkRequest request{.sequence = {info.id, info.epoch, std::nullopt}, .ttl = -absl::Seconds(1)};
  absl::Status status = a_.parking.Park(a_.tenant(), a_.host(), request, Soon()).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("ttl is -1s, must be above 0"));
  request.ttl.reset();
  request.sequence.epoch = 8;
  EXPECT_EQ(GetReason(a_.parking.Park(a_.tenant(), a_.host(), request, Soon()).status()),
            error_reason::kStaleEpoch);
  EXPECT_EQ(GetReason(b_.Resume({1, 99}).status()), "SEQUENCE_NOT_FOUND");
  // A record that names no worker is damage, not an invitation.
  ASSERT_TRUE(a_.Park(info).ok());
  ASSERT_TRUE(memory_
                  .CompareAndSetRecord(kOwnerRecordKind,
                                       absl::StrCat("sequence/", info.id.ToString()), 2, "nonsense",
                                       Soon())
                  .ok());
  EXPECT_TRUE(absl::IsDataLoss(b_.Resume(info.id).status()));
}

}  // namespace
}  // namespace pagetide
