#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/little_endian.h"
#include "base/status_macros.h"
#include "formats/llama_cpp.h"

namespace pagetide {
namespace {

constexpr uint64_t kMaxTransposeBytes = uint64_t{32} << 20;
constexpr uint32_t kMaxSigned = std::numeric_limits<int32_t>::max();

absl::Status CheckShape(const RowShape& shape, absl::string_view kind, size_t block, size_t layer,
                        bool transposed) {
  if (!shape.type || !GgmlTypeOf(*shape.type)) {
    return absl::FailedPreconditionError(
        absl::StrCat("write llama.cpp state: ", kind, " of layer ", layer, " of block ", block,
                     " is ", shape.ToString(), ", which ggml cannot hold"));
  }
  if (shape.bytes == 0 || shape.bytes % DataTypeGroupBytes(*shape.type) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("write llama.cpp state: ", kind, " of layer ",
                                                   layer, " has rows of ", shape.bytes, " bytes"));
  }
  if (transposed && DataTypeGroupElements(*shape.type) != 1) {
    return absl::FailedPreconditionError(
        absl::StrCat("write llama.cpp state: V of layer ", layer, " is ", shape.ToString(),
                     ", which cannot be transposed: ask for plain V"));
  }
  return absl::OkStatus();
}

absl::Status Check(const LlamaCppLayout& layout, const SequenceState& state) {
  if (layout.bodies.size() != state.blocks.size() || state.blocks.empty() ||
      state.blocks.size() > 2) {
    return absl::InvalidArgumentError(absl::StrCat("write llama.cpp state: ", state.blocks.size(),
                                                   " blocks for ", layout.bodies.size(),
                                                   " bodies, expected 1 or 2 of both"));
  }
  if (layout.form == LlamaCppForm::kFile) {
    if (!state.tokens) {
      return absl::InvalidArgumentError("write llama.cpp state: the file form needs the tokens");
    }
    if (layout.version != 2 && layout.version != 3) {
      return absl::InvalidArgumentError(
          absl::StrCat("write llama.cpp state: version ", layout.version, ", known are 2 and 3"));
    }
    for (const uint32_t token : *state.tokens) {
      if (token > kMaxSigned) {
        return absl::FailedPreconditionError(
            absl::StrCat("write llama.cpp state: token ", token, " exceeds ", kMaxSigned));
      }
    }
  }
  for (size_t b = 0; b < state.blocks.size(); ++b) {
    const RowBlock& block = state.blocks[b];
    const LlamaCppLayout::Body& body = layout.bodies[b];
    const uint64_t rows = block.positions.size();
    if (body.stream >= body.num_streams || rows > kMaxSigned ||
        body.cell_ext.size() != rows * layout.cell_ext_bytes ||
        (rows == 0) != block.layers.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "write llama.cpp state: body ", b, " has stream ", body.stream, " of ", body.num_streams,
          ", ", rows, " rows, ", block.layers.size(), " layers, ", body.cell_ext.size(),
          " bytes of cell extensions (", layout.cell_ext_bytes, " a cell)"));
    }
    for (const uint32_t position : block.positions) {
      if (position > kMaxSigned) {
        return absl::FailedPreconditionError(
            absl::StrCat("write llama.cpp state: position ", position, " exceeds ", kMaxSigned));
      }
    }
    for (size_t l = 0; l < block.layers.size(); ++l) {
      const LayerShape& layer = block.layers[l];
      PT_RETURN_IF_ERROR(CheckShape(layer.k, "K", b, l, false));
      // The format says of no layer whether it has V: all have it or none.
      if ((layer.v.bytes == 0) != (block.layers[0].v.bytes == 0)) {
        return absl::FailedPreconditionError(absl::StrCat("write llama.cpp state: layers 0 and ", l,
                                                          " of block ", b, " differ in having V"));
      }
      if (layer.v.bytes != 0) PT_RETURN_IF_ERROR(CheckShape(layer.v, "V", b, l, body.v_transposed));
    }
  }
  return absl::OkStatus();
}

// Gathers small pieces into parts; rows pass through buffers of their own.
class PartWriter {
 public:
  explicit PartWriter(ByteSink sink) : sink_(sink) {}

  template <typename T>
  absl::Status Put(T value) {
    AppendLittleEndian(&pending_, static_cast<std::make_unsigned_t<T>>(value));
    return pending_.size() < kMaxSinkBytes ? absl::OkStatus() : Flush();
  }
  absl::Status PutBytes(absl::string_view bytes) {
    pending_.append(bytes.data(), bytes.size());
    return pending_.size() < kMaxSinkBytes / 2 ? absl::OkStatus() : Flush();
  }
  absl::Status PutLarge(std::span<const std::byte> bytes) {
    PT_RETURN_IF_ERROR(Flush());
    const absl::string_view all(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    for (size_t at = 0; at < all.size(); at += kMaxSinkBytes) {
      PT_RETURN_IF_ERROR(sink_(all.substr(at, kMaxSinkBytes)));
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

uint64_t RowsPerPart(uint64_t row_bytes) {
  return std::max<uint64_t>(1, kMaxSinkBytes / row_bytes);
}

absl::Status WriteRows(const RowReader& rows, RowRange range, uint64_t num_rows, uint64_t row_bytes,
                       std::vector<std::byte>* buffer, PartWriter* out) {
  const uint64_t step = RowsPerPart(row_bytes);
  for (range.first = 0; range.first < num_rows; range.first += range.count) {
    range.count = std::min(step, num_rows - range.first);
    buffer->resize(range.count * row_bytes);
    PT_RETURN_IF_ERROR(rows.ReadRows(range, *buffer));
    PT_RETURN_IF_ERROR(out->PutLarge(*buffer));
  }
  return absl::OkStatus();
}

// Columns of V, as many at a time as fit the transpose buffer.
absl::Status WriteColumns(const RowReader& rows, RowRange range, uint64_t num_rows,
                          const RowShape& shape, std::vector<std::byte>* buffer, PartWriter* out) {
  const uint64_t element = DataTypeGroupBytes(*shape.type);
  const uint64_t width = shape.width();
  const uint64_t columns =
      std::clamp<uint64_t>(kMaxTransposeBytes / (num_rows * element), 1, width);
  const uint64_t step = RowsPerPart(shape.bytes);
  std::vector<std::byte> transposed;  // [columns][num_rows] elements
  for (uint64_t j0 = 0; j0 < width; j0 += columns) {
    const uint64_t n = std::min(columns, width - j0);
    transposed.resize(n * num_rows * element);
    for (range.first = 0; range.first < num_rows; range.first += range.count) {
      range.count = std::min(step, num_rows - range.first);
      buffer->resize(range.count * shape.bytes);
      PT_RETURN_IF_ERROR(rows.ReadRows(range, *buffer));
      for (uint64_t r = 0; r < range.count; ++r) {
        const std::byte* row = buffer->data() + r * shape.bytes + j0 * element;
        for (uint64_t j = 0; j < n; ++j) {
          std::memcpy(transposed.data() + (j * num_rows + range.first + r) * element,
                      row + j * element, element);
        }
      }
    }
    PT_RETURN_IF_ERROR(out->PutLarge(transposed));
  }
  return absl::OkStatus();
}

absl::Status WriteBody(const LlamaCppLayout& layout, size_t b, const RowBlock& block,
                       const RowReader& rows, PartWriter* out) {
  const LlamaCppLayout::Body& body = layout.bodies[b];
  const uint64_t num_rows = block.positions.size();
  PT_RETURN_IF_ERROR(out->Put(body.num_streams));
  for (uint32_t s = 0; s < body.num_streams; ++s) {
    if (s != body.stream || num_rows == 0) {
      PT_RETURN_IF_ERROR(out->Put(uint32_t{0}));
      continue;
    }
    PT_RETURN_IF_ERROR(out->Put(static_cast<uint32_t>(num_rows)));
    const absl::string_view ext = body.cell_ext;
    for (uint64_t i = 0; i < num_rows; ++i) {
      PT_RETURN_IF_ERROR(out->Put(block.positions[i]));
      PT_RETURN_IF_ERROR(out->Put(uint32_t{1}));
      PT_RETURN_IF_ERROR(
          out->PutBytes(ext.substr(i * layout.cell_ext_bytes, layout.cell_ext_bytes)));
      PT_RETURN_IF_ERROR(out->Put(layout.sequence_id));
    }
    PT_RETURN_IF_ERROR(out->Put(uint32_t{body.v_transposed}));
    PT_RETURN_IF_ERROR(out->Put(static_cast<uint32_t>(block.layers.size())));
    std::vector<std::byte> buffer;
    for (size_t l = 0; l < block.layers.size(); ++l) {
      const RowShape& k = block.layers[l].k;
      PT_RETURN_IF_ERROR(out->Put(*GgmlTypeOf(*k.type)));
      PT_RETURN_IF_ERROR(out->Put(k.bytes));
      PT_RETURN_IF_ERROR(WriteRows(rows, {b, l, RowKind::kK}, num_rows, k.bytes, &buffer, out));
    }
    for (size_t l = 0; l < block.layers.size() && block.layers[l].v.bytes != 0; ++l) {
      const RowShape& v = block.layers[l].v;
      const RowRange range{b, l, RowKind::kV};
      PT_RETURN_IF_ERROR(out->Put(*GgmlTypeOf(*v.type)));
      if (body.v_transposed) {
        PT_RETURN_IF_ERROR(out->Put(DataTypeGroupBytes(*v.type)));
        PT_RETURN_IF_ERROR(out->Put(static_cast<uint32_t>(v.width())));
        PT_RETURN_IF_ERROR(WriteColumns(rows, range, num_rows, v, &buffer, out));
      } else {
        PT_RETURN_IF_ERROR(out->Put(v.bytes));
        PT_RETURN_IF_ERROR(WriteRows(rows, range, num_rows, v.bytes, &buffer, out));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<uint64_t> LlamaCppStateBytes(const LlamaCppLayout& layout,
                                            const SequenceState& state) {
  PT_RETURN_IF_ERROR(Check(layout, state));
  uint64_t bytes = 0;
  if (layout.form == LlamaCppForm::kFile) bytes += 12 + 4 * state.tokens->size();
  if (layout.form == LlamaCppForm::kMemory) bytes += 8;
  for (size_t b = 0; b < state.blocks.size(); ++b) {
    const RowBlock& block = state.blocks[b];
    const uint64_t num_rows = block.positions.size();
    bytes += 4 + 4 * uint64_t{layout.bodies[b].num_streams};
    if (num_rows == 0) continue;
    bytes += num_rows * (12 + layout.cell_ext_bytes) + 8;
    for (const LayerShape& layer : block.layers) {
      bytes += 12 + num_rows * layer.k.bytes;
      if (layer.v.bytes != 0) bytes += 12 + num_rows * layer.v.bytes;
    }
  }
  return bytes;
}

absl::Status WriteLlamaCpp(const LlamaCppLayout& layout, const SequenceState& state,
                           const RowReader& rows, ByteSink sink) {
  PT_RETURN_IF_ERROR(Check(layout, state));
  PartWriter out(sink);
  if (layout.form == LlamaCppForm::kFile) {
    PT_RETURN_IF_ERROR(out.Put(kLlamaCppFileMagic));
    PT_RETURN_IF_ERROR(out.Put(layout.version));
    PT_RETURN_IF_ERROR(out.Put(static_cast<uint32_t>(state.tokens->size())));
    for (const uint32_t token : *state.tokens) PT_RETURN_IF_ERROR(out.Put(token));
  } else if (layout.form == LlamaCppForm::kMemory) {
    PT_RETURN_IF_ERROR(out.Put(kLlamaCppMemoryMagic));
    PT_RETURN_IF_ERROR(out.Put(layout.sequence_id));
  }
  for (size_t b = 0; b < state.blocks.size(); ++b) {
    PT_RETURN_IF_ERROR(WriteBody(layout, b, state.blocks[b], rows, &out));
  }
  return out.Flush();
}

}  // namespace pagetide
