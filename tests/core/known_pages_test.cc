#include "core/known_pages.h"

#include "absl/strings/str_cat.h"
#include "core/page_directory.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

PageId P(uint64_t n) {
  return PageId(n);
}

TEST(KnownPagesTest, WhatWasUsedLongestAgoGoesFirst) {
  KnownPages known;
  for (uint64_t n = 1; n <= 5; ++n) known.Add(P(n), "a");
  EXPECT_THAT(known.TakeExcess(5), IsEmpty());
  known.Touch(P(1));
  known.Add(P(2), "a");  // keeps its place
  known.Touch(P(9));     // is not there
  EXPECT_THAT(known.TakeExcess(2), ElementsAre(P(2), P(3), P(4)));
  EXPECT_TRUE(known.Contains(P(1)));
  EXPECT_TRUE(known.Contains(P(5)));
  known.Remove(P(1));
  known.Remove(P(1));
  EXPECT_THAT(known.TakeExcess(0), ElementsAre(P(5)));
  EXPECT_EQ(known.size(), 0u);
}

TEST(KnownPagesTest, WhoHasMostGivesUpMost) {
  KnownPages known;
  for (uint64_t n = 1; n <= 3; ++n) known.Add(P(n), "small");
  for (uint64_t n = 11; n <= 30; ++n) known.Add(P(n), "large");
  const std::vector<PageId> taken = known.TakeExcess(10);
  ASSERT_EQ(taken.size(), 13u);
  EXPECT_EQ(taken.front(), P(11));
  EXPECT_EQ(taken.back(), P(23));
  // From where both have as many, both give up.
  EXPECT_THAT(known.TakeExcess(4), UnorderedElementsAre(P(24), P(25), P(26), P(27), P(28), P(1)));
}

class KnownInDirectoryTest : public ::testing::Test {
 protected:
  Page& Adopt(uint64_t n) {
    const PrefixKey prefix{Sha256Of(absl::StrCat(n))};
    return directory_.AdoptStored(0, "t", 16, 0, std::nullopt, prefix, PrefixKey{},
                                  MakePageKey(prefix, Digest{}), Checksum128{},
                                  std::make_shared<const std::vector<uint32_t>>(), true);
  }
  FrameId Frame() { return directory_.AllocateFrame(0, "t")->frame; }

  PageDirectory directory_{1, 4, /*max_known_stored=*/1};
};

TEST_F(KnownInDirectoryTest, ARestoreThatEndedInNothingLeavesAPageThatIsForgottenInItsTurn) {
  const PageId first = Adopt(1).id();
  directory_.BeginRestore(directory_.Get(first), Frame());
  directory_.AbortRestore(directory_.Get(first));
  Adopt(2);
  directory_.CheckInvariants();
  directory_.TrimKnown();
  EXPECT_EQ(directory_.Find(first), nullptr);
  EXPECT_EQ(directory_.num_pages(), 1u);
  directory_.CheckInvariants();
}

TEST_F(KnownInDirectoryTest, WhatIsNeededIsNotForgotten) {
  const PageId referenced = Adopt(1).id();
  directory_.Ref(directory_.Get(referenced));
  const PageId restoring = Adopt(2).id();
  directory_.BeginRestore(directory_.Get(restoring), Frame());
  const PageId pinned = Adopt(3).id();
  directory_.Pin(directory_.Get(pinned));
  for (uint64_t n = 4; n < 8; ++n) Adopt(n);
  directory_.CheckInvariants();
  directory_.TrimKnown();
  EXPECT_EQ(directory_.num_pages(), 4u);
  directory_.FinishRestore(directory_.Get(restoring));
  directory_.Evict(directory_.Get(restoring));
  directory_.Unpin(directory_.Get(pinned));
  EXPECT_FALSE(directory_.Unref(directory_.Get(referenced)));
  directory_.CheckInvariants();
  directory_.TrimKnown();
  EXPECT_EQ(directory_.num_pages(), 1u);
  EXPECT_NE(directory_.Find(referenced), nullptr);
  directory_.Quarantine(directory_.Get(referenced));
  EXPECT_EQ(directory_.num_pages(), 0u);
  directory_.CheckInvariants();
}

}  // namespace
}  // namespace pagetide
