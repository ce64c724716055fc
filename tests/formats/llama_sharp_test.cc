#include "formats/llama_sharp.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "tests/formats/format_test_util.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

TEST(LlamaSharpTest, PrefixIsGolden) {
  EXPECT_EQ(absl::BytesToHexString(LlamaSharpPrefix("", 20).substr(0, 8)), "cc77c0b40000001d");
  EXPECT_EQ(LlamaSharpPrefix("", 20).substr(8), "{\"Version\":1,\"TokenCount\":20}");
}

TEST(LlamaSharpTest, ConversationAroundARealStateComesBack) {
  const std::string state = TestFile("llama_cpp_v2_full_plain.mem");
  const std::string file = LlamaSharpPrefix("", 20) + state;
  const auto parsed = ParseLlamaSharp(file);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->token_count, 20);
  const auto rows = LlamaCppState::Parse(parsed->state, {});
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ(rows->state().blocks[0].positions.size(), 20);
  EXPECT_EQ(LlamaSharpPrefix(parsed->json, 0) + std::string(parsed->state), file);
  CheckHostileVariants(file, [](absl::string_view bytes) {
    const auto cut = ParseLlamaSharp(bytes);
    if (!cut.ok()) return cut.status();
    LlamaCppHints hints;
    hints.num_bodies = 1;
    return LlamaCppState::Parse(cut->state, hints).status();
  });
}

TEST(LlamaSharpTest, JsonIsKeptAsItStands) {
  const std::string json = "{ \"TokenCount\": 3,\t\"Version\": 1, \"Other\": [1, {\"a\": null}] }";
  const std::string file = LlamaSharpPrefix(json, 0) + "state";
  const auto parsed = ParseLlamaSharp(file);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->json, json);
  EXPECT_EQ(parsed->state, "state");
}

TEST(LlamaSharpTest, HostileHeadersAreRefused) {
  const struct {
    std::string json;
    const char* text;
  } cases[] = {
      {"{\"Version\":1}", "no whole numbers"},
      {"{\"Version\":1,\"TokenCount\":-1}", "no whole numbers"},
      {"{\"Version\":1,\"TokenCount\":2147483648}", "no whole numbers"},
      {"{\"Version\":\"1\",\"TokenCount\":1}", "no whole numbers"},
      {"{\"Version\":1,\"TokenCount\":1", "not a JSON object"},
      {absl::StrCat("{\"a\":", std::string(2000, '[')), "deeper than 8"},
      {absl::StrCat("{\"a\":\"", std::string(70000, 'x'), "\"}"), "the limit is 65536"},
  };
  for (const auto& c : cases) {
    const absl::Status status = ParseLlamaSharp(LlamaSharpPrefix(c.json, 0)).status();
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.text));
  }
  const absl::Status version =
      ParseLlamaSharp(LlamaSharpPrefix("{\"Version\":2,\"TokenCount\":1}", 0)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(version)) << version;
  EXPECT_TRUE(absl::IsInvalidArgument(ParseLlamaSharp("\xb4\xc0\x77\xcc....").status()));
  // A header of 4 GiB in a file of 12 bytes.
  EXPECT_TRUE(absl::IsDataLoss(ParseLlamaSharp("\xcc\x77\xc0\xb4\xff\xff\xff\xff{}{}").status()));
}

}  // namespace
}  // namespace pagetide
