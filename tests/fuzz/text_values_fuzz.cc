// Small values that people and clients write: sizes, ids, digests, names. No text crashes a parser,
// and what one accepts it prints again as the same value.
#include <string>

#include "base/byte_size.h"
#include "base/digest.h"
#include "core/model.h"
#include "core/sequence_id.h"
#include "replay/trace.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  if (const auto bytes = ParseByteSize(text); bytes.ok()) {
    const auto again = ParseByteSize(std::to_string(*bytes));
    FUZZ_CHECK(again.ok() && *again == *bytes);
    FUZZ_CHECK(!FormatByteSize(*bytes).empty());
  }
  if (const auto id = SequenceId::Parse(text); id.ok()) FUZZ_CHECK(id->ToString() == text);
  if (const auto digest = Digest::FromHex(text); digest.ok()) {
    const auto again = Digest::FromHex(digest->ToHex());
    FUZZ_CHECK(again.ok() && *again == *digest);
  }
  if (ValidateName("name", text).ok()) FUZZ_CHECK(!text.empty() && text.size() <= 128);
  if (const auto format = ParseTraceFormat(text); format.ok()) {
    FUZZ_CHECK(TraceFormatName(*format) == text);
  }
  return 0;
}
