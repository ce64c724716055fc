#include "clients/cpp/request_id.h"

#include <cstdint>
#include <random>

#include "absl/strings/str_cat.h"

namespace pagetide {

std::string NewRequestId() {
  // One engine a thread, seeded by the system: no lock, no shared state.
  thread_local std::mt19937_64 random = [] {
    std::random_device device;
    std::seed_seq seed{device(), device(), device(), device(), device(), device()};
    return std::mt19937_64(seed);
  }();
  return absl::StrCat(absl::Hex(random(), absl::kZeroPad16), absl::Hex(random(), absl::kZeroPad16));
}

}  // namespace pagetide
