// Headers of stored pages: no bytes crash the parser, and what it accepts is stable.
// Input: one byte (whether the header's checksum is made right first), then the header.
#include "kvstore/page_record.h"

#include <string>

#include "tests/fuzz/fuzz_check.h"
#include "tests/fuzz/fuzz_checksums.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  const bool repair = in.Take<uint8_t>() % 2 == 1;
  std::string bytes(in.rest());
  if (repair) RepairPageRecordHeader(&bytes);
  const auto header = ParsePageRecordHeader(bytes);
  if (!header.ok()) return 0;
  const auto encode = [](const PageRecordHeader& h) {
    return h.codec == PageCodec::kRaw ? EncodePageRecordHeader(h.meta)
                                      : EncodeCompressedRecordHeader(h.meta, h.stored_bytes);
  };
  const std::string again = encode(*header);
  const auto reparsed = ParsePageRecordHeader(again);
  FUZZ_CHECK(reparsed.ok());
  FUZZ_CHECK(reparsed->meta.key == header->meta.key);
  FUZZ_CHECK(encode(*reparsed) == again);
  return 0;
}
