// Bad input: damaged records, and a store that is down or full.
#include <fstream>

#include "kvstore/page_record.h"
#include "tests/integration/bad_input_fixture.h"
#include "tests/kvstore/store_test_util.h"

namespace pagetide::testing {
namespace {

using ::testing::HasSubstr;

// ---- damaged records ---------------------------------------------------------------------------

// Waits until the full pages of `held` are stored, takes their frames away, and answers their keys.
class DamagedRecordTest : public BadInputTest {
 protected:
  std::vector<PageKey> StoreAndEvict(const Held& held, size_t num_full) {
    EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_pages_written_through_total",
                                        static_cast<double>(num_full)));
    EvictAll();
    v1::GetBlockTableRequest request;
    request.set_sequence_id(held.state.sequence_id());
    v1::GetBlockTableResponse table;
    TestContext context;
    EXPECT_TRUE(client_->sequences().GetBlockTable(&context, request, &table).ok());
    std::vector<PageKey> keys;
    for (const auto& extent : table.extents()) {
      EXPECT_EQ(extent.page_state(), "stored");
      if (!extent.page_key().empty()) keys.push_back({*Digest::FromBytes(extent.page_key())});
    }
    EXPECT_EQ(keys.size(), num_full);
    return keys;
  }

  // The sequence is cut to what is valid and says so; another one over the same tokens reuses the
  // same, and is whole again once the rest was computed.
  void ExpectCutTo(const Held& held, uint64_t valid) {
    const auto read = client_->Verify(held.state.sequence_id(), held.tokens, 0, kLength);
    ExpectRefused(read.status(), absl::StatusCode::kFailedPrecondition, "PREFIX_LOST",
                  absl::StrCat(kLength, " tokens became ", valid));
    const auto state = client_->Get(held.state.sequence_id());
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_EQ(state->length(), valid);
    ExpectRowsRight(held, valid);
    v1::PrefixReuse reuse;
    const std::vector<uint32_t> prompt(held.tokens.begin(), held.tokens.begin() + kLength);
    const auto again = OpenAndFill(prompt, &reuse);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(reuse.reused_tokens(), valid);
    const auto bytes = client_->Verify(again->sequence_id(), held.tokens, 0, kLength);
    EXPECT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_prefixes_lost_total", 1));
  }
};

TEST_F(DamagedRecordTest, OneFlippedBitIsAMissNeverWrongBytes) {
  const Held held = Hold();
  const std::vector<PageKey> keys = StoreAndEvict(held, 2);
  ASSERT_EQ(keys.size(), 2u);
  const FoundRecord record = FindStoredRecord(store_dir(), keys[1]);
  ASSERT_FALSE(record.file.empty());
  FlipFileBit(record.file, (record.offset + kPageRecordFixedBytes + 1234) * 8 + 3);
  ExpectCutTo(held, 16);
}

TEST_F(DamagedRecordTest, TwoSwappedValidRecordsAreTwoMisses) {
  const Held held = Hold();
  const std::vector<PageKey> keys = StoreAndEvict(held, 2);
  ASSERT_EQ(keys.size(), 2u);
  const FoundRecord a = FindStoredRecord(store_dir(), keys[0]);
  const FoundRecord b = FindStoredRecord(store_dir(), keys[1]);
  ASSERT_FALSE(a.file.empty());
  ASSERT_FALSE(b.file.empty());
  // The model has no numerics id: both records are of one length.
  const size_t bytes =
      kPageRecordFixedBytes + static_cast<size_t>(model_->geometry().bytes_per_page_of_tokens());
  const auto read = [&](const FoundRecord& at) {
    std::string record(bytes, '\0');
    std::ifstream in(at.file, std::ios::binary);
    in.seekg(static_cast<std::streamoff>(at.offset));
    in.read(record.data(), static_cast<std::streamsize>(bytes));
    EXPECT_TRUE(in.good());
    return record;
  };
  const auto write = [&](const FoundRecord& at, const std::string& record) {
    std::fstream out(at.file, std::ios::in | std::ios::out | std::ios::binary);
    out.seekp(static_cast<std::streamoff>(at.offset));
    out.write(record.data(), static_cast<std::streamsize>(record.size()));
    EXPECT_TRUE(out.good());
  };
  const std::string record_a = read(a), record_b = read(b);
  write(a, record_b);
  write(b, record_a);
  ExpectCutTo(held, 0);
}

// ---- a store that is down, or full -------------------------------------------------------------

TEST_F(BadInputTest, ASpilledSequenceWaitsForAStoreThatIsDown) {
  const Held held = Hold();
  ASSERT_TRUE(client_->EventuallyStat("pagetide_worker_pages_written_through_total", 2));
  EvictAll();
  const std::string before = client_->Get(held.state.sequence_id())->SerializeAsString();
  store_->Kill();
  const auto read = client_->Verify(held.state.sequence_id(), held.tokens, 0, kLength);
  EXPECT_EQ(read.status().code(), absl::StatusCode::kUnavailable) << read.status();
  const auto state = client_->Get(held.state.sequence_id());
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->SerializeAsString(), before);
  const auto fresh = OpenAndFill(Tokens(2, 30));  // new work needs no store
  EXPECT_TRUE(fresh.ok()) << fresh.status();
  ASSERT_NO_FATAL_FAILURE(StartStore());
  // The channel finds the store again after its back-off.
  EXPECT_TRUE(Eventually(
      [&] { return client_->Verify(held.state.sequence_id(), held.tokens, 0, kLength).ok(); }));
  ExpectRowsRight(held, kLength);
}

TEST_F(BadInputTest, AFullStoreStopsSpillsAndNothingElse) {
  const Held held = Hold();
  ASSERT_TRUE(client_->EventuallyStat("pagetide_worker_pages_written_through_total", 2));
  ASSERT_EQ(store_->Terminate().value_or(-1), 0);
  ASSERT_NO_FATAL_FAILURE(StartStore("1024TiB"));  // more than any disk: full from the start
  // Sequences until the frames are full of what nobody can spill.
  std::vector<std::pair<v1::SequenceState, std::vector<uint32_t>>> open;
  absl::Status refused;
  for (uint32_t seed = 100; seed < 140 && refused.ok(); ++seed) {
    const std::vector<uint32_t> tokens = Tokens(seed, 48);
    TestContext context;
    v1::OpenSequenceRequest request;
    request.set_model_digest(model_->digest().ToHex());
    v1::OpenSequenceResponse response;
    const absl::Status opened =
        FromGrpcStatus(client_->sequences().OpenSequence(&context, request, &response));
    ASSERT_TRUE(opened.ok()) << opened;
    v1::SequenceRef ref;
    ref.set_sequence_id(response.state().sequence_id());
    ref.set_epoch(response.state().epoch());
    v1::ReserveSlotsRequest reserve;
    *reserve.add_items()->mutable_sequence() = ref;
    reserve.mutable_items(0)->set_num_tokens(48);
    v1::ReserveSlotsResponse slots;
    reserve.set_request_id(absl::StrCat("reserve-", seed));
    // The answer may come too late for its caller: then it is asked for again.
    ASSERT_TRUE(Eventually([&] {
      TestContext reserve_context(absl::Seconds(1));
      refused =
          FromGrpcStatus(client_->sequences().ReserveSlots(&reserve_context, reserve, &slots));
      return !absl::IsDeadlineExceeded(refused);
    }));
    if (!refused.ok()) break;
    v1::AbortReservationRequest abort;
    abort.set_sequence_id(ref.sequence_id());
    abort.set_epoch(ref.epoch());
    abort.set_reservation_id(slots.slots(0).reservation_id());
    v1::AbortReservationResponse aborted;
    TestContext abort_context;
    ASSERT_TRUE(client_->sequences().AbortReservation(&abort_context, abort, &aborted).ok());
    const auto appended = client_->Append(response.state(), tokens, 48);
    ASSERT_TRUE(appended.ok()) << appended.status();
    open.emplace_back(appended->state(), tokens);
  }
  ExpectRefused(refused, absl::StatusCode::kResourceExhausted, "POOL_EXHAUSTED", "needed 3, free");
  EXPECT_TRUE(GetRetryDelay(refused).has_value());
  EXPECT_GE(open.size(), 4u);
  // Nothing that was acknowledged is lost, and the store still answers reads.
  for (const auto& [state, tokens] : open) {
    const auto bytes = client_->Verify(state.sequence_id(), tokens, 0, tokens.size());
    EXPECT_TRUE(bytes.ok()) << bytes.status();
  }
  for (const auto& [state, tokens] : open) EXPECT_TRUE(client_->Close(state).ok());
  ExpectRowsRight(held, kLength);
  // Room again: spilling resumes.
  ASSERT_EQ(store_->Terminate().value_or(-1), 0);
  ASSERT_NO_FATAL_FAILURE(StartStore());
  const std::vector<uint32_t> tokens = Tokens(200, 64);
  const auto fresh = OpenAndFill(tokens);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_TRUE(Eventually([&] {  // after the back-offs of channel and spiller
    EvictAll();
    return client_->Get(fresh->sequence_id())->resident_pages() == 0;
  }));
  const auto bytes = client_->Verify(fresh->sequence_id(), tokens, 0, 64);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
}

}  // namespace
}  // namespace pagetide::testing
