#include "base/copy_bytes.h"

#include <cstring>

namespace pagetide {
namespace {

// From here on memcpy may take REP MOVSB; up to where it takes stores that pass the caches by.
constexpr size_t kFirst = 2 << 10;
constexpr size_t kLast = 4 << 20;

#if defined(__x86_64__)
struct Block {
  unsigned char bytes[32];  // a register's worth, at any address
};

// A multiple of 128 bytes.
__attribute__((target("avx2"))) void CopyBlocks(const std::byte* from, std::byte* to,
                                                size_t num_bytes) {
  for (size_t at = 0; at < num_bytes; at += 4 * sizeof(Block)) {
    Block a, b, c, d;
    std::memcpy(&a, from + at, sizeof(Block));
    std::memcpy(&b, from + at + sizeof(Block), sizeof(Block));
    std::memcpy(&c, from + at + 2 * sizeof(Block), sizeof(Block));
    std::memcpy(&d, from + at + 3 * sizeof(Block), sizeof(Block));
    std::memcpy(to + at, &a, sizeof(Block));
    std::memcpy(to + at + sizeof(Block), &b, sizeof(Block));
    std::memcpy(to + at + 2 * sizeof(Block), &c, sizeof(Block));
    std::memcpy(to + at + 3 * sizeof(Block), &d, sizeof(Block));
  }
}

bool HasAvx2() {
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}
#endif

}  // namespace

void CopyBytes(std::span<const std::byte> from, std::byte* to) {
  size_t done = 0;
#if defined(__x86_64__)
  if (from.size() >= kFirst && from.size() < kLast && HasAvx2()) {
    done = from.size() / 128 * 128;
    CopyBlocks(from.data(), to, done);
  }
#endif
  if (done < from.size()) std::memcpy(to + done, from.data() + done, from.size() - done);
}

}  // namespace pagetide
