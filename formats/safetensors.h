// The header of a safetensors file: which tensors it has, of what type and shape, and where.
// Format: u64 LE n, n bytes of JSON (spaces may follow it), then the tensors' bytes without gaps.
// Source: the format section of the safetensors README.
#ifndef PAGETIDE_FORMATS_SAFETENSORS_H_
#define PAGETIDE_FORMATS_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pagetide {

struct SafetensorsTensor {
  std::string name;
  std::string dtype;  // "F16", "I32", …
  std::vector<uint64_t> shape;
  // Bytes from the start of the data part.
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t bytes() const { return end - begin; }
};

struct SafetensorsHeader {
  // As they lie in the file. Their bytes follow one another without gap or overlap.
  std::vector<SafetensorsTensor> tensors;
  std::map<std::string, std::string> metadata;
  std::string json;  // as it stands, with its padding
  uint64_t data_bytes = 0;
  uint64_t data_offset() const { return 8 + json.size(); }
  uint64_t file_bytes() const { return data_offset() + data_bytes; }
};

// Reads the header at the front of `bytes`, which need not hold the data. DATA_LOSS unless it is
// whole, within limits (8 MiB of JSON), and its tensors cover the data part exactly.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view bytes);

// Bytes of an element; 0 for a type that is not known.
uint64_t SafetensorsElementBytes(absl::string_view dtype);

}  // namespace pagetide

#endif  // PAGETIDE_FORMATS_SAFETENSORS_H_
