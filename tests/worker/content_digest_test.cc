// Content digests: equal exactly when what they are of is.
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kvstore/fault_injecting_page_store.h"
#include "tests/support/timing.h"
#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;

SequenceHandle HandleOf(const SequenceInfo& info) {
  return {.id = info.id, .epoch = info.epoch};
}

std::optional<Checksum128> DigestOf(HostUnderTest& t, const SequenceInfo& info, uint64_t length) {
  const auto digest = t.host->DigestContents(t.tenant, HandleOf(info), length);
  EXPECT_TRUE(digest.ok()) << digest.status();
  return digest.ok() ? digest->digest : std::nullopt;
}

TEST(ContentDigestTest, IsTheSameOnHostsOfOtherShards) {
  HostUnderTest a({});
  ModelSpec spec = a.model->spec();
  spec.geometry.shard = {.kv_head_begin = 1, .kv_head_end = 2, .rank = 1, .num_ranks = 2};
  HostUnderTest b({.model = std::make_shared<const Model>(Model::Create(spec).value())});
  const std::vector<uint32_t> tokens = Tokens(5, 50);
  const auto x = a.OpenAndFill(tokens);
  const auto y = b.OpenAndFill(tokens);
  ASSERT_TRUE(x.ok()) << x.status();
  ASSERT_TRUE(y.ok()) << y.status();
  for (uint64_t length = 0; length <= 50; ++length) {
    EXPECT_EQ(DigestOf(a, *x, length), DigestOf(b, *y, length)) << length;
    if (length == 0) continue;
    EXPECT_NE(DigestOf(a, *x, length), DigestOf(a, *x, length - 1)) << length;
  }
  EXPECT_EQ(DigestOf(a, *x, 51), std::nullopt);
  EXPECT_EQ(DigestOf(a, *x, ~uint64_t{0}), std::nullopt);
}

TEST(ContentDigestTest, OneOtherTokenIsSeenWhereverItStands) {
  HostUnderTest t({.num_frames = 64});
  const std::vector<uint32_t> tokens = Tokens(5, 50);
  const auto original = t.OpenAndFill(tokens);
  ASSERT_TRUE(original.ok()) << original.status();
  for (const size_t at : {0, 15, 16, 31, 40, 49}) {
    std::vector<uint32_t> other = tokens;
    other[at] ^= 1;
    const auto changed = t.OpenAndFill(other);
    ASSERT_TRUE(changed.ok()) << changed.status();
    EXPECT_EQ(DigestOf(t, *original, at), DigestOf(t, *changed, at)) << at;
    EXPECT_NE(DigestOf(t, *original, at + 1), DigestOf(t, *changed, at + 1)) << at;
    EXPECT_NE(DigestOf(t, *original, 50), DigestOf(t, *changed, 50)) << at;
    ASSERT_TRUE(t.host->Close(t.tenant, changed->id, changed->epoch).ok());
  }
}

// However a sequence came to hold its tokens: in one append, in steps, or after a cut.
TEST(ContentDigestTest, DoesNotDependOnHowTheTokensCame) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  HostUnderTest t({.num_frames = 64});
  const std::vector<uint32_t> tokens = Tokens(5, 60);
  HostUnderTest fresh({});
  const auto whole = fresh.OpenAndFill(tokens);
  ASSERT_TRUE(whole.ok()) << whole.status();
  auto opened = t.host->Open(t.tenant, {}, {}, {});
  ASSERT_TRUE(opened.ok()) << opened.status();
  SequenceInfo info = opened->info;
  for (int step = 0; step < 200; ++step) {
    if (random() % 3 == 0 || info.length == 60) {
      const auto cut = t.host->Rewind(t.tenant, HandleOf(info),
                                      static_cast<int64_t>(random() % (info.length + 1)));
      ASSERT_TRUE(cut.ok()) << cut.status();
      info = cut->info;
    } else {
      const uint64_t end = info.length + 1 + random() % (60 - info.length);
      const std::span<const uint32_t> all = std::span(tokens).first(end);
      const auto longer = random() % 2 == 0 ? t.Append(info, all) : t.Step(info, all);
      ASSERT_TRUE(longer.ok()) << longer.status();
      info = *longer;
    }
    const uint64_t length = random() % (info.length + 1);
    ASSERT_EQ(DigestOf(t, info, length), DigestOf(fresh, *whole, length)) << step;
  }
}

TEST(ContentDigestTest, InputsAndEditsAreSeen) {
  HostUnderTest t({});
  const std::vector<uint32_t> tokens = Tokens(5, 20);
  const auto plain = t.OpenAndFill(tokens);
  ASSERT_TRUE(plain.ok()) << plain.status();
  const auto with_input = [&](uint64_t position, const Digest& digest) {
    const auto opened = t.host->Open(t.tenant, {}, {}, {.no_reuse = true});
    EXPECT_TRUE(opened.ok()) << opened.status();
    const std::vector<PositionedInput> inputs = {{position, digest}};
    const auto slot = t.host->BeginAppend(t.tenant, HandleOf(opened->info), "a", 0, tokens, inputs,
                                          false, t.Soon());
    EXPECT_TRUE(slot.ok()) << slot.status();
    EXPECT_TRUE(t.WriteAll(*slot, tokens).ok());
    const auto done = t.host->Commit(t.tenant, HandleOf(opened->info), slot->pending_id, {});
    EXPECT_TRUE(done.ok()) << done.status();
    return done->info;
  };
  for (const uint64_t at : {3, 18}) {  // in a page with a key, in the tail
    const SequenceInfo one = with_input(at, Sha256Of("an image"));
    const SequenceInfo other = with_input(at, Sha256Of("another"));
    const SequenceInfo behind = with_input(at + 1, Sha256Of("an image"));
    EXPECT_NE(DigestOf(t, one, 20), DigestOf(t, *plain, 20));
    EXPECT_NE(DigestOf(t, one, 20), DigestOf(t, other, 20));
    EXPECT_NE(DigestOf(t, one, 20), DigestOf(t, behind, 20));
  }
  // The same tokens at the same positions, of which the last ones stood elsewhere.
  std::vector<uint32_t> longer = tokens;
  longer.insert(longer.begin() + 4, 99);
  const auto edited = t.OpenAndFill(longer);
  ASSERT_TRUE(edited.ok()) << edited.status();
  const uint64_t number = t.host->NumberOf(edited->id);
  const std::vector<SequenceEdit> edits = {RemoveRangeEdit{number, {4, 5}},
                                           ShiftPositionsEdit{number, {5, 21}, -1}};
  const SequenceHandle handle = HandleOf(*edited);
  const auto done = t.host->Edit(t.tenant, {&handle, 1}, edits);
  ASSERT_TRUE(done.ok()) << done.status();
  ASSERT_EQ(done->infos.front().length, 20u);
  EXPECT_EQ(DigestOf(t, *edited, 4), DigestOf(t, *plain, 4));
  EXPECT_NE(DigestOf(t, *edited, 5), DigestOf(t, *plain, 5));
  EXPECT_NE(DigestOf(t, *edited, 20), DigestOf(t, *plain, 20));
}

// What a spill or a read found damaged is nobody's content any more.
TEST(ContentDigestTest, OfTokensWhosePagesAreGoneThereIsNone) {
  MemoryPageStore memory;
  FaultInjectingPageStore store(&memory);
  store.FailWith(absl::UnavailableError("the store is down"));
  HostUnderTest t({.num_frames = 4, .store = &store});
  const auto info = t.OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok()) << info.status();
  t.host->Quiesce();
  uint64_t at = 0;
  {
    const auto rows = t.host->PinRows(t.tenant, info->id, 0, 16, 0, t.Soon());
    ASSERT_TRUE(rows.ok()) << rows.status();
    at = (*rows)->Runs(0, RowKind::kK).front().offset;
  }
  std::byte byte;
  ASSERT_TRUE(t.host->pool().Read(at, {&byte, 1}).ok());
  byte ^= std::byte{1};
  ASSERT_TRUE(t.host->pool().Write(at, {&byte, 1}).ok());
  store.FailWith(absl::OkStatus());
  ASSERT_TRUE(Eventually([&] {
    t.host->Tick();
    t.host->Quiesce();
    return t.host->Counters().checksum_failures == 1;
  }));
  const auto lost = t.host->DigestContents(t.tenant, HandleOf(*info), 17);
  EXPECT_EQ(GetReason(lost.status()), "PREFIX_LOST") << lost.status();
  EXPECT_EQ(GetReasonMetadata(lost.status(), "length"), "16");
  EXPECT_NE(DigestOf(t, *info, 16), std::nullopt);
  EXPECT_EQ(t.host->Get(t.tenant, info->id)->length, 40u) << "nothing was changed";
}

TEST(ContentDigestTest, IsOfItsTenantsSequencesOnly) {
  HostUnderTest t({});
  const auto info = t.OpenAndFill(Tokens(5, 20));
  ASSERT_TRUE(info.ok()) << info.status();
  Tenant other = t.tenant;
  other.name = "other";
  EXPECT_EQ(GetReason(t.host->DigestContents(other, HandleOf(*info), 20).status()),
            "SEQUENCE_NOT_FOUND");
  EXPECT_EQ(GetReason(t.host->DigestContents(t.tenant, {info->id, info->epoch + 1}, 20).status()),
            "STALE_EPOCH");
}

}  // namespace
}  // namespace pagetide
