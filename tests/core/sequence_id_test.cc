#include "core/sequence_id.h"

#include <random>
#include <string>

#include "gtest/gtest.h"

namespace pagetide {
namespace {

TEST(SequenceIdTest, WritesBothNumbersInHex) {
  EXPECT_EQ((SequenceId{0x1234, 0}).ToString(), "0000000000001234-0");
  EXPECT_EQ((SequenceId{~uint64_t{0}, ~uint64_t{0}}).ToString(),
            "ffffffffffffffff-ffffffffffffffff");
}

TEST(SequenceIdTest, RoundTrips) {
  std::mt19937_64 rng(1);
  for (int i = 0; i < 2000; ++i) {
    const SequenceId id{rng() >> (rng() % 64), rng() >> (rng() % 64)};
    const auto parsed = SequenceId::Parse(id.ToString());
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    ASSERT_EQ(*parsed, id);
  }
}

TEST(SequenceIdTest, RefusesEveryOtherSpelling) {
  for (const std::string& text :
       {std::string(), std::string("-"), std::string("0000000000001234"),
        std::string("0000000000001234-"), std::string("1234-0"), std::string("000000000000123g-0"),
        std::string("000000000000ABCD-0"), std::string("0000000000001234-01"),
        std::string("0000000000001234-0x1"), std::string("0000000000001234--1"),
        std::string("0000000000001234- 1"), std::string("0000000000001234-1 "),
        std::string("0000000000001234_1"), std::string("0x00000000001234-1"),
        std::string("0000000000001234-1\0", 19),
        std::string("0000000000001234-10000000000000000")}) {
    EXPECT_EQ(SequenceId::Parse(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

}  // namespace
}  // namespace pagetide
