// Makes checksums of fuzzed records right, so that mutations reach what lies behind the check.
#ifndef PAGETIDE_TESTS_FUZZ_FUZZ_CHECKSUMS_H_
#define PAGETIDE_TESTS_FUZZ_FUZZ_CHECKSUMS_H_

#include <span>
#include <string>

#include "base/checksum.h"
#include "base/little_endian.h"

namespace pagetide {

inline Checksum128 ChecksumOfText(const std::string& text) {
  return ChecksumOf(std::as_bytes(std::span(text.data(), text.size())));
}

// The last 16 bytes of `record` replaced by the XXH3-128 of those before them.
inline std::string WithChecksumAtEnd(std::string record) {
  record.resize(record.size() < 16 ? 0 : record.size() - 16);
  const Checksum128 checksum = ChecksumOfText(record);
  AppendLittleEndian<uint64_t>(&record, checksum.low);
  AppendLittleEndian<uint64_t>(&record, checksum.high);
  return record;
}

// As kvstore/page_record.h has it: 8 bytes at 184, over the bytes before and the numerics id
// behind, whose length is the u16 at 172.
inline void RepairPageRecordHeader(std::string* header) {
  if (header->size() < 192) return;
  LittleEndianReader length(absl::string_view(*header).substr(172));
  const std::string covered = header->substr(0, 184) + header->substr(192, length.Take<uint16_t>());
  std::string checksum;
  AppendLittleEndian<uint64_t>(&checksum, ChecksumOfText(covered).low);
  header->replace(184, 8, checksum);
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_FUZZ_FUZZ_CHECKSUMS_H_
