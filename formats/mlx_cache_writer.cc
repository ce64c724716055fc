#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/little_endian.h"
#include "base/status_macros.h"
#include "formats/mlx_cache.h"
#include "nlohmann/json.hpp"

namespace pagetide {
namespace {

constexpr uint64_t kMaxScratchBytes = uint64_t{8} << 20;

absl::string_view View(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Bytes in parts that a sink takes.
class Parts {
 public:
  explicit Parts(ByteSink sink) : sink_(sink) {}
  absl::Status Put(absl::string_view bytes) {
    while (!bytes.empty()) {
      const size_t n = std::min(bytes.size(), kMaxSinkBytes - pending_.size());
      pending_.append(bytes.data(), n);
      bytes.remove_prefix(n);
      if (pending_.size() == kMaxSinkBytes) PT_RETURN_IF_ERROR(Flush());
    }
    return absl::OkStatus();
  }
  absl::Status PutZeros(uint64_t n) {
    static constexpr char kZeros[4096] = {};
    for (; n > 0; n -= std::min<uint64_t>(n, sizeof(kZeros))) {
      PT_RETURN_IF_ERROR(Put({kZeros, static_cast<size_t>(std::min<uint64_t>(n, sizeof(kZeros)))}));
    }
    return absl::OkStatus();
  }
  absl::Status Flush() {
    if (pending_.empty()) return absl::OkStatus();
    PT_RETURN_IF_ERROR(sink_(pending_));
    pending_.clear();
    return absl::OkStatus();
  }

 private:
  ByteSink sink_;
  std::string pending_;
};

// One array, head by head: rows are read whole, and the head's piece of each is written.
absl::Status WriteArray(const MlxLayer::Array& array, uint64_t piece_at, uint64_t row_bytes,
                        uint64_t valid, const RowReader& rows, RowRange range, Parts* out) {
  const uint64_t step = std::max<uint64_t>(1, kMaxScratchBytes / row_bytes);
  std::vector<std::byte> buffer;
  std::vector<std::byte> pieces;
  uint64_t buffered_first = 0;
  for (uint64_t h = 0; h < array.heads; ++h) {
    for (uint64_t first = 0; first < valid; first += range.count) {
      range.first = first;
      range.count = std::min(step, valid - first);
      // All rows of a short layer stay in the buffer from head to head.
      if (buffer.size() != range.count * row_bytes || buffered_first != first) {
        buffer.resize(range.count * row_bytes);
        PT_RETURN_IF_ERROR(rows.ReadRows(range, buffer));
        buffered_first = first;
      }
      pieces.resize(range.count * array.head_bytes);
      for (uint64_t r = 0; r < range.count; ++r) {
        std::memcpy(pieces.data() + r * array.head_bytes,
                    buffer.data() + r * row_bytes + piece_at + h * array.head_bytes,
                    array.head_bytes);
      }
      PT_RETURN_IF_ERROR(out->Put(View(pieces)));
    }
    PT_RETURN_IF_ERROR(out->PutZeros((array.rows - valid) * array.head_bytes));
  }
  return absl::OkStatus();
}

struct ArrayPlace {
  const MlxLayer::Array* array = nullptr;
  uint64_t piece_at = 0;
  uint64_t row_bytes = 0;
  uint64_t valid = 0;
  RowRange range;
};

absl::string_view MlxTypeName(DataType type) {
  switch (type) {
    case DataType::kF32:
      return "F32";
    case DataType::kF16:
      return "F16";
    case DataType::kBF16:
      return "BF16";
    default:
      return "";
  }
}

}  // namespace

absl::Status WriteMlxCache(const MlxCache& layout, const RowReader& rows, ByteSink sink) {
  // Arrays by where they begin; two cannot begin at one byte unless one is empty.
  std::map<uint64_t, ArrayPlace> places;
  for (size_t b = 0; b < layout.state_.blocks.size(); ++b) {
    const RowBlock& block = layout.state_.blocks[b];
    for (size_t l = 0; l < block.layers.size(); ++l) {
      const MlxLayer& layer = layout.LayerOf(b, l);
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        uint64_t at = 0;
        for (const MlxLayer::Array& array : kind == RowKind::kK ? layer.keys : layer.values) {
          const uint64_t row_bytes = block.layers[l].of(kind).bytes;
          if (array.rows > 0) {
            places[array.begin] = {&array, at, row_bytes, block.positions.size(), {b, l, kind}};
          }
          at += array.heads * array.head_bytes;
        }
      }
    }
  }
  Parts out(sink);
  std::string size;
  AppendLittleEndian<uint64_t>(&size, layout.header_.json.size());
  PT_RETURN_IF_ERROR(out.Put(size));
  PT_RETURN_IF_ERROR(out.Put(layout.header_.json));
  for (const SafetensorsTensor& tensor : layout.header_.tensors) {
    if (tensor.bytes() == 0) continue;
    if (const auto scalar = layout.scalars_.find(tensor.name); scalar != layout.scalars_.end()) {
      PT_RETURN_IF_ERROR(out.Put(scalar->second));
      continue;
    }
    const ArrayPlace& p = places.at(tensor.begin);
    PT_RETURN_IF_ERROR(WriteArray(*p.array, p.piece_at, p.row_bytes, p.valid, rows, p.range, &out));
  }
  return out.Flush();
}

absl::StatusOr<MlxCache> ComposeMlxLayout(const MlxComposeOptions& options) {
  nlohmann::json header = nlohmann::json::object();
  nlohmann::json& metadata = header["__metadata__"] = nlohmann::json::object();
  const std::string user = options.legacy ? "1." : "0.";
  const std::string classes = options.legacy ? "2." : "1.";
  for (const auto& [key, value] : options.user_metadata) metadata[user + key] = value;
  if (!options.legacy) metadata["2.0"] = "";
  std::string scalars;
  uint64_t at = 0;
  const auto add = [&](const std::string& name, absl::string_view dtype,
                       const std::vector<uint64_t>& shape) {
    uint64_t bytes = SafetensorsElementBytes(dtype);
    for (const uint64_t dim : shape) bytes *= dim;
    header[name] = {
        {"dtype", std::string(dtype)}, {"shape", shape}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  };
  for (size_t i = 0; i < options.layers.size(); ++i) {
    const MlxComposeOptions::Layer& layer = options.layers[i];
    const absl::string_view dtype = MlxTypeName(layer.type);
    if (dtype.empty()) {
      return absl::FailedPreconditionError(absl::StrCat("write MLX prompt cache: layer ", i, " is ",
                                                        DataTypeName(layer.type),
                                                        "; MLX has f32, f16 and bf16"));
    }
    add(absl::StrCat(i, ".0"), dtype, {1, layer.heads, options.rows, layer.k_dim});
    add(absl::StrCat(i, ".1"), dtype, {1, layer.heads, options.rows, layer.v_dim});
    metadata[absl::StrCat(classes, i)] = "KVCache";
    if (options.legacy) {
      metadata[absl::StrCat("0.", i)] = "";
      continue;
    }
    add(absl::StrCat(i, ".2"), "I32", {});
    AppendLittleEndian<uint32_t>(&scalars, static_cast<uint32_t>(options.rows));
    metadata[absl::StrCat("2.", i + 1, ".0")] = absl::StrCat(i, ".2");
    metadata[absl::StrCat("2.", i + 1, ".1")] = "scalar";
  }
  // Strict dumping throws on text that is not UTF-8: replaced instead.
  std::string json = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  json.append((8 - json.size() % 8) % 8, ' ');
  std::string layout;
  AppendLittleEndian<uint64_t>(&layout, json.size());
  return MlxCache::FromLayout(layout + json + scalars, options.rows);
}

}  // namespace pagetide
