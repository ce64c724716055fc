#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/little_endian.h"
#include "base/status_macros.h"
#include "formats/mlx_cache.h"

namespace pagetide {
namespace {

// Tokens, rows and elements of a row are far below this, so that products of three do not overflow.
constexpr uint64_t kMaxCount = uint64_t{1} << 31;
// Layers of one model are of a few kinds, and those of a kind hold the same rows in the same order.
constexpr size_t kMaxRowOrders = 16;

template <typename... Args>
absl::Status Bad(const Args&... args) {
  return absl::DataLossError(absl::StrCat("read MLX prompt cache: ", args...));
}

std::optional<DataType> DataTypeOf(absl::string_view dtype) {
  if (dtype == "F32") return DataType::kF32;
  if (dtype == "F16") return DataType::kF16;
  if (dtype == "BF16") return DataType::kBF16;
  return std::nullopt;
}

uint64_t RowBytes(const std::vector<MlxLayer::Array>& arrays) {
  uint64_t bytes = 0;
  for (const MlxLayer::Array& array : arrays) bytes += array.heads * array.head_bytes;
  return bytes;
}

// What decides the positions of a layer's rows.
struct RowOrder {
  uint64_t valid = 0;  // rows that count, from the first on
  uint64_t first = 0;  // position of the first, unless the cache is a ring
  bool is_ring = false;
  uint64_t offset = 0, keep = 0, index = 0;
  auto Key() const { return std::tie(valid, first, is_ring, offset, keep, index); }
};

// A ring in temporal order: the kept rows, then those from `index` on, then those before it. The
// newest row has position offset - 1.
uint32_t PositionOf(const RowOrder& order, uint64_t row) {
  if (!order.is_ring) return static_cast<uint32_t>(order.first + row);
  if (row < order.keep) return static_cast<uint32_t>(row);
  const uint64_t rows = order.valid;
  const uint64_t time = order.index == rows  ? row
                        : row >= order.index ? order.keep + (row - order.index)
                                             : rows - order.index + row;
  return static_cast<uint32_t>(order.offset - (rows - time));
}

}  // namespace

absl::string_view MlxCacheClassName(MlxCacheClass c) {
  switch (c) {
    case MlxCacheClass::kPlain:
      return "KVCache";
    case MlxCacheClass::kRotating:
      return "RotatingKVCache";
    case MlxCacheClass::kQuantized:
      return "QuantizedKVCache";
    case MlxCacheClass::kChunked:
      return "ChunkedKVCache";
  }
  return "?";
}

class MlxCache::Parser {
 public:
  Parser(SafetensorsHeader header, absl::string_view data, bool has_data, uint64_t max_rows)
      : max_rows_(max_rows) {
    out_.header_ = std::move(header);
    out_.data_ = data;
    out_.has_data_ = has_data;
  }

  absl::StatusOr<MlxCache> Parse() {
    for (const SafetensorsTensor& tensor : out_.header_.tensors) {
      unused_.emplace(tensor.name, &tensor);
    }
    PT_RETURN_IF_ERROR(ReadScalars());
    const auto& metadata = out_.header_.metadata;
    // From 0.32 on the third list holds the scalars, and begins with an empty string.
    const auto third = metadata.find("2.0");
    if (third == metadata.end()) return Bad("its metadata have no entry 2.0");
    out_.is_legacy_ = !third->second.empty();
    const absl::string_view user = out_.is_legacy_ ? "1." : "0.";
    const std::string classes = out_.is_legacy_ ? "2." : "1.";
    for (const auto& [key, value] : metadata) {
      if (absl::StartsWith(key, user)) out_.user_metadata_[key.substr(2)] = value;
    }
    for (uint64_t i = 0;; ++i) {
      const auto name = metadata.find(absl::StrCat(classes, i));
      if (name == metadata.end()) break;
      if (i == kMaxLayers) return Bad("it has more than ", kMaxLayers, " layers");
      PT_RETURN_IF_ERROR(ParseLayer(i, name->second));
    }
    if (out_.layers_.empty()) return Bad("it names no cache class");
    if (!unused_.empty()) {
      return Bad("tensor \"", unused_.begin()->first, "\" belongs to none of its ",
                 out_.layers_.size(), " layers");
    }
    PT_RETURN_IF_ERROR(MakeBlocks());
    return std::move(out_);
  }

 private:
  // Scalars are tensors without dimensions. In a layout their bytes follow the header.
  absl::Status ReadScalars() {
    absl::string_view packed = out_.data_;
    for (const SafetensorsTensor& tensor : out_.header_.tensors) {
      if (!tensor.shape.empty()) continue;
      absl::string_view raw;
      if (out_.has_data_) {
        raw = out_.data_.substr(tensor.begin, tensor.bytes());
      } else {
        if (packed.size() < tensor.bytes()) return Bad("a layout lacks scalar ", tensor.name);
        raw = packed.substr(0, tensor.bytes());
        packed.remove_prefix(tensor.bytes());
      }
      out_.scalars_[tensor.name] = std::string(raw);
    }
    if (!out_.has_data_) {
      if (!packed.empty()) return Bad("a layout has ", packed.size(), " bytes too many");
      out_.data_ = {};
    }
    return absl::OkStatus();
  }

  absl::StatusOr<const SafetensorsTensor*> Use(const std::string& name) {
    const auto it = unused_.find(name);
    if (it == unused_.end()) return Bad("tensor \"", name, "\" is missing");
    const SafetensorsTensor* tensor = it->second;
    unused_.erase(it);
    return tensor;
  }

  // Number `j` of layer `i`: a scalar tensor, or for older files entry `legacy_j` of its metadata.
  absl::StatusOr<uint64_t> Number(uint64_t i, int j, int legacy_j, absl::string_view what) {
    uint64_t value = 0;
    if (out_.is_legacy_) {
      const auto it = out_.header_.metadata.find(absl::StrCat("0.", i, ".", legacy_j));
      if (it == out_.header_.metadata.end() || !absl::SimpleAtoi(it->second, &value)) {
        return Bad("layer ", i, " has no number ", what, " in its metadata");
      }
    } else {
      PT_ASSIGN_OR_RETURN(const SafetensorsTensor* tensor, Use(absl::StrCat(i, ".", j)));
      if (!tensor->shape.empty() || (tensor->dtype != "I32" && tensor->dtype != "I64")) {
        return Bad("layer ", i, ": ", what, " is no whole number");
      }
      LittleEndianReader in(out_.scalars_[tensor->name]);
      value = tensor->bytes() == 4 ? in.Take<uint32_t>() : in.Take<uint64_t>();
    }
    if (value >= kMaxCount) return Bad("layer ", i, ": ", what, " is ", value);
    return value;
  }

  absl::StatusOr<MlxLayer::Array> ParseArray(const std::string& name) {
    PT_ASSIGN_OR_RETURN(const SafetensorsTensor* tensor, Use(name));
    if (tensor->shape.size() != 4) {
      return absl::InvalidArgumentError(
          absl::StrCat("read MLX prompt cache: array \"", name, "\" has ", tensor->shape.size(),
                       " dimensions, expected batch, heads, rows, dim (an empty cache?)"));
    }
    if (tensor->shape[0] != 1) {
      return absl::InvalidArgumentError(absl::StrCat("read MLX prompt cache: array \"", name,
                                                     "\" is a batch of ", tensor->shape[0],
                                                     ", a sequence is a batch of 1"));
    }
    MlxLayer::Array array;
    array.dtype = tensor->dtype;
    array.heads = tensor->shape[1];
    array.rows = tensor->shape[2];
    array.dim = tensor->shape[3];
    array.begin = tensor->begin;
    if (array.heads == 0 || array.dim == 0 || array.heads >= kMaxCount ||
        array.dim >= kMaxCount / 8 || array.heads * array.dim >= kMaxCount / 8 ||
        array.rows >= kMaxCount) {
      return Bad("array \"", name, "\" has ", array.heads, " heads, ", array.rows, " rows, dim ",
                 array.dim);
    }
    if (array.rows > max_rows_) {
      return absl::InvalidArgumentError(absl::StrCat("read MLX layout: array \"", name, "\" has ",
                                                     array.rows, " rows, expected at most ",
                                                     max_rows_));
    }
    array.head_bytes = array.dim * SafetensorsElementBytes(array.dtype);
    return array;
  }

  absl::Status ParseLayer(uint64_t i, const std::string& class_name) {
    MlxLayer layer;
    for (const MlxCacheClass c : {MlxCacheClass::kPlain, MlxCacheClass::kRotating,
                                  MlxCacheClass::kQuantized, MlxCacheClass::kChunked}) {
      if (class_name == MlxCacheClassName(c)) layer.cache_class = c;
    }
    if (class_name != MlxCacheClassName(layer.cache_class)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "read MLX prompt cache: layer ", i, " is a ", class_name,
          "; KVCache, RotatingKVCache, QuantizedKVCache and ChunkedKVCache can be taken"));
    }
    const bool quantized = layer.cache_class == MlxCacheClass::kQuantized;
    for (const int part : {0, 1}) {
      std::vector<MlxLayer::Array>& arrays = part == 0 ? layer.keys : layer.values;
      for (int j = 0; j < (quantized ? 3 : 1); ++j) {
        const std::string name =
            quantized ? absl::StrCat(i, ".", part, ".", j) : absl::StrCat(i, ".", part);
        PT_ASSIGN_OR_RETURN(MlxLayer::Array array, ParseArray(name));
        arrays.push_back(std::move(array));
      }
    }
    for (const std::vector<MlxLayer::Array>* arrays : {&layer.keys, &layer.values}) {
      for (const MlxLayer::Array& array : *arrays) {
        if (array.rows != layer.rows() || array.heads != layer.keys[0].heads) {
          return Bad("layer ", i, " has arrays of ", layer.rows(), " × ", layer.keys[0].heads,
                     " and of ", array.rows, " × ", array.heads, " rows and heads");
        }
      }
    }
    PT_RETURN_IF_ERROR(ParseNumbers(i, &layer));
    out_.layers_.push_back(std::move(layer));
    return absl::OkStatus();
  }

  absl::Status ParseNumbers(uint64_t i, MlxLayer* layer) {
    const bool legacy = out_.is_legacy_;
    switch (layer->cache_class) {
      case MlxCacheClass::kPlain:
        layer->offset = layer->rows();
        if (!legacy) {
          PT_ASSIGN_OR_RETURN(layer->offset, Number(i, 2, 0, "offset"));
        }
        break;
      case MlxCacheClass::kRotating: {
        PT_ASSIGN_OR_RETURN(layer->offset, Number(i, 2, 2, "offset"));
        PT_ASSIGN_OR_RETURN(layer->keep, Number(i, 3, 0, "keep"));
        PT_ASSIGN_OR_RETURN(layer->max_size, Number(i, 4, 1, "max_size"));
        PT_ASSIGN_OR_RETURN(layer->index, Number(i, 5, 3, "index"));
        break;
      }
      case MlxCacheClass::kQuantized: {
        PT_ASSIGN_OR_RETURN(layer->offset, Number(i, 2, 0, "offset"));
        PT_ASSIGN_OR_RETURN(layer->group_size, Number(i, 3, 1, "group_size"));
        PT_ASSIGN_OR_RETURN(layer->bits, Number(i, 4, 2, "bits"));
        break;
      }
      case MlxCacheClass::kChunked: {
        if (legacy) {
          PT_ASSIGN_OR_RETURN(layer->chunk_size, Number(i, 0, 0, "chunk_size"));
          PT_ASSIGN_OR_RETURN(layer->start_position, Number(i, 0, 1, "start_position"));
          layer->offset = layer->rows();
          if (layer->start_position != 0) {
            return absl::FailedPreconditionError(absl::StrCat(
                "read MLX prompt cache: layer ", i, " is a ChunkedKVCache trimmed by ",
                layer->start_position, " rows; mlx-lm before 0.32 does not record how many of its ",
                layer->rows(), " rows are valid"));
          }
        } else {
          PT_ASSIGN_OR_RETURN(layer->offset, Number(i, 2, 0, "offset"));
          PT_ASSIGN_OR_RETURN(layer->chunk_size, Number(i, 3, 0, "chunk_size"));
          PT_ASSIGN_OR_RETURN(layer->start_position, Number(i, 4, 0, "start_position"));
        }
        break;
      }
    }
    return absl::OkStatus();
  }

  absl::StatusOr<RowOrder> OrderOf(uint64_t i, const MlxLayer& layer) {
    RowOrder order;
    const uint64_t rows = layer.rows();
    if (layer.cache_class == MlxCacheClass::kRotating && layer.offset > rows) {
      // As a ring turns, it has max_size rows; just after a long prompt it may have more.
      order.is_ring = true;
      order.valid = rows;
      order.offset = layer.offset;
      order.keep = layer.keep;
      order.index = layer.index;
      if (layer.keep > rows || layer.index > rows || layer.index < layer.keep) {
        return Bad("layer ", i, " is a ring of ", rows, " rows with keep ", layer.keep,
                   " and index ", layer.index);
      }
      return order;
    }
    order.first = layer.cache_class == MlxCacheClass::kChunked ? layer.start_position : 0;
    if (layer.offset < order.first || layer.offset - order.first > rows) {
      return Bad("layer ", i, " has ", rows, " rows for tokens ", order.first, " to ",
                 layer.offset);
    }
    order.valid = layer.offset - order.first;
    return order;
  }

  absl::StatusOr<RowShape> ShapeOf(uint64_t i, const std::vector<MlxLayer::Array>& arrays) {
    RowShape shape;
    shape.bytes = RowBytes(arrays);
    if (arrays.size() > 1) return shape;
    shape.type = DataTypeOf(arrays[0].dtype);
    if (!shape.type) {
      return absl::InvalidArgumentError(absl::StrCat("read MLX prompt cache: layer ", i, " is of ",
                                                     arrays[0].dtype,
                                                     "; F32, F16 and BF16 can be taken"));
    }
    return shape;
  }

  absl::Status MakeBlocks() {
    std::vector<RowOrder> orders;
    for (uint64_t i = 0; i < out_.layers_.size(); ++i) {
      const MlxLayer& layer = out_.layers_[i];
      PT_ASSIGN_OR_RETURN(const RowOrder order, OrderOf(i, layer));
      size_t b = 0;
      while (b < orders.size() && orders[b].Key() != order.Key()) ++b;
      if (b == orders.size()) {
        if (order.valid > kMaxStateTokens || orders.size() == kMaxRowOrders) {
          return Bad("layer ", i, " has ", order.valid, " rows, at most ", kMaxStateTokens,
                     ", in the order number ", orders.size() + 1, ", at most ", kMaxRowOrders);
        }
        orders.push_back(order);
        RowBlock& block = out_.state_.blocks.emplace_back();
        block.positions.reserve(order.valid);
        for (uint64_t r = 0; r < order.valid; ++r) block.positions.push_back(PositionOf(order, r));
      }
      LayerShape shape;
      PT_ASSIGN_OR_RETURN(shape.k, ShapeOf(i, layer.keys));
      PT_ASSIGN_OR_RETURN(shape.v, ShapeOf(i, layer.values));
      shape.number = static_cast<uint32_t>(i);
      out_.state_.blocks[b].layers.push_back(shape);
    }
    return absl::OkStatus();
  }

  const uint64_t max_rows_;
  absl::flat_hash_map<std::string, const SafetensorsTensor*> unused_;
  MlxCache out_;
};

absl::StatusOr<MlxCache> MlxCache::Parse(absl::string_view file) {
  PT_ASSIGN_OR_RETURN(SafetensorsHeader header, ParseSafetensorsHeader(file));
  const uint64_t data_bytes = file.size() - header.data_offset();
  if (data_bytes != header.data_bytes) {
    return Bad("its tensors need ", header.data_bytes, " bytes, it has ", data_bytes);
  }
  const absl::string_view data = file.substr(header.data_offset());
  return Parser(std::move(header), data, /*has_data=*/true, kMaxCount).Parse();
}

absl::StatusOr<MlxCache> MlxCache::FromLayout(absl::string_view layout, uint64_t max_rows) {
  PT_ASSIGN_OR_RETURN(SafetensorsHeader header, ParseSafetensorsHeader(layout));
  const absl::string_view scalars = layout.substr(header.data_offset());
  return Parser(std::move(header), scalars, /*has_data=*/false, max_rows).Parse();
}

std::string MlxCache::layout() const {
  std::string out;
  AppendLittleEndian<uint64_t>(&out, header_.json.size());
  out += header_.json;
  for (const SafetensorsTensor& tensor : header_.tensors) {
    if (tensor.shape.empty()) out += scalars_.at(tensor.name);
  }
  return out;
}

absl::Status MlxCache::ReadRows(const RowRange& range, std::span<std::byte> out) const {
  PT_RETURN_IF_ERROR(CheckRange(state_, range, out.size()));
  if (!has_data_) {
    return absl::FailedPreconditionError("read rows of an MLX layout, which has none");
  }
  const MlxLayer& layer = LayerOf(range.block, range.layer);
  const std::vector<MlxLayer::Array>& arrays =
      range.kind == RowKind::kK ? layer.keys : layer.values;
  const uint64_t row_bytes = RowBytes(arrays);
  uint64_t at = 0;  // of the piece within its row
  for (const MlxLayer::Array& array : arrays) {
    for (uint64_t h = 0; h < array.heads; ++h, at += array.head_bytes) {
      const char* from =
          data_.data() + array.begin + (h * array.rows + range.first) * array.head_bytes;
      for (uint64_t r = 0; r < range.count; ++r) {
        std::memcpy(out.data() + r * row_bytes + at, from + r * array.head_bytes, array.head_bytes);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace pagetide
