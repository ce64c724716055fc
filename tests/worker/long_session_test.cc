// Sessions of more tokens than a manifest holds.
#include <gtest/gtest.h>

#include "tests/worker/session_fixture.h"
#include "worker/parking.h"

namespace pagetide {
namespace {

TEST(LongSessionTest, IsRefusedBeforeAPageIsSent) {
  constexpr uint32_t kPageTokens = 16384;
  constexpr uint32_t kPages = 48;  // 786,432 tokens: 3 MiB without their pages
  MemoryPageStore store;
  SessionWorker a(&store, {.page_tokens = kPageTokens, .num_frames = 50, .write_through = false});
  const std::vector<uint32_t> tokens = Tokens(0, kPages * kPageTokens);
  const SequenceInfo opened = a.host()->Open(a.tenant(), {}, {}, {})->info;
  const SequenceHandle handle{opened.id, opened.epoch, std::nullopt};
  const auto slot =
      a.host()->BeginAppend(a.tenant(), handle, "a", 0, tokens, {}, false, HostUnderTest::Soon());
  ASSERT_TRUE(slot.ok()) << slot.status();
  const GroupGeometry& geometry = a.host()->model().geometry().group(0);
  for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      const RowRun run{0, layer, kind, 0, slot->num_tokens};
      ASSERT_TRUE(a.host()
                      ->WriteRows(a.tenant(), opened.id, slot->pending_id, run,
                                  tokens.size() * geometry.row_bytes(kind),
                                  [](uint64_t, std::span<std::byte>) {})
                      .ok());
    }
  }
  ASSERT_TRUE(a.host()->Commit(a.tenant(), handle, slot->pending_id, {}).ok());
  const absl::Status saved = a.Save(opened, "s").status();
  EXPECT_TRUE(absl::IsInvalidArgument(saved)) << saved;
  EXPECT_EQ(GetReason(saved), "SESSION_TOO_LONG") << saved;
  Parking parking({}, &a.worker(), &store, &a.fence());
  const absl::Status parked =
      parking.Park(a.tenant(), a.host(), {.sequence = handle}, HostUnderTest::Soon()).status();
  EXPECT_EQ(GetReason(parked), "SESSION_TOO_LONG") << parked;
  EXPECT_TRUE(a.host()->Has(opened.id));
  EXPECT_EQ(store.GetStats(HostUnderTest::Soon())->pages_put, 0u);
  // Some tokens less leave 20 KiB for metadata.
  SaveRequest request = a.Request(opened, "s");
  request.keep_tokens = 780'000;
  request.metadata["notes"] = std::string(30'000, 'n');
  const absl::Status annotated =
      a.sessions->Save(a.tenant(), a.host(), request, HostUnderTest::Soon()).status();
  EXPECT_EQ(GetReason(annotated), "SESSION_TOO_LONG") << annotated;
  EXPECT_EQ(store.GetStats(HostUnderTest::Soon())->pages_put, 0u);
  // With less of it they are saved, and loaded.
  request.metadata["notes"].resize(10'000);
  const auto some = a.sessions->Save(a.tenant(), a.host(), request, HostUnderTest::Soon());
  ASSERT_TRUE(some.ok()) << some.status();
  const auto loaded = a.Load("s");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->open.info.length, 780'000u);
  a.host()->Quiesce();
}

}  // namespace
}  // namespace pagetide
