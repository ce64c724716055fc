#include "base/byte_size.h"

#include <string>

#include "gtest/gtest.h"

namespace pagetide {
namespace {

TEST(ByteSizeTest, ParsesNumbersWithBinaryUnits) {
  EXPECT_EQ(*ParseByteSize("0"), 0u);
  EXPECT_EQ(*ParseByteSize("65536"), 65536u);
  EXPECT_EQ(*ParseByteSize("7B"), 7u);
  EXPECT_EQ(*ParseByteSize("512MiB"), 512 * kMiB);
  EXPECT_EQ(*ParseByteSize("2 GiB"), 2 * kGiB);
  EXPECT_EQ(*ParseByteSize("1TiB"), 1024 * kGiB);
  EXPECT_EQ(*ParseByteSize("18446744073709551615"), ~uint64_t{0});
}

TEST(ByteSizeTest, RefusesEverythingElse) {
  for (const char* text : {"", "MiB", "-1", "+1", "1.5GiB", "1MB", "1mib", "1 MiB x", "0x10",
                           "18446744073709551616", "16777216TiB", "18014398509481984KiB"}) {
    EXPECT_EQ(ParseByteSize(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

TEST(ByteSizeTest, FormatsInTheLargestUnit) {
  EXPECT_EQ(FormatByteSize(0), "0 B");
  EXPECT_EQ(FormatByteSize(1023), "1023 B");
  EXPECT_EQ(FormatByteSize(1024), "1 KiB");
  EXPECT_EQ(FormatByteSize(3 * kMiB / 2), "1.5 MiB");
  EXPECT_EQ(FormatByteSize(4096 * 1024 * kGiB), "4096 TiB");
}

}  // namespace
}  // namespace pagetide
