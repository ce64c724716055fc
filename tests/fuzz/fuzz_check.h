// What fuzz targets share: an assertion that stays in optimised builds, and taking an input apart.
#ifndef PAGETIDE_TESTS_FUZZ_FUZZ_CHECK_H_
#define PAGETIDE_TESTS_FUZZ_FUZZ_CHECK_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/string_view.h"

// Aborts, which the fuzzer records as a crash, unless `condition` holds.
#define FUZZ_CHECK(condition)                                                             \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                       \
    }                                                                                     \
  } while (false)

namespace pagetide {

// Takes choices off the front of a fuzz input; zeros once it is used up.
class FuzzInput {
 public:
  FuzzInput(const uint8_t* data, size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

  template <typename T>
  T Take() {
    T value{};
    const size_t n = sizeof(T) < rest_.size() ? sizeof(T) : rest_.size();
    std::memcpy(&value, rest_.data(), n);
    rest_.remove_prefix(n);
    return value;
  }
  // A number below `n`.
  uint32_t Below(uint32_t n) { return Take<uint16_t>() % n; }
  absl::string_view TakeBytes(size_t n) {
    const absl::string_view out = rest_.substr(0, n);
    rest_.remove_prefix(out.size());
    return out;
  }
  bool empty() const { return rest_.empty(); }
  absl::string_view rest() const { return rest_; }

 private:
  absl::string_view rest_;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_FUZZ_FUZZ_CHECK_H_
