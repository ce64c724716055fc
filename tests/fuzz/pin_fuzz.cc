// What the store keeps of pins and of the retention of pages: no bytes crash a parser, and what one
// accepts it writes again as the same value. Input: the record.
#include <string>

#include "absl/status/status.h"
#include "kvstore/retention.h"
#include "tests/fuzz/fuzz_check.h"
#include "worker/retention.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  const absl::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto pin = ParsePinSummary(bytes);
  if (pin.ok()) {
    FUZZ_CHECK(EncodePinSummary(*pin) == bytes);
  } else {
    FUZZ_CHECK(absl::IsDataLoss(pin.status()) || absl::IsUnimplemented(pin.status()));
  }
  if (const auto retention = ParseRetention(bytes); retention.ok()) {
    const auto again = ParseRetention(EncodeRetention(*retention));
    FUZZ_CHECK(again.ok() && EncodeRetention(*again) == EncodeRetention(*retention));
  }
  return 0;
}
