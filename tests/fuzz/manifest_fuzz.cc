// Manifests and the entries that lists keep of them: no bytes crash the parsers, and what they
// accept is written in the newest form, which stays as it is. Input: one byte (manifest or entry,
// and whether the checksum at the end is made right first, which no mutation would guess), then the
// record.
#include <string>

#include "kvstore/manifest_record.h"
#include "tests/fuzz/fuzz_check.h"
#include "tests/fuzz/fuzz_checksums.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  const uint8_t choice = in.Take<uint8_t>();
  std::string bytes(in.rest());
  if ((choice & 2) != 0) bytes = WithChecksumAtEnd(bytes);
  if ((choice & 1) != 0) {
    const auto entry = ParseManifestEntry(bytes);
    if (!entry.ok()) return 0;
    const std::string once = EncodeManifestEntry(*entry);
    const auto again = ParseManifestEntry(once);
    FUZZ_CHECK(again.ok());
    FUZZ_CHECK(EncodeManifestEntry(*again) == once);
    return 0;
  }
  const auto manifest = ParseManifest(bytes);
  if (!manifest.ok()) return 0;
  const std::string once = EncodeManifest(*manifest);
  const auto again = ParseManifest(once);
  FUZZ_CHECK(again.ok());
  FUZZ_CHECK(again->pages.size() == manifest->pages.size());
  FUZZ_CHECK(again->payload == manifest->payload);
  FUZZ_CHECK(EncodeManifest(*again) == once);
  return 0;
}
