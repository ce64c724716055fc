// libFuzzer target: no bytes make the parsers of stored formats crash, and what they accept is
// stable.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "absl/strings/string_view.h"
#include "kvstore/manifest_record.h"
#include "kvstore/page_record.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes(reinterpret_cast<const char*>(data), size);
  if (const auto header = pagetide::ParsePageRecordHeader(bytes); header.ok()) {
    const std::string again = pagetide::EncodePageRecordHeader(header->meta);
    const auto reparsed = pagetide::ParsePageRecordHeader(again);
    if (!reparsed.ok() || reparsed->meta.key != header->meta.key) std::abort();
  }
  if (const auto manifest = pagetide::ParseManifest(bytes); manifest.ok()) {
    if (pagetide::EncodeManifest(*manifest) != bytes) std::abort();
  }
  return 0;
}
