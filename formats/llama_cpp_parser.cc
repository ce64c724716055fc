#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "formats/byte_parser.h"
#include "formats/llama_cpp.h"

namespace pagetide {
namespace {

// llama.cpp has at most 256 sequences in a context; layers are far fewer than this.
constexpr uint32_t kMaxStreams = 4096;
constexpr size_t kMaxBodies = 2;

struct GgmlType {
  DataType type;
  int32_t number;
};
// enum ggml_type of ggml.h.
constexpr GgmlType kGgmlTypes[] = {
    {DataType::kF32, 0},  {DataType::kF16, 1},    {DataType::kQ4_0, 2},
    {DataType::kQ4_1, 3}, {DataType::kQ5_0, 6},   {DataType::kQ5_1, 7},
    {DataType::kQ8_0, 8}, {DataType::kIQ4NL, 20}, {DataType::kBF16, 30},
};

// Row `row` of a tensor stored by columns: out[j] = column j's element of that row.
template <size_t kElementBytes>
void GatherRows(const char* columns, uint64_t num_rows, uint64_t width, uint64_t first,
                uint64_t count, std::byte* out) {
  for (uint64_t j = 0; j < width; ++j) {
    const char* column = columns + (j * num_rows + first) * kElementBytes;
    std::byte* element = out + j * kElementBytes;
    for (uint64_t r = 0; r < count; ++r) {
      std::memcpy(element + r * width * kElementBytes, column + r * kElementBytes, kElementBytes);
    }
  }
}

}  // namespace

std::optional<int32_t> GgmlTypeOf(DataType type) {
  for (const GgmlType& t : kGgmlTypes) {
    if (t.type == type) return t.number;
  }
  return std::nullopt;
}

std::optional<DataType> DataTypeOfGgml(int32_t type) {
  for (const GgmlType& t : kGgmlTypes) {
    if (t.number == type) return t.type;
  }
  return std::nullopt;
}

class LlamaCppState::Parser {
 public:
  Parser(absl::string_view bytes, const LlamaCppHints& hints)
      : in_("llama.cpp state", bytes), hints_(hints) {}

  absl::StatusOr<LlamaCppState> Parse() {
    LlamaCppLayout& layout = out_.layout_;
    layout.cell_ext_bytes = hints_.cell_ext_bytes;
    ByteParser peek = in_;
    PT_ASSIGN_OR_RETURN(const uint32_t magic, peek.TakeLittleEndian<uint32_t>("magic"));
    if (magic == kLlamaCppFileMagic) {
      in_ = peek;
      PT_RETURN_IF_ERROR(ParseFileHeader());
    } else if (magic == kLlamaCppMemoryMagic) {
      in_ = peek;
      layout.form = LlamaCppForm::kMemory;
      PT_ASSIGN_OR_RETURN(layout.sequence_id, in_.TakeLittleEndian<int32_t>("sequence id"));
      has_sequence_id_ = true;
    } else if (magic >= 1 && magic <= kMaxStreams) {
      layout.form = LlamaCppForm::kBody;
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("read llama.cpp state: it begins with 0x", absl::Hex(magic, absl::kZeroPad8),
                       ", expected 0x67677371 (file), 0xaf143cd8 (memory) or a number of streams"));
    }
    const size_t max_bodies = hints_.num_bodies != 0 ? hints_.num_bodies : kMaxBodies;
    do {
      PT_RETURN_IF_ERROR(ParseBody());
    } while (layout.bodies.size() < max_bodies && (hints_.num_bodies != 0 || in_.remaining() > 0));
    if (in_.remaining() > 0) {
      return in_.DataLoss(in_.remaining(), " bytes are left over behind ", layout.bodies.size(),
                          " bodies");
    }
    return std::move(out_);
  }

 private:
  absl::Status ParseFileHeader() {
    LlamaCppLayout& layout = out_.layout_;
    layout.form = LlamaCppForm::kFile;
    PT_ASSIGN_OR_RETURN(layout.version, in_.TakeLittleEndian<uint32_t>("version"));
    if (layout.version != 2 && layout.version != 3) {
      return absl::InvalidArgumentError(
          absl::StrCat("read llama.cpp state: version ", layout.version, ", known are 2 and 3"));
    }
    PT_ASSIGN_OR_RETURN(const uint32_t n, in_.TakeLittleEndian<uint32_t>("number of tokens"));
    if (n > kMaxStateTokens) return in_.DataLoss(n, " tokens, at most ", kMaxStateTokens);
    PT_ASSIGN_OR_RETURN(const absl::string_view raw, in_.TakeRun("tokens", n, 4));
    ByteParser tokens("llama.cpp state", raw);
    std::vector<uint32_t>& out = out_.state_.tokens.emplace();
    out.reserve(n);
    for (uint32_t i = 0; i < n; ++i) {
      PT_ASSIGN_OR_RETURN(const int32_t token, tokens.TakeLittleEndian<int32_t>("token"));
      if (token < 0) {
        return in_.DataLoss("token ", i, " is ", token);
      }
      out.push_back(static_cast<uint32_t>(token));
    }
    return absl::OkStatus();
  }

  absl::Status ParseBody() {
    LlamaCppLayout::Body body;
    RowBlock block;
    PT_ASSIGN_OR_RETURN(body.num_streams, in_.TakeLittleEndian<uint32_t>("number of streams"));
    if (body.num_streams < 1 || body.num_streams > kMaxStreams) {
      return in_.DataLoss("a body has ", body.num_streams, " streams, expected 1 to ", kMaxStreams);
    }
    layers_.clear();
    for (uint32_t s = 0; s < body.num_streams; ++s) {
      PT_ASSIGN_OR_RETURN(const uint32_t cells, in_.TakeLittleEndian<uint32_t>("number of cells"));
      if (cells == 0) continue;
      if (!block.positions.empty()) {
        return in_.DataLoss("streams ", body.stream, " and ", s,
                            " both have cells: not the state of one sequence");
      }
      body.stream = s;
      PT_RETURN_IF_ERROR(ParseCells(cells, &body, &block));
      PT_RETURN_IF_ERROR(ParseLayers(cells, &body, &block));
    }
    out_.layout_.bodies.push_back(std::move(body));
    out_.state_.blocks.push_back(std::move(block));
    out_.rows_.push_back(std::move(layers_));
    return absl::OkStatus();
  }

  absl::Status ParseCells(uint32_t cells, LlamaCppLayout::Body* body, RowBlock* block) {
    const uint32_t ext_bytes = hints_.cell_ext_bytes;
    if (cells > kMaxStateTokens) return in_.DataLoss(cells, " cells, at most ", kMaxStateTokens);
    // A cell of one sequence: position, 1, extension, sequence id.
    PT_ASSIGN_OR_RETURN(const absl::string_view raw, in_.TakeRun("cells", cells, 12 + ext_bytes));
    ByteParser in("llama.cpp state", raw);
    block->positions.reserve(cells);
    body->cell_ext.reserve(uint64_t{cells} * ext_bytes);
    for (uint32_t i = 0; i < cells; ++i) {
      PT_ASSIGN_OR_RETURN(const int32_t position, in.TakeLittleEndian<int32_t>("position"));
      PT_ASSIGN_OR_RETURN(const uint32_t ids, in.TakeLittleEndian<uint32_t>("number of sequences"));
      PT_ASSIGN_OR_RETURN(const absl::string_view ext, in.TakeRun("cell extension", 1, ext_bytes));
      PT_ASSIGN_OR_RETURN(const int32_t id, in.TakeLittleEndian<int32_t>("sequence id"));
      if (position < 0) return in_.DataLoss("cell ", i, " has position ", position);
      if (ids != 1) {
        return in_.DataLoss("cell ", i, " belongs to ", ids, " sequences, expected 1");
      }
      if (!has_sequence_id_) {
        has_sequence_id_ = true;
        out_.layout_.sequence_id = id;
      } else if (id != out_.layout_.sequence_id) {
        return in_.DataLoss("cell ", i, " belongs to sequence ", id, ", others to ",
                            out_.layout_.sequence_id);
      }
      block->positions.push_back(static_cast<uint32_t>(position));
      body->cell_ext.append(ext.data(), ext.size());
    }
    return absl::OkStatus();
  }

  absl::Status ParseLayers(uint32_t cells, LlamaCppLayout::Body* body, RowBlock* block) {
    PT_ASSIGN_OR_RETURN(const uint32_t v_trans, in_.TakeLittleEndian<uint32_t>("v_trans"));
    if (v_trans > 1) return in_.DataLoss("v_trans is ", v_trans, ", expected 0 or 1");
    body->v_transposed = v_trans == 1;
    PT_ASSIGN_OR_RETURN(const uint32_t n, in_.TakeLittleEndian<uint32_t>("number of layers"));
    // Each layer has at least 12 bytes of K header.
    if (n < 1 || n > kMaxLayers || n > in_.remaining() / 12) {
      return in_.DataLoss("a body has ", n, " layers, ", in_.remaining(), " bytes are left");
    }
    block->layers.resize(n);
    layers_.resize(n);
    for (uint32_t i = 0; i < n; ++i) {
      block->layers[i].number = i;
      PT_ASSIGN_OR_RETURN(block->layers[i].k, ParseRowHeader("K", i));
      PT_ASSIGN_OR_RETURN(layers_[i].k, in_.TakeRun("K rows", cells, block->layers[i].k.bytes));
    }
    for (uint32_t i = 0; hints_.has_v && i < n; ++i) {
      PT_ASSIGN_OR_RETURN(block->layers[i].v,
                          body->v_transposed ? ParseColumnHeader(i) : ParseRowHeader("V", i));
      PT_ASSIGN_OR_RETURN(layers_[i].v, in_.TakeRun("V rows", cells, block->layers[i].v.bytes));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<DataType> ParseType(absl::string_view kind, uint32_t layer) {
    PT_ASSIGN_OR_RETURN(const int32_t number, in_.TakeLittleEndian<int32_t>("type"));
    const std::optional<DataType> type = DataTypeOfGgml(number);
    if (!type) {
      return absl::InvalidArgumentError(
          absl::StrCat("read llama.cpp state: at byte ", in_.offset() - 4, ": ", kind, " of layer ",
                       layer, " has ggml type ", number, ", which no KV cache of ours has"));
    }
    return *type;
  }

  absl::StatusOr<RowShape> ParseRowHeader(absl::string_view kind, uint32_t layer) {
    RowShape shape;
    PT_ASSIGN_OR_RETURN(shape.type, ParseType(kind, layer));
    PT_ASSIGN_OR_RETURN(shape.bytes, in_.TakeLittleEndian<uint64_t>("row size"));
    if (shape.bytes == 0 || shape.bytes % DataTypeGroupBytes(*shape.type) != 0) {
      return in_.DataLoss(kind, " of layer ", layer, " has rows of ", shape.bytes, " bytes of ",
                          DataTypeName(*shape.type));
    }
    return shape;
  }

  absl::StatusOr<RowShape> ParseColumnHeader(uint32_t layer) {
    RowShape shape;
    PT_ASSIGN_OR_RETURN(shape.type, ParseType("V", layer));
    PT_ASSIGN_OR_RETURN(const uint32_t element, in_.TakeLittleEndian<uint32_t>("element size"));
    PT_ASSIGN_OR_RETURN(const uint32_t width, in_.TakeLittleEndian<uint32_t>("width"));
    if (DataTypeGroupElements(*shape.type) != 1 || element != DataTypeGroupBytes(*shape.type) ||
        width == 0) {
      return in_.DataLoss("transposed V of layer ", layer, " has ", width, " columns of ", element,
                          "-byte elements of ", DataTypeName(*shape.type));
    }
    shape.bytes = uint64_t{width} * element;
    return shape;
  }

  ByteParser in_;
  const LlamaCppHints hints_;
  bool has_sequence_id_ = false;
  std::vector<LayerBytes> layers_;  // of the body being read
  LlamaCppState out_;
};

absl::StatusOr<LlamaCppState> LlamaCppState::Parse(absl::string_view bytes,
                                                   const LlamaCppHints& hints) {
  if (hints.cell_ext_bytes != 0 && hints.cell_ext_bytes != 8 && hints.cell_ext_bytes != 12) {
    return absl::InvalidArgumentError(absl::StrCat("cell_ext_bytes = ", hints.cell_ext_bytes,
                                                   ", cells have extensions of 0, 8 or 12 bytes"));
  }
  if (hints.num_bodies > kMaxBodies) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_bodies = ", hints.num_bodies, ", a state has at most ", kMaxBodies));
  }
  return Parser(bytes, hints).Parse();
}

absl::Status LlamaCppState::ReadRows(const RowRange& range, std::span<std::byte> out) const {
  PT_RETURN_IF_ERROR(CheckRange(state_, range, out.size()));
  const LayerBytes& layer = rows_[range.block][range.layer];
  const RowShape& shape = state_.blocks[range.block].layers[range.layer].of(range.kind);
  if (range.kind == RowKind::kK || !layout_.bodies[range.block].v_transposed) {
    const absl::string_view rows = range.kind == RowKind::kK ? layer.k : layer.v;
    if (!out.empty()) std::memcpy(out.data(), rows.data() + range.first * shape.bytes, out.size());
    return absl::OkStatus();
  }
  const uint64_t num_rows = state_.blocks[range.block].positions.size();
  switch (DataTypeGroupBytes(*shape.type)) {
    case 2:
      GatherRows<2>(layer.v.data(), num_rows, shape.width(), range.first, range.count, out.data());
      return absl::OkStatus();
    case 4:
      GatherRows<4>(layer.v.data(), num_rows, shape.width(), range.first, range.count, out.data());
      return absl::OkStatus();
    default:
      return absl::InternalError("transposed V of a type that the parser refuses");
  }
}

}  // namespace pagetide
