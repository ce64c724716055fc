// What the index promises about candidates for eviction, by its own interface.
#include "kvstore/page_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "base/clock.h"
#include "tests/contract/test_page.h"

namespace pagetide {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::UnorderedElementsAre;

constexpr uint64_t kAll = uint64_t{1} << 40;

class PageIndexTest : public ::testing::Test {
 protected:
  // Puts the page behind those before it.
  PagePlace Publish(const TestPage& page) {
    const PagePlace place{segment_, end_, 192, page.meta.body_bytes, page.meta.body_bytes};
    end_ += SegmentFiles::Footprint(place.record_bytes());
    segment_->live_bytes += SegmentFiles::Footprint(place.record_bytes());
    index_.Publish(page.meta, place, /*quarantined=*/false);
    return place;
  }
  std::vector<PageKey> Victims(const PageIndex::Grace& grace = {}) const {
    return index_.PickVictims(kAll, grace);
  }

  FakeClock clock_;
  const std::shared_ptr<Segment> segment_ = std::make_shared<Segment>(1, nullptr);
  uint64_t end_ = 0;
  PageIndex index_{&clock_};
};

// A page whose parent is said to be itself, as an old folder may have it.
TestPage MakeOwnParent() {
  TestPage page = MakeTestPage(1);
  page.meta.parent = page.meta.prefix;
  return page;
}

TEST_F(PageIndexTest, NothingIsLeftOfAnErasedPageThatIsItsOwnParent) {
  const TestPage page = MakeOwnParent(), other = MakeTestPage(2);
  Publish(page);
  EXPECT_THAT(Victims(), ElementsAre(page.meta.key)) << "it has no child";
  EXPECT_TRUE(index_.Erase(page.meta.key).has_value());
  EXPECT_THAT(Victims(), IsEmpty());
  Publish(other);
  EXPECT_THAT(Victims(), ElementsAre(other.meta.key));
  EXPECT_EQ(index_.totals().pages, 1u);
}

TEST_F(PageIndexTest, AQuarantinedPageThatIsItsOwnParentCanBeErased) {
  const TestPage before = MakeTestPage(2), page = MakeOwnParent();
  Publish(before);
  const PagePlace place = Publish(page);
  EXPECT_TRUE(index_.Quarantine(page.meta.key, place));
  EXPECT_THAT(Victims(), ElementsAre(page.meta.key, before.meta.key)) << "damaged ones first";
  EXPECT_TRUE(index_.EraseQuarantined(page.meta.key, place));
  EXPECT_THAT(Victims(), ElementsAre(before.meta.key));
}

TEST_F(PageIndexTest, TwoPagesThatAreEachOthersParentsCanBothGo) {
  TestPage a = MakeTestPage(1), b = MakeTestPage(2);
  a.meta.parent = b.meta.prefix;
  b.meta.parent = a.meta.prefix;
  const PagePlace place = Publish(a);
  Publish(b);
  EXPECT_TRUE(index_.Quarantine(a.meta.key, place));
  EXPECT_TRUE(index_.Erase(a.meta.key).has_value());
  EXPECT_THAT(Victims(), ElementsAre(b.meta.key));
  EXPECT_TRUE(index_.Erase(b.meta.key).has_value());
  EXPECT_THAT(Victims(), IsEmpty());
}

TEST_F(PageIndexTest, APageOfAReplacedVersionIsKeptWhileItMayBeLoaded) {
  const PageIndex::Grace grace{.put_bytes = kAll, .time = absl::Seconds(30)};
  const TestPage replaced = MakeTestPage(1), deleted = MakeTestPage(2), shared = MakeTestPage(3);
  const std::vector<ManifestPageRef> all = {replaced.ref(), deleted.ref(), shared.ref()};
  for (const TestPage* page : {&replaced, &deleted, &shared}) Publish(*page);
  ASSERT_THAT(index_.Protect(all), IsEmpty());
  ASSERT_THAT(index_.Protect(std::vector{shared.ref()}), IsEmpty());
  clock_.Advance(absl::Hours(1));
  index_.UnprotectWithGrace(std::vector{replaced.ref(), shared.ref()});
  index_.Unprotect(std::vector{deleted.ref()});
  EXPECT_THAT(Victims(grace), ElementsAre(deleted.meta.key));
  clock_.Advance(absl::Seconds(29));
  EXPECT_THAT(Victims(grace), ElementsAre(deleted.meta.key));
  clock_.Advance(absl::Seconds(1));
  EXPECT_THAT(Victims(grace), UnorderedElementsAre(deleted.meta.key, replaced.meta.key))
      << "another manifest still names the third";
  // Bytes end it as well.
  index_.UnprotectWithGrace(std::vector{shared.ref()});
  EXPECT_THAT(Victims({.put_bytes = 4096, .time = absl::Seconds(30)}),
              Not(Contains(shared.meta.key)));
  Publish(MakeTestPage(4));
  EXPECT_THAT(Victims({.put_bytes = 4096, .time = absl::Seconds(30)}), Contains(shared.meta.key));
}

}  // namespace
}  // namespace pagetide
