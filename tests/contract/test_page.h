// TestPage: a page whose bytes and keys follow from a seed, so that a checker can make them again.
#ifndef PAGETIDE_TESTS_CONTRACT_TEST_PAGE_H_
#define PAGETIDE_TESTS_CONTRACT_TEST_PAGE_H_

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/keys.h"
#include "core/page_store.h"

namespace pagetide {

struct TestPage {
  PageRecordMeta meta;
  std::vector<std::byte> body;
  std::vector<uint32_t> tokens;
  PutPage put() const { return {meta, body, tokens}; }
  ManifestPageRef ref() const { return {meta.key, meta.checksum}; }
};

inline TestPage MakeTestPage(uint64_t seed, size_t bytes = 4096, bool keyed = true,
                             const TestPage* parent = nullptr) {
  TestPage page;
  page.body.resize(bytes);
  std::mt19937_64 rng(seed);
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t word = rng();
    std::memcpy(page.body.data() + i, &word, std::min<size_t>(8, bytes - i));
  }
  page.meta.key = PageKey{Sha256Of(absl::StrCat("page", seed))};
  page.meta.checksum = ChecksumOf(page.body);
  page.meta.body_bytes = bytes;
  page.meta.fingerprint = Sha256Of("fingerprint");
  page.meta.numerics_id = "cpu/1";
  page.meta.group = 1;
  if (keyed) {
    page.meta.prefix = PrefixKey{Sha256Of(absl::StrCat("prefix", seed))};
    page.meta.parent = parent != nullptr ? *parent->meta.prefix : PrefixKey{Sha256Of("root")};
    page.meta.depth = parent != nullptr ? parent->meta.depth + 1 : 0;
  }
  return page;
}

// A page whose prefix key follows from its tokens, as a worker's does.
inline TestPage MakeTokenPage(const PrefixKey& parent, std::vector<uint32_t> tokens, uint64_t seed,
                              absl::string_view fingerprint = "fingerprint") {
  TestPage page = MakeTestPage(seed, 4096);
  page.meta.fingerprint = Sha256Of(fingerprint);
  page.meta.parent = parent;
  page.meta.prefix = NextPrefixKey(parent, tokens);
  page.meta.key = MakePageKey(*page.meta.prefix, page.meta.fingerprint);
  page.tokens = std::move(tokens);
  return page;
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CONTRACT_TEST_PAGE_H_
