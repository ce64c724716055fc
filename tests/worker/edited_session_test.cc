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
  auto before = t.host->CreateCheckpoint(t.tenant, HandleOf(*info));
  ASSERT_TRUE(before.ok()) << before.status();
  auto edited = EditOne(t, *info, RemoveRangeEdit{info->id.number, {5, 12}});
  ASSERT_TRUE(edited.ok()) << edited.status();
  const std::string rows = RowsOf(t, info->id);
  auto after = t.host->CreateCheckpoint(t.tenant, HandleOf(*info));
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->length, 33u);
  ASSERT_TRUE(t.host->Clear(t.tenant, HandleOf(*info), /*zero_data=*/true).ok());

  auto restored = t.host->RestoreCheckpoint(t.tenant, HandleOf(*info), before->id);
  ASSERT_TRUE(restored.ok()) << restored.status();
  EXPECT_EQ(restored->canonical_length, 40u);
  EXPECT_EQ(restored->end_position, 40);
  EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
  restored = t.host->RestoreCheckpoint(t.tenant, HandleOf(*info), after->id);
  ASSERT_TRUE(restored.ok()) << restored.status();
  EXPECT_EQ(restored->length, 33u);
  EXPECT_EQ(restored->canonical_length, 5u);
  EXPECT_EQ(restored->end_position, 40);
  EXPECT_EQ(RowsOf(t, info->id), rows);
  ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
  t.host->Quiesce();
}

}  // namespace
}  // namespace pagetide
