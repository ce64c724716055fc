#include "base/copy_bytes.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace pagetide {
namespace {

TEST(CopyBytesTest, EverySizeAndAlignmentIsExactAndStaysInside) {
  constexpr size_t kLargest = (4 << 20) + 5;
  constexpr std::byte kEdge{0xee};
  std::vector<std::byte> source(kLargest + 64);
  uint32_t x = 1;
  for (std::byte& b : source) b = static_cast<std::byte>((x = x * 1664525 + 1013904223) >> 24);
  std::vector<std::byte> target(kLargest + 128);
  for (const size_t size : {0, 1, 31, 127, 128, 2047, 2048, 2049, 2175, 2176, 65536, 65599,
                            (4 << 20) - 1, 4 << 20, (4 << 20) + 5}) {
    for (const size_t from : {0, 1, 16, 33}) {
      for (const size_t to : {32, 33, 48}) {
        std::memset(target.data(), static_cast<int>(kEdge), size + 128);
        CopyBytes(std::span(source).subspan(from, size), target.data() + to);
        ASSERT_EQ(std::memcmp(source.data() + from, target.data() + to, size), 0)
            << size << " bytes, " << from << " to " << to;
        ASSERT_EQ(target[to - 1], kEdge) << size;
        ASSERT_EQ(target[to + size], kEdge) << size;
      }
    }
  }
}

}  // namespace
}  // namespace pagetide
