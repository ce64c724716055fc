#include "core/page_directory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr uint32_t kRows = 16;

template <typename Key>
Key KeyOf(uint8_t first_byte) {
  Key key;
  key.digest.bytes[0] = first_byte;
  return key;
}

class PageDirectoryTest : public ::testing::Test {
 protected:
  // Full and keyed, with the creator's reference.
  Page& AddFull(uint8_t name) {
    const FrameId frame = pages_.AllocateFrame(0, "tenant")->frame;
    Page& page = pages_.CreateTail(0, "tenant", frame, 0, std::nullopt);
    page.SetFull(kRows, Checksum128());
    EXPECT_TRUE(pages_.SetKey(page, KeyOf<PrefixKey>(name), PrefixKey(), KeyOf<PageKey>(name),
                              std::make_shared<const std::vector<uint32_t>>(kRows, name), false));
    return page;
  }
  static Page::StoredAs StoredAs(uint8_t name) { return {KeyOf<PageKey>(name), Checksum128()}; }

  PageDirectory pages_{1, 8, 8};
};

TEST_F(PageDirectoryTest, KeyedPagesAreUnstoredUntilTheStoreTookThem) {
  const PageId a = AddFull(1).id();
  const PageId b = AddFull(2).id();
  EXPECT_THAT(pages_.unstored(), ElementsAre(a, b)) << "oldest first";
  pages_.BeginSpill(pages_.Get(a));
  EXPECT_THAT(pages_.unstored(), ElementsAre(b)) << "one on its way is not offered again";
  pages_.FinishSpill(pages_.Get(a), std::nullopt);
  EXPECT_THAT(pages_.unstored(), ElementsAre(a, b)) << "the store refused it";
  pages_.BeginSpill(pages_.Get(a));
  pages_.FinishSpill(pages_.Get(a), StoredAs(1));
  EXPECT_THAT(pages_.unstored(), ElementsAre(b));
  pages_.SetStored(pages_.Get(b), StoredAs(2));  // by a save
  EXPECT_THAT(pages_.unstored(), IsEmpty());
  pages_.CheckInvariants();
}

// The store lost a private page's record and took it again, under another key.
TEST_F(PageDirectoryTest, APagePutAgainIsFoundByItsNewKeyOnly) {
  const FrameId frame = pages_.AllocateFrame(0, "tenant")->frame;
  Page& page = pages_.CreateTail(0, "tenant", frame, 0, std::nullopt);
  page.SetFull(kRows, Checksum128());
  pages_.SetStored(page, {KeyOf<PageKey>(1), Checksum128(), /*is_shared=*/true});
  EXPECT_NE(pages_.FindSealed(0, KeyOf<PageKey>(1), Checksum128()), nullptr);
  pages_.SetStored(page, {KeyOf<PageKey>(2), Checksum128(), /*is_shared=*/true});
  EXPECT_EQ(pages_.FindSealed(0, KeyOf<PageKey>(1), Checksum128()), nullptr);
  EXPECT_NE(pages_.FindSealed(0, KeyOf<PageKey>(2), Checksum128()), nullptr);
  pages_.CheckInvariants();
  pages_.Unref(page);
  pages_.DropUnreferenced();
  EXPECT_EQ(pages_.FindSealed(0, KeyOf<PageKey>(1), Checksum128()), nullptr);
  EXPECT_EQ(pages_.FindSealed(0, KeyOf<PageKey>(2), Checksum128()), nullptr);
  pages_.CheckInvariants();
}

TEST_F(PageDirectoryTest, APageThatGoesIsNoLongerUnstored) {
  Page& evicted = AddFull(1);
  Page& damaged = AddFull(2);
  Page& dropped = AddFull(3);
  EXPECT_EQ(pages_.unstored().size(), 3u);
  pages_.Unref(evicted);
  pages_.Evict(evicted);
  pages_.Quarantine(damaged);
  pages_.Unref(dropped);
  EXPECT_THAT(pages_.unstored(), ElementsAre(dropped.id())) << "it stays in the cache";
  pages_.DropUnreferenced();
  EXPECT_THAT(pages_.unstored(), IsEmpty());
  pages_.CheckInvariants();
}

// A cleared cache is found by nobody, whatever was on its way to the store.
TEST_F(PageDirectoryTest, APageOnItsWayToTheStoreIsDroppedToo) {
  Page& page = AddFull(1);
  const PageId id = page.id();
  pages_.Unref(page);
  pages_.BeginSpill(page);
  pages_.TakeFrameChanges();
  EXPECT_EQ(pages_.DropUnreferenced(), 1u);
  EXPECT_EQ(pages_.DropUnreferenced(), 0u) << "once";
  EXPECT_EQ(pages_.FindKeyed(0, KeyOf<PrefixKey>(1)), nullptr);
  pages_.CheckInvariants();
  Page& again = AddFull(1);  // its key is free
  EXPECT_EQ(pages_.FindKeyed(0, KeyOf<PrefixKey>(1)), &again);
  pages_.FinishSpill(pages_.Get(id), StoredAs(1));
  EXPECT_EQ(pages_.Find(id), nullptr);
  EXPECT_EQ(pages_.FindKeyed(0, KeyOf<PrefixKey>(1)), &again);
  const std::vector<FrameChange> changes = pages_.TakeFrameChanges();
  ASSERT_EQ(changes.size(), 2u) << "gone at once, then there anew";
  EXPECT_TRUE(changes[0].removed);
  EXPECT_FALSE(changes[1].removed);
  pages_.CheckInvariants();
}

TEST_F(PageDirectoryTest, AQuarantinedPageHasItsFrameUntilTheLastPinIsGone) {
  Page& page = AddFull(1);
  const FrameId frame = page.frame();
  const PrefixKey prefix = *page.prefix();
  pages_.Pin(page);
  pages_.Pin(page);
  pages_.Quarantine(page);
  EXPECT_EQ(page.state(), PageState::kQuarantined);
  EXPECT_EQ(pages_.FindKeyed(0, prefix), nullptr);
  EXPECT_THAT(pages_.unstored(), IsEmpty());
  pages_.Unpin(page);
  EXPECT_EQ(page.frame(), frame);
  EXPECT_FALSE(pages_.frames(0).IsFree(frame));
  pages_.CheckInvariants();
  pages_.Unpin(page);
  EXPECT_TRUE(pages_.frames(0).IsFree(frame));
  EXPECT_FALSE(page.has_frame());
  pages_.CheckInvariants();
  EXPECT_TRUE(pages_.Unref(page));
  EXPECT_EQ(pages_.num_pages(), 0u);
}

TEST_F(PageDirectoryTest, TailsAndPrivatePagesAreNotUnstored) {
  const FrameId frame = pages_.AllocateFrame(0, "tenant")->frame;
  Page& page = pages_.CreateTail(0, "tenant", frame, 0, std::nullopt);
  EXPECT_THAT(pages_.unstored(), IsEmpty());
  page.SetFull(kRows, Checksum128());
  EXPECT_THAT(pages_.unstored(), IsEmpty());
  pages_.CheckInvariants();
}

}  // namespace
}  // namespace pagetide
