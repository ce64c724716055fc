// Conversations of LLamaSharp's BatchedExecutor (Conversation.Save): a big-endian header, JSON, and
// a llama.cpp sequence state. The format is specified in docs/formats/llama_sharp.md.
#ifndef PAGETIDE_FORMATS_LLAMA_SHARP_H_
#define PAGETIDE_FORMATS_LLAMA_SHARP_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "formats/llama_cpp.h"

namespace pagetide {

inline constexpr uint32_t kLlamaSharpMagic = 0xCC77C0B4;

// Views into the file that was parsed.
struct LlamaSharpFile {
  absl::string_view json;  // as it stands
  uint64_t version = 0;
  uint64_t token_count = 0;
  absl::string_view state;  // LlamaCppState::Parse reads it
};

// DATA_LOSS when it is cut, or its JSON is none or beyond limits (64 KiB, 8 levels);
// INVALID_ARGUMENT for another magic or version.
absl::StatusOr<LlamaSharpFile> ParseLlamaSharp(absl::string_view file);

// What stands in front of the state. Empty `json`: {"Version":1,"TokenCount":token_count}.
std::string LlamaSharpPrefix(absl::string_view json, uint64_t token_count);

}  // namespace pagetide

#endif  // PAGETIDE_FORMATS_LLAMA_SHARP_H_
