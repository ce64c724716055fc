#include "formats/safetensors.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "formats/bounded_json.h"
#include "formats/byte_parser.h"

namespace pagetide {
namespace {

constexpr uint64_t kMaxHeaderBytes = uint64_t{8} << 20;
constexpr size_t kMaxRank = 16;

struct ElementType {
  const char* name;
  uint64_t bytes;
};
constexpr ElementType kTypes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
    {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},
    {"I32", 4},  {"F32", 4}, {"U64", 8}, {"I64", 8},     {"F64", 8},
};

template <typename... Args>
absl::Status Bad(const Args&... args) {
  return absl::DataLossError(absl::StrCat("read safetensors header: ", args...));
}

// A whole number below 2^63.
absl::StatusOr<uint64_t> Number(const nlohmann::json& value, const std::string& name,
                                absl::string_view field) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() >> 63 != 0) {
    return Bad("tensor \"", name, "\": ", field, " has an entry that is no whole number");
  }
  return value.get<uint64_t>();
}

absl::StatusOr<SafetensorsTensor> ParseTensor(const std::string& name,
                                              const nlohmann::json& value) {
  SafetensorsTensor tensor;
  tensor.name = name;
  if (!value.is_object()) return Bad("tensor \"", name, "\" is no object");
  const auto dtype = value.find("dtype");
  const auto shape = value.find("shape");
  const auto offsets = value.find("data_offsets");
  if (dtype == value.end() || !dtype->is_string() || shape == value.end() || !shape->is_array() ||
      shape->size() > kMaxRank || offsets == value.end() || !offsets->is_array() ||
      offsets->size() != 2) {
    return Bad("tensor \"", name, "\" lacks a dtype, a shape of at most ", kMaxRank,
               " dimensions, or two data_offsets");
  }
  tensor.dtype = dtype->get<std::string>();
  const uint64_t element = SafetensorsElementBytes(tensor.dtype);
  if (element == 0)
    return Bad("tensor \"", name, "\" has the unknown dtype \"", tensor.dtype, "\"");
  PT_ASSIGN_OR_RETURN(tensor.begin, Number((*offsets)[0], name, "data_offsets"));
  PT_ASSIGN_OR_RETURN(tensor.end, Number((*offsets)[1], name, "data_offsets"));
  uint64_t bytes = element;
  bool overflows = false;
  for (const nlohmann::json& entry : *shape) {
    PT_ASSIGN_OR_RETURN(const uint64_t dim, Number(entry, name, "shape"));
    tensor.shape.push_back(dim);
    overflows = overflows || __builtin_mul_overflow(bytes, dim, &bytes);
  }
  if (overflows || tensor.end < tensor.begin || tensor.bytes() != bytes) {
    return Bad("tensor \"", name, "\" lies at ", tensor.begin, " to ", tensor.end,
               ", which is not what its shape needs");
  }
  return tensor;
}

}  // namespace

uint64_t SafetensorsElementBytes(absl::string_view dtype) {
  for (const ElementType& type : kTypes) {
    if (dtype == type.name) return type.bytes;
  }
  return 0;
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view bytes) {
  ByteParser in("safetensors header", bytes);
  PT_ASSIGN_OR_RETURN(const uint64_t n, in.TakeLittleEndian<uint64_t>("header size"));
  if (n > kMaxHeaderBytes) return Bad("its size is ", n, " bytes, the limit is ", kMaxHeaderBytes);
  PT_ASSIGN_OR_RETURN(const absl::string_view json, in.TakeRun("header", n, 1));
  JsonLimits limits;
  limits.max_bytes = kMaxHeaderBytes;
  limits.max_depth = 3;
  PT_ASSIGN_OR_RETURN(const nlohmann::json object,
                      ParseJsonObject("safetensors header", json, limits));
  SafetensorsHeader header;
  header.json = std::string(json);
  for (const auto& [name, value] : object.items()) {
    if (name != "__metadata__") {
      PT_ASSIGN_OR_RETURN(SafetensorsTensor tensor, ParseTensor(name, value));
      header.tensors.push_back(std::move(tensor));
      continue;
    }
    if (!value.is_object()) return Bad("__metadata__ is no object");
    for (const auto& [key, entry] : value.items()) {
      if (!entry.is_string()) return Bad("metadata \"", key, "\" is no string");
      header.metadata[key] = entry.get<std::string>();
    }
  }
  // Empty tensors before what begins at the same byte.
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
              return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
            });
  for (const SafetensorsTensor& tensor : header.tensors) {
    if (tensor.begin != header.data_bytes) {
      return Bad("tensor \"", tensor.name, "\" begins at ", tensor.begin,
                 ", the one before ends at ", header.data_bytes);
    }
    header.data_bytes = tensor.end;
  }
  return header;
}

}  // namespace pagetide
