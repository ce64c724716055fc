#include "core/keys.h"

#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace pagetide {
namespace {

// Golden values, computed apart from this code base with Python:
//   import hashlib, hmac, struct
//   u32 = lambda v: struct.pack('<I', v); u64 = lambda v: struct.pack('<Q', v)
//   field = lambda b: u64(len(b)) + b;    sha = lambda b: hashlib.sha256(b).digest()
//   salt = hmac.new(b'deployment secret', b'tenant-a', hashlib.sha256).digest()
//   root = sha(field(b'pagetide.prefix.v1') + field(salt) + field(sha(b'model')) + u32(4))
//   def next_key(parent, tokens, inputs=()):
//     return sha(field(b'pagetide.page.v1') + field(parent) + u64(len(tokens))
//                + b''.join(map(u32, tokens)) + u64(len(inputs))
//                + b''.join(u32(slot) + field(digest) for slot, digest in inputs))
//   first = next_key(root, [1, 2, 3, 4]); second = next_key(first, [5, 0xffffffff, 7, 8])
//   image = next_key(first, [5, 0xffffffff, 7, 8], [(2, sha(b'image'))])
//   page = sha(field(b'pagetide.component_page.v1') + field(first) + field(sha(b'fingerprint')))
//   private = sha(field(b'pagetide.private_page.v1') + u64(1) + u64(2) + u64(3))
constexpr char kSalt[] = "60354fdd1e0697b41069a6f5b8208798854062ad2fb2c64ba5165f048373aafd";
constexpr char kRoot[] = "613962395cab98cfe5c50729bb6c133b455e13488dfe6cfe9cf8a84c8deb08f4";
constexpr char kFirst[] = "ef17a67b9af273a7f7fb11d57ab37f44eb91728a86e7ec0139c68a55fd90aa69";
constexpr char kSecond[] = "887e3ffb99b5c6a715b272ec486b34731498e307aa138208886b2dd83c035294";
constexpr char kImage[] = "24f1285859dfd64ed37206a42872927e49799b35bca71b50d14cc153ad46f992";
constexpr char kPage[] = "ed42b0ff7da746d3c37df1fe0292047bce27ae26dbabe7da8ff3b8f17cf54bfb";
constexpr char kPrivate[] = "fe9dc500b84ecf62c6701e6a9c29b58fffea0e000464d4a3c015861d7c1c4937";

const TenantSalt kTenant = DeriveTenantSalt("deployment secret", "tenant-a");
const PrefixKey kRootKey = RootPrefixKey(kTenant, Sha256Of("model"), 4);
const std::vector<uint32_t> kTokens = {1, 2, 3, 4, 5, 0xffffffff, 7, 8};

TEST(KeysTest, GoldenValues) {
  EXPECT_EQ(kTenant.digest.ToHex(), kSalt);
  EXPECT_EQ(kRootKey.digest.ToHex(), kRoot);
  const std::span<const uint32_t> tokens = kTokens;
  const PrefixKey first = NextPrefixKey(kRootKey, tokens.first(4));
  EXPECT_EQ(first.digest.ToHex(), kFirst);
  EXPECT_EQ(NextPrefixKey(first, tokens.subspan(4)).digest.ToHex(), kSecond);
  const std::vector<PositionedInput> inputs = {{6, Sha256Of("image")}};
  EXPECT_EQ(NextPrefixKey(first, tokens.subspan(4), 4, inputs).digest.ToHex(), kImage);
  EXPECT_EQ(MakePageKey(first, Sha256Of("fingerprint")).digest.ToHex(), kPage);
  EXPECT_EQ(MakePrivatePageKey(1, 2, 3).digest.ToHex(), kPrivate);
}

TEST(KeysTest, KeysOfAPromptAreTheChainOfItsFullPages) {
  const auto hex = [](const std::vector<PrefixKey>& keys) {
    std::vector<std::string> out;
    for (const PrefixKey& key : keys) out.push_back(key.digest.ToHex());
    return out;
  };
  const std::span<const uint32_t> tokens = kTokens;
  EXPECT_EQ(hex(PrefixKeysOf(kRootKey, tokens, 4)), (std::vector<std::string>{kFirst, kSecond}));
  EXPECT_EQ(hex(PrefixKeysOf(kRootKey, tokens.first(7), 4)), std::vector<std::string>{kFirst});
  EXPECT_TRUE(PrefixKeysOf(kRootKey, tokens.first(3), 4).empty());
  EXPECT_TRUE(PrefixKeysOf(kRootKey, {}, 4).empty());
  const std::vector<PositionedInput> inputs = {{6, Sha256Of("image")}};
  EXPECT_EQ(hex(PrefixKeysOf(kRootKey, tokens, 4, inputs)),
            (std::vector<std::string>{kFirst, kImage}));
}

TEST(KeysTest, AnInputInThePartialPageChangesNoFullPage) {
  const std::vector<PositionedInput> inputs = {{8, Sha256Of("image")}};
  EXPECT_EQ(PrefixKeysOf(kRootKey, kTokens, 4, inputs), PrefixKeysOf(kRootKey, kTokens, 4));
}

// Whatever decides the rows decides the key.
TEST(KeysTest, EveryIngredientCounts) {
  const Digest model = Sha256Of("model");
  std::set<PrefixKey> keys = {kRootKey};
  const auto is_new = [&](const PrefixKey& key) { return keys.insert(key).second; };
  EXPECT_TRUE(is_new(RootPrefixKey(DeriveTenantSalt("deployment secret", "tenant-b"), model, 4)));
  EXPECT_TRUE(is_new(RootPrefixKey(DeriveTenantSalt("another secret", "tenant-a"), model, 4)));
  EXPECT_TRUE(is_new(RootPrefixKey(kTenant, Sha256Of("another model"), 4)));
  EXPECT_TRUE(is_new(RootPrefixKey(kTenant, model, 5)));
  const std::vector<uint32_t> other_order = {2, 1, 3, 4};
  const std::span<const uint32_t> tokens = kTokens;
  EXPECT_TRUE(is_new(NextPrefixKey(kRootKey, tokens.first(4))));
  EXPECT_TRUE(is_new(NextPrefixKey(kRootKey, other_order)));
  EXPECT_TRUE(is_new(NextPrefixKey(kRootKey, tokens.first(3))));
  EXPECT_TRUE(is_new(NextPrefixKey(kRootKey, {})));
  EXPECT_TRUE(is_new(NextPrefixKey(*keys.rbegin(), tokens.first(4))));
  for (const PositionedInput& input :
       {PositionedInput{0, Sha256Of("image")}, PositionedInput{1, Sha256Of("image")},
        PositionedInput{0, Sha256Of("other")}}) {
    EXPECT_TRUE(is_new(NextPrefixKey(kRootKey, tokens.first(4), 0, std::span(&input, 1))));
  }
}

TEST(KeysTest, PrivateKeysDifferInEveryNumber) {
  const std::set<PageKey> keys = {MakePrivatePageKey(1, 2, 3), MakePrivatePageKey(9, 2, 3),
                                  MakePrivatePageKey(1, 9, 3), MakePrivatePageKey(1, 2, 9),
                                  MakePrivatePageKey(2, 1, 3)};
  EXPECT_EQ(keys.size(), 5u);
}

}  // namespace
}  // namespace pagetide
