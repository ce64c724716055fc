// Stored records: no bytes crash the parsers of page records and manifests, and what they accept is
// stable.
#include "kvstore/page_record.h"

#include <string>

#include "kvstore/manifest_record.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes(reinterpret_cast<const char*>(data), size);
  if (const auto header = pagetide::ParsePageRecordHeader(bytes); header.ok()) {
    const std::string again = pagetide::EncodePageRecordHeader(header->meta);
    const auto reparsed = pagetide::ParsePageRecordHeader(again);
    FUZZ_CHECK(reparsed.ok());
    FUZZ_CHECK(reparsed->meta.key == header->meta.key);
  }
  if (const auto manifest = pagetide::ParseManifest(bytes); manifest.ok()) {
    FUZZ_CHECK(pagetide::EncodeManifest(*manifest) == bytes);
  }
  return 0;
}
