#include "formats/llama_sharp.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "formats/bounded_json.h"
#include "formats/byte_parser.h"

namespace pagetide {
namespace {

void AppendBigEndian32(std::string* out, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out->push_back(static_cast<char>(value >> shift));
}

}  // namespace

absl::StatusOr<LlamaSharpFile> ParseLlamaSharp(absl::string_view bytes) {
  ByteParser in("LLamaSharp conversation", bytes);
  PT_ASSIGN_OR_RETURN(const uint32_t magic, in.TakeBigEndian<uint32_t>("magic"));
  if (magic != kLlamaSharpMagic) {
    return absl::InvalidArgumentError(
        absl::StrCat("read LLamaSharp conversation: it begins with 0x",
                     absl::Hex(magic, absl::kZeroPad8), ", expected 0xcc77c0b4"));
  }
  PT_ASSIGN_OR_RETURN(const uint32_t n, in.TakeBigEndian<uint32_t>("header size"));
  LlamaSharpFile file;
  PT_ASSIGN_OR_RETURN(file.json, in.TakeRun("header", n, 1));
  JsonLimits limits;
  limits.max_bytes = 64 << 10;
  PT_ASSIGN_OR_RETURN(const nlohmann::json header,
                      ParseJsonObject("LLamaSharp conversation", file.json, limits));
  const auto version = header.find("Version");
  const auto count = header.find("TokenCount");
  if (version == header.end() || !version->is_number_unsigned() || count == header.end() ||
      !count->is_number_unsigned() ||
      count->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int32_t>::max())) {
    return in.DataLoss("its header has no whole numbers Version and TokenCount");
  }
  file.version = version->get<uint64_t>();
  file.token_count = count->get<uint64_t>();
  if (file.version != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("read LLamaSharp conversation: version ", file.version, ", known is 1"));
  }
  file.state = in.rest();
  return file;
}

std::string LlamaSharpPrefix(absl::string_view json, uint64_t token_count) {
  const std::string made = absl::StrCat("{\"Version\":1,\"TokenCount\":", token_count, "}");
  if (json.empty()) json = made;
  std::string out;
  AppendBigEndian32(&out, kLlamaSharpMagic);
  AppendBigEndian32(&out, static_cast<uint32_t>(json.size()));
  out.append(json.data(), json.size());
  return out;
}

}  // namespace pagetide
