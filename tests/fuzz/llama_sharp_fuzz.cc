// LLamaSharp conversations: no bytes crash the parser, and what it accepts is put together again
// bit for bit.
#include "formats/llama_sharp.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  const absl::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto file = ParseLlamaSharp(bytes);
  if (!file.ok()) {
    FUZZ_CHECK(absl::IsDataLoss(file.status()) || absl::IsInvalidArgument(file.status()));
    return 0;
  }
  FUZZ_CHECK(absl::StrCat(LlamaSharpPrefix(file->json, 0), file->state) == bytes);
  return 0;
}
