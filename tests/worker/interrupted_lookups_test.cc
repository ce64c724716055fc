// Look-ups of prompts during which other calls make the host forget pages that only the store has.
#include <gtest/gtest.h>

#include <functional>
#include <utility>

#include "kvstore/decorating_page_store.h"
#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

// Lets a test act, once each, while a host waits for an answer.
class InterruptedStore final : public DecoratingPageStore {
 public:
  using DecoratingPageStore::DecoratingPageStore;
  absl::StatusOr<std::vector<LookupResult>> LookupPages(std::span<const PageKey> keys,
                                                        MonotonicTime deadline) override {
    if (during_lookup) std::exchange(during_lookup, nullptr)();
    return inner()->LookupPages(keys, deadline);
  }
  absl::StatusOr<std::vector<PartialResult>> FindPartialPages(std::span<const PartialQuery> queries,
                                                              MonotonicTime deadline) override {
    if (during_partial) std::exchange(during_partial, nullptr)();
    return inner()->FindPartialPages(queries, deadline);
  }
  std::function<void()> during_lookup;
  std::function<void()> during_partial;
};

class InterruptedLookups : public ::testing::Test {
 protected:
  static constexpr uint32_t kPageTokens = 16;

  void SetUp() override {
    HostUnderTest writer({.store = &shared_, .incarnation = 1});
    for (const std::vector<uint32_t>& tokens : {prompt_, used_before_, used_meanwhile_}) {
      ASSERT_TRUE(writer.OpenAndFill(tokens).ok());
    }
    writer.host->Quiesce();
    // The pages that the host remembers, the longest unused first: the prompt's, and one more.
    ASSERT_EQ(Reused(std::span(prompt_).first(3 * kPageTokens)), 3 * kPageTokens);
    ASSERT_EQ(Reused(used_before_), kPageTokens);
  }
  uint64_t Reused(std::span<const uint32_t> tokens, bool whole_pages_only = false) {
    const auto reuse = t_.host->LookupPrefix(
        t_.tenant, tokens, {}, {.allow_full_reuse = true, .whole_pages_only = whole_pages_only});
    EXPECT_TRUE(reuse.ok()) << reuse.status();
    return reuse.ok() ? reuse->reused_tokens : 0;
  }
  void UseAnother() { EXPECT_EQ(Reused(used_meanwhile_), kPageTokens); }

  const std::vector<uint32_t> prompt_ = Tokens(0, 4 * kPageTokens);
  const std::vector<uint32_t> used_before_ = Tokens(1000, kPageTokens);
  const std::vector<uint32_t> used_meanwhile_ = Tokens(2000, kPageTokens);
  MemoryPageStore shared_;
  InterruptedStore store_{&shared_};
  HostUnderTest t_{{.store = &store_, .incarnation = 2, .max_known_stored_pages = 4}};
};

TEST_F(InterruptedLookups, KnownPagesOfThePromptStayWhileTheStoreIsAskedForMore) {
  store_.during_lookup = [&] { UseAnother(); };
  // Not by its tokens, which would find one page of those that were forgotten again.
  EXPECT_EQ(Reused(prompt_, /*whole_pages_only=*/true), 4 * kPageTokens);
  EXPECT_FALSE(store_.during_lookup);
}

TEST_F(InterruptedLookups, KnownPagesOfThePromptStayWhileTheStoreIsAskedForPartOfOne) {
  store_.during_partial = [&] { UseAnother(); };
  EXPECT_EQ(Reused(std::span(prompt_).first(3 * kPageTokens + 8)), 3 * kPageTokens + 8);
  EXPECT_FALSE(store_.during_partial);
}

}  // namespace
}  // namespace pagetide
