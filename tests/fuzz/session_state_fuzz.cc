// Saved states of sequences: no bytes crash the parser, and what it accepts is written again bit
// for bit. Input: one byte (pages of the manifest, and whether the checksum is made right first),
// then the state.
#include "core/session_state.h"

#include <string>

#include "tests/fuzz/fuzz_check.h"
#include "tests/fuzz/fuzz_checksums.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  const uint8_t choice = in.Take<uint8_t>();
  std::string bytes(in.rest());
  if ((choice & 1) != 0) bytes = WithChecksumAtEnd(bytes);
  const auto state = ParseSessionState(bytes, choice >> 1);
  if (state.ok()) {
    FUZZ_CHECK(EncodeSessionState(*state) == bytes);
    (void)ValidateSessionMetadata(state->metadata);
  }
  const auto summary = ParseSessionSummary(in.rest());
  if (summary.ok()) FUZZ_CHECK(EncodeSessionSummary(*summary) == in.rest());
  return 0;
}
