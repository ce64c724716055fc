// llama.cpp states: no bytes crash the parser, and what it accepts is written back bit for bit.
// Input: one byte of hints, then the state.
#include "formats/llama_cpp.h"

#include <string>
#include <vector>

#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  const uint8_t choice = in.Take<uint8_t>();
  LlamaCppHints hints;
  hints.has_v = (choice & 1) == 0;
  hints.cell_ext_bytes = (choice & 2) == 0 ? 0 : (choice & 4) == 0 ? 8 : 12;
  hints.num_bodies = (choice >> 3) % 3;
  const absl::string_view bytes = in.rest();
  const auto state = LlamaCppState::Parse(bytes, hints);
  if (!state.ok()) {
    FUZZ_CHECK(absl::IsDataLoss(state.status()) || absl::IsInvalidArgument(state.status()));
    return 0;
  }
  std::string again;
  const absl::Status written =
      WriteLlamaCpp(state->layout(), state->state(), *state, [&](absl::string_view part) {
        FUZZ_CHECK(part.size() <= kMaxSinkBytes);
        again.append(part.data(), part.size());
        return absl::OkStatus();
      });
  FUZZ_CHECK(written.ok());
  FUZZ_CHECK(again == bytes);
  FUZZ_CHECK(LlamaCppStateBytes(state->layout(), state->state()).value_or(0) == again.size());
  return 0;
}
