// Saved states and checkpoints of edited sequences: they come back as they were, and nothing of
// them is found by a prefix that it is not.
#include <gtest/gtest.h>

#include <string>

#include "core/keys.h"
#include "tests/worker/session_fixture.h"

namespace pagetide {
namespace {

SequenceHandle HandleOf(const SequenceInfo& info) {
  return {info.id, info.epoch, std::nullopt};
}

absl::StatusOr<SequenceInfo> EditOne(HostUnderTest& t, const SequenceInfo& info,
                                     const SequenceEdit& edit) {
  const SequenceHandle handle = HandleOf(info);
  auto result = t.host->Edit(t.tenant, {&handle, 1}, {&edit, 1});
  if (!result.ok()) return result.status();
  return result->infos.front();
}

// All rows of a sequence, layer by layer; what the error is if they cannot be read.
std::string RowsOf(HostUnderTest& t, SequenceId id) {
  std::string all;
  for (uint32_t g = 0; g < t.model->geometry().num_groups(); ++g) {
    auto rows = t.host->PinRows(t.tenant, id, g, 0, 0, HostUnderTest::Soon());
    if (!rows.ok()) return rows.status().ToString();
    for (uint32_t layer = 0; layer < t.model->geometry().group(g).num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        for (const auto& run : (*rows)->Runs(layer, kind)) {
          std::vector<std::byte> bytes(run.num_bytes);
          if (!t.host->pool().Read(run.offset, bytes).ok()) return "unreadable";
          all.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        }
      }
    }
  }
  return all;
}

TEST(EditedSessionTest, ComesBackOnAnotherWorkerAndIsNotFoundByItsTokens) {
  for (int num_groups : {1, 2}) {
    MemoryPageStore store;
    const std::vector<uint32_t> tokens = Tokens(100, 70);
    std::vector<uint32_t> kept(tokens.begin(), tokens.begin() + 20);
    kept.insert(kept.end(), tokens.begin() + 30, tokens.end());
    std::string rows;
    {
      SessionWorker a(&store, {.num_groups = num_groups});
      auto info = a.engine->OpenAndFill(tokens);
      ASSERT_TRUE(info.ok()) << info.status();
      info = EditOne(*a.engine, *info, RemoveRangeEdit{info->id.number, {20, 30}});
      ASSERT_TRUE(info.ok()) << info.status();
      auto saved = a.Save(*info, "edited");
      ASSERT_TRUE(saved.ok()) << saved.status();
      EXPECT_EQ(saved->tokens, 60u);
      rows = RowsOf(*a.engine, info->id);
    }
    SessionWorker b(&store, {.id = "b", .incarnation = 2, .num_groups = num_groups});
    auto loaded = b.Load("edited");
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_EQ(loaded->session.state.canonical_length, 20u);
    EXPECT_EQ(loaded->session.state.tokens, kept);
    ASSERT_EQ(loaded->session.state.positions.size(), 60u);
    EXPECT_EQ(loaded->session.state.positions[19], 19);
    EXPECT_EQ(loaded->session.state.positions[20], 30);
    EXPECT_EQ(loaded->open.info.length, 60u);
    EXPECT_EQ(loaded->open.info.canonical_length, 20u);
    EXPECT_EQ(loaded->open.info.end_position, 70);
    EXPECT_EQ(RowsOf(*b.engine, loaded->open.info.id), rows);
    // Pages that fill behind it are nobody else's.
    std::vector<uint32_t> longer = Concat(kept, Tokens(9000, 40));
    auto slot = b.host()->BeginAppend(b.tenant(), HandleOf(loaded->open.info), "a", 60,
                                      Tokens(9000, 40), {}, false, HostUnderTest::Soon());
    ASSERT_TRUE(slot.ok()) << slot.status();
    EXPECT_EQ(slot->first_position, 70u);
    ASSERT_TRUE(b.engine->WriteAll(*slot, Concat(Tokens(0, 70), Tokens(9000, 40))).ok());
    auto appended = b.host()->Commit(b.tenant(), HandleOf(loaded->open.info), slot->pending_id, {});
    ASSERT_TRUE(appended.ok()) << appended.status();
    EXPECT_EQ(appended->info.canonical_length, 20u);
    PrefixReuse reuse;
    auto other = b.engine->OpenAndFill(longer, &reuse);
    ASSERT_TRUE(other.ok()) << other.status();
    EXPECT_LE(reuse.reused_tokens, 20u);
    EXPECT_EQ(*b.engine->WrongRows(other->id, longer), 0u);
    // Its canonical rows alone are a canonical sequence.
    auto front = b.Load("edited", 20);
    ASSERT_TRUE(front.ok()) << front.status();
    EXPECT_EQ(front->open.info.canonical_length, 20u);
    EXPECT_EQ(front->open.info.end_position, 20);
    EXPECT_EQ(*b.engine->WrongRows(front->open.info.id,
                                   std::vector<uint32_t>(kept.begin(), kept.begin() + 20)),
              0u);
  }
}

TEST(EditedSessionTest, ACutSaveOfAnEditedSequenceIsCanonicalIfItsRowsAre) {
  MemoryPageStore store;
  SessionWorker a(&store, {});
  const std::vector<uint32_t> tokens = Tokens(100, 70);
  auto info = a.engine->OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  info = EditOne(*a.engine, *info, RemoveRangeEdit{info->id.number, {40, 50}});
  ASSERT_TRUE(info.ok()) << info.status();
  SaveRequest request = a.Request(*info, "front");
  request.keep_tokens = 36;
  ASSERT_TRUE(a.sessions->Save(a.tenant(), a.host(), request, HostUnderTest::Soon()).ok());
  auto loaded = a.Load("front");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->session.state.canonical_length, 36u);
  EXPECT_TRUE(loaded->session.state.positions.empty());
  const std::vector<uint32_t> front(tokens.begin(), tokens.begin() + 36);
  EXPECT_EQ(*a.engine->WrongRows(loaded->open.info.id, front), 0u);
}

// A save once named a keyed page of another sequence by the tokens that stood in its place.
TEST(EditedSessionTest, AKeyedPageInAnotherPlaceIsNotOfferedByTheTokensThere) {
  MemoryPageStore store;
  const std::vector<uint32_t> x = Tokens(100, 10), y = Tokens(5000, 16);
  const std::vector<uint32_t> both = Concat(x, y);
  {
    SessionWorker a(&store, {.write_through = false});
    auto to = a.engine->OpenAndFill(x);
    auto from = a.engine->OpenAndFill(y);
    ASSERT_TRUE(to.ok() && from.ok());
    const std::vector<SequenceHandle> handles = {HandleOf(*to), HandleOf(*from)};
    const std::vector<SequenceEdit> edits = {
        ShiftPositionsEdit{from->id.number, {0, -1}, 10, OnShared::kCopy, false},
        CopyRangeEdit{from->id.number, to->id.number, {0, -1}, false}};
    auto edited = a.host()->Edit(a.tenant(), handles, edits);
    ASSERT_TRUE(edited.ok()) << edited.status();
    EXPECT_EQ(edited->infos[0].length, 26u);
    EXPECT_EQ(edited->infos[0].canonical_length, 10u);
    ASSERT_TRUE(a.Save(edited->infos[0], "both").ok());
    const PartialQuery query{RootPrefixKey(a.tenant().salt, a.engine->model->identity(), 16),
                             a.engine->model->geometry().group(0).fingerprint(), both};
    auto found = store.FindPartialPages({&query, 1}, HostUnderTest::Soon());
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ(found->front().common_tokens, 0u);
  }
  SessionWorker b(&store, {.id = "b", .incarnation = 2});
  auto info = b.engine->OpenAndFill(both);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(*b.engine->WrongRows(info->id, both), 0u);
}

TEST(EditedSessionTest, ACheckpointBringsBackAnEditedSequenceAndOneFromBeforeItsEdit) {
  HostUnderTest t({.num_groups = 2});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  auto before = t.host->CreateCheckpoint(t.tenant, HandleOf(*info), {}, HostUnderTest::Soon());
  ASSERT_TRUE(before.ok()) << before.status();
  auto edited = EditOne(t, *info, RemoveRangeEdit{info->id.number, {5, 12}});
  ASSERT_TRUE(edited.ok()) << edited.status();
  const std::string rows = RowsOf(t, info->id);
  auto after = t.host->CreateCheckpoint(t.tenant, HandleOf(*info), {}, HostUnderTest::Soon());
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->length, 33u);
  ASSERT_TRUE(t.host->Clear(t.tenant, HandleOf(*info), /*zero_data=*/true).ok());

  auto restored =
      t.host->RestoreCheckpoint(t.tenant, HandleOf(*info), before->id, HostUnderTest::Soon());
  ASSERT_TRUE(restored.ok()) << restored.status();
  EXPECT_EQ(restored->canonical_length, 40u);
  EXPECT_EQ(restored->end_position, 40);
  EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
  restored = t.host->RestoreCheckpoint(t.tenant, HandleOf(*info), after->id, HostUnderTest::Soon());
  ASSERT_TRUE(restored.ok()) << restored.status();
  EXPECT_EQ(restored->length, 33u);
  EXPECT_EQ(restored->canonical_length, 5u);
  EXPECT_EQ(restored->end_position, 40);
  EXPECT_EQ(RowsOf(t, info->id), rows);
  ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
  t.host->Quiesce();
}

// Two copies of equal bytes that are one page when they come back: each has its reference.
TEST(EditedSessionTest, ACheckpointWithTwoEqualPagesLeavesNoReferenceBehind) {
  MemoryPageStore store;
  HostUnderTest t({.store = &store});
  const std::vector<uint32_t> tokens = Tokens(100, 10);
  auto a = t.OpenAndFill(tokens);
  ASSERT_TRUE(a.ok()) << a.status();
  auto opened = t.host->Open(t.tenant, tokens, {}, {.no_reuse = true});
  ASSERT_TRUE(opened.ok()) << opened.status();
  auto b = t.Append(opened->info, tokens);
  auto both = t.host->Open(t.tenant, {}, {}, {});
  ASSERT_TRUE(b.ok() && both.ok());
  const std::vector<SequenceHandle> handles = {HandleOf(*a), HandleOf(*b), HandleOf(both->info)};
  const std::vector<SequenceEdit> edits = {
      ShiftPositionsEdit{b->number, {0, -1}, 10, OnShared::kCopy, false},
      CopyRangeEdit{a->number, both->info.number, {0, -1}, false},
      CopyRangeEdit{b->number, both->info.number, {0, -1}, false}};
  auto edited = t.host->Edit(t.tenant, handles, edits);
  ASSERT_TRUE(edited.ok()) << edited.status();
  const SequenceInfo info = edited->infos[2];
  ASSERT_EQ(info.num_pages, 2u);
  auto point = t.host->CreateCheckpoint(t.tenant, HandleOf(info), {.tier = Tier::kHost},
                                        HostUnderTest::Soon());
  ASSERT_TRUE(point.ok()) << point.status();
  ASSERT_EQ(point->num_pages, 2u);
  // The same state, saved and loaded: one page stands for both, as they are one record.
  auto snapshot = t.host->Snapshot(t.tenant, HandleOf(info), std::nullopt);
  ASSERT_TRUE(snapshot.ok()) << snapshot.status();
  auto put = (*snapshot)->PutPages({}, Durability::kProcess, HostUnderTest::Soon());
  ASSERT_TRUE(put.ok()) << put.status();
  ASSERT_EQ(put->pages[0].key, put->pages[1].key);
  auto loaded =
      t.host->OpenSaved(t.tenant, (*snapshot)->state(), put->pages, std::nullopt, std::nullopt);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_EQ(loaded->info.num_pages, 1u);
  ASSERT_TRUE(t.WaitReady(loaded->info.id).ok());
  snapshot->reset();
  const std::string rows = RowsOf(t, info.id);
  auto cleared = t.host->Clear(t.tenant, HandleOf(info), /*zero_data=*/false);
  ASSERT_TRUE(cleared.ok()) << cleared.status();
  auto restored =
      t.host->RestoreCheckpoint(t.tenant, HandleOf(info), point->id, HostUnderTest::Soon());
  ASSERT_TRUE(restored.ok()) << restored.status();
  EXPECT_EQ(restored->num_pages, 1u);
  EXPECT_EQ(RowsOf(t, info.id), rows);
  for (const SequenceInfo& open : {*a, *b, info, loaded->info}) {
    ASSERT_TRUE(t.host->Close(t.tenant, open.id, open.epoch).ok());
  }
  t.host->Quiesce();
  t.host->ClearCache(false);
  EXPECT_EQ(t.host->Usage()[0].free_frames, t.host->Usage()[0].num_frames);
}

TEST(EditedSessionTest, ACompactedSaveHasNoPagesOfRowsThatWereRemoved) {
  MemoryPageStore store;
  SessionWorker a(&store, {.num_frames = 64, .write_through = false});
  const uint64_t page = a.engine->model->geometry().bytes_per_page_of_tokens();
  auto info = a.engine->OpenAndFill(Tokens(0, 160));
  ASSERT_TRUE(info.ok()) << info.status();
  // Of each page but the first two rows 2 to 15 go: 8 pages are left with 2 rows each.
  for (int64_t at = 144; at >= 32; at -= 16) {
    info = EditOne(*a.engine, *info, RemoveRangeEdit{info->number, {at + 2, at + 16}});
    ASSERT_TRUE(info.ok()) << info.status();
  }
  ASSERT_EQ(info->length, 48u);
  const std::string rows = RowsOf(*a.engine, info->id);
  EXPECT_EQ(a.Save(*info, "scattered")->bytes_total, 10 * page);
  SaveRequest request = a.Request(*info, "compact");
  request.compact = true;
  request.sequence.expected_revision = info->revision;
  auto saved = a.sessions->Save(a.tenant(), a.host(), request, HostUnderTest::Soon());
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->bytes_total, 3 * page);
  EXPECT_EQ(saved->tokens, 48u);
  EXPECT_EQ(RowsOf(*a.engine, info->id), rows);
  SessionWorker b(&store, {.id = "b", .incarnation = 2});
  for (const char* name : {"scattered", "compact"}) {
    auto loaded = b.Load(name);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_EQ(RowsOf(*b.engine, loaded->open.info.id), rows) << name;
    EXPECT_EQ(loaded->open.info.end_position, 146) << name;
  }
  // Nothing left to move: as any save.
  auto again =
      a.sessions->Save(a.tenant(), a.host(), a.Request(*info, "compact"), HostUnderTest::Soon());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->bytes_written, 0u);
}

TEST(EditedSessionTest, OfAWindowOnlyWhatTheNextTokenSeesIsSaved) {
  // 10 pages of the full group; of the window of 24 tokens rows 137 to 159: pages 8 and 9. The
  // sequence itself keeps all rows of the window.
  MemoryPageStore store;
  HostUnderTest t({.num_groups = 2, .num_frames = 32, .store = &store, .window_tokens = 24});
  const std::vector<uint32_t> tokens = Tokens(0, 160);
  auto opened = t.host->Open(t.tenant, tokens, {}, {.keeps_masked_rows = true});
  ASSERT_TRUE(opened.ok()) << opened.status();
  auto info = t.Append(opened->info, tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  ASSERT_EQ(info->num_pages, 20u);
  auto snapshot = t.host->Snapshot(t.tenant, HandleOf(*info), std::nullopt);
  ASSERT_TRUE(snapshot.ok()) << snapshot.status();
  auto put = (*snapshot)->PutPages({}, Durability::kProcess, HostUnderTest::Soon());
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_EQ(put->pages.size(), 12u);
  const auto& geometry = t.model->geometry();
  EXPECT_EQ(put->bytes_total,
            10 * geometry.group(0).page_bytes() + 2 * geometry.group(1).page_bytes());
}

}  // namespace
}  // namespace pagetide
