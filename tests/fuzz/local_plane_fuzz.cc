// The hello of a local client: no bytes crash its parser, and what it takes whole it takes from
// every prefix as "not yet" and never from more.
#include "tests/fuzz/fuzz_check.h"
#include "worker/local_plane_wire.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  const absl::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto hello = ParseLocalHello(bytes);
  if (!hello.ok()) {
    FUZZ_CHECK(absl::IsInvalidArgument(hello.status()));
    return 0;
  }
  if (!hello->has_value()) return 0;
  for (size_t n = 0; n < size; n += 1 + n / 8) {
    const auto part = ParseLocalHello(bytes.substr(0, n));
    FUZZ_CHECK(part.ok() && !part->has_value());
  }
  FUZZ_CHECK(!ParseLocalHello(std::string(bytes) + "x").ok());
  return 0;
}
