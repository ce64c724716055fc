// Part of the contract of core/page_store.h (page_store_contract.h): finding pages by their tokens.
#ifndef PAGETIDE_TESTS_CONTRACT_PAGE_STORE_PREFIXES_CONTRACT_H_
#define PAGETIDE_TESTS_CONTRACT_PAGE_STORE_PREFIXES_CONTRACT_H_

#include <vector>

#include "tests/contract/page_store_harness.h"

namespace pagetide {

TEST_P(PageStoreContract, FindsThePageThatBeginsMostAlike) {
  const PrefixKey root{Sha256Of("root")}, other{Sha256Of("another root")};
  const TestPage low = MakeTokenPage(root, {1, 2, 3, 4}, 11);
  const TestPage mid = MakeTokenPage(root, {1, 2, 300, 4}, 12);
  const TestPage high = MakeTokenPage(root, {1, 70000, 3, 4}, 13);
  const TestPage elsewhere = MakeTokenPage(other, {1, 2, 300, 9}, 14);
  const TestPage shard = MakeTokenPage(root, {1, 2, 300, 5}, 15, "another component");
  for (const TestPage* page : {&low, &mid, &high, &elsewhere, &shard}) {
    ASSERT_TRUE(Put(*page).status.ok());
  }
  const auto find = [&](const PrefixKey& parent, std::vector<uint32_t> tokens) {
    const PartialQuery query{parent, Sha256Of("fingerprint"), tokens};
    const auto found = store().FindPartialPages({&query, 1}, kForEver);
    EXPECT_TRUE(found.ok() && found->size() == 1) << found.status();
    return found.ok() && !found->empty() ? (*found)[0] : PartialResult{};
  };
  PartialResult found = find(root, {1, 2, 300, 4});
  EXPECT_EQ(found.common_tokens, 4u);
  EXPECT_EQ(found.key, mid.meta.key);
  EXPECT_EQ(found.checksum, mid.meta.checksum);
  EXPECT_EQ(found.body_bytes, mid.body.size());
  EXPECT_EQ(found.tokens, mid.tokens);
  found = find(root, {1, 2, 299});
  EXPECT_EQ(found.common_tokens, 2u);
  found = find(root, {1, 2, 3, 9, 9});
  EXPECT_EQ(found.common_tokens, 3u);
  EXPECT_EQ(found.key, low.meta.key);
  // In the order of numbers, not of bytes in some machine's order.
  found = find(root, {1, 69999});
  EXPECT_EQ(found.common_tokens, 1u);
  found = find(root, {1, 70000});
  EXPECT_EQ(found.key, high.meta.key);
  EXPECT_EQ(found.common_tokens, 2u);
  EXPECT_EQ(find(root, {2}).common_tokens, 0u);
  EXPECT_EQ(find(root, {}).common_tokens, 0u);
  EXPECT_EQ(find(other, {1, 2, 300, 9}).key, elsewhere.meta.key);
  EXPECT_EQ(find(PrefixKey{Sha256Of("nobody")}, {1, 2}).common_tokens, 0u);
  // What is gone is not found, its neighbour is.
  ASSERT_EQ(store().DeletePages({&mid.meta.key, 1}, kForEver).value(), 1u);
  found = find(root, {1, 2, 300, 4});
  EXPECT_EQ(found.key, low.meta.key);
  EXPECT_EQ(found.common_tokens, 2u);
}

TEST_P(PageStoreContract, ADamagedPageIsNotFoundByItsTokens) {
  const PrefixKey root{Sha256Of("root")};
  const TestPage good = MakeTokenPage(root, {5, 5, 1, 1}, 1);
  const TestPage damaged = MakeTokenPage(root, {5, 5, 5, 5}, 2);
  ASSERT_TRUE(Put(good, Durability::kLocal).status.ok());
  ASSERT_TRUE(Put(damaged, Durability::kLocal).status.ok());
  harness_->FlipStoredBit(damaged.meta.key, 100);
  EXPECT_EQ(OutcomeOf(damaged), GetOutcome::kQuarantined);
  const std::vector<uint32_t> tokens = {5, 5, 5, 5};
  const PartialQuery query{root, damaged.meta.fingerprint, tokens};
  auto found = store().FindPartialPages({&query, 1}, kForEver);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ((*found)[0].key, good.meta.key);
  EXPECT_EQ((*found)[0].common_tokens, 2u);
  ASSERT_TRUE(Put(damaged).status.ok());
  found = store().FindPartialPages({&query, 1}, kForEver);
  EXPECT_EQ((*found)[0].common_tokens, 4u);
}

TEST_P(PageStoreContract, RefusesTokensThatAreNotThePages) {
  const PrefixKey root{Sha256Of("root")};
  TestPage page = MakeTokenPage(root, {1, 2, 3}, 1);
  page.tokens[1] = 9;
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  page = MakeTestPage(2, 100, /*keyed=*/false);
  page.tokens = {1, 2, 3};
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  page = MakeTokenPage(root, std::vector<uint32_t>(kMaxIndexedPageTokens + 1, 7), 3);
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  page = MakeTokenPage(root, std::vector<uint32_t>(kMaxIndexedPageTokens, 7), 3);
  EXPECT_TRUE(Put(page).status.ok());
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CONTRACT_PAGE_STORE_PREFIXES_CONTRACT_H_
