#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/error_info.h"
#include "base/little_endian.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "formats/llama_sharp.h"
#include "formats/mlx_cache.h"
#include "formats/native.h"
#include "worker/sequence_formats.h"

namespace pagetide {
namespace {

// Rows written in one append, if the pool allows it, and read at a time.
constexpr uint64_t kAppendBytes = 64 * kMiB;
constexpr uint64_t kReadBytes = kMiB;
// Cells of a llama.cpp state whose order an import tells.
constexpr uint64_t kMaxRememberedCells = 500'000;

// Rows [first, first + count) by position of one layer of the model.
using ModelRows =
    absl::FunctionRef<absl::Status(uint32_t group, uint32_t layer, RowKind kind, uint64_t first,
                                   uint64_t count, std::span<std::byte> out)>;

absl::Status WriteLayer(ModelHost* host, const Tenant& tenant, const PendingSlot& slot,
                        uint32_t group, uint32_t layer, RowKind kind, uint64_t first,
                        ModelRows rows) {
  const uint64_t row_bytes = host->model().geometry().group(group).row_bytes(kind);
  if (row_bytes == 0) return absl::OkStatus();
  const uint64_t step = std::max<uint64_t>(1, kReadBytes / row_bytes);
  std::vector<std::byte> buffer;
  for (uint64_t done = 0; done < slot.num_tokens; done += step) {
    const uint64_t count = std::min<uint64_t>(step, slot.num_tokens - done);
    buffer.resize(count * row_bytes);
    PT_RETURN_IF_ERROR(rows(group, layer, kind, first + done, count, buffer));
    PT_RETURN_IF_ERROR(host->WriteRows(
        tenant, slot.sequence, slot.pending_id,
        {group, layer, kind, static_cast<uint32_t>(done), static_cast<uint32_t>(count)},
        buffer.size(), [&](uint64_t offset, std::span<std::byte> dst) {
          std::memcpy(dst.data(), buffer.data() + offset, dst.size());
        }));
  }
  return absl::OkStatus();
}

absl::StatusOr<SequenceInfo> AppendChunk(ModelHost* host, const Tenant& tenant,
                                         const SequenceInfo& info, std::span<const uint32_t> tokens,
                                         std::span<const PositionedInput> inputs, ModelRows rows,
                                         MonotonicTime deadline) {
  const SequenceHandle handle{info.id, info.epoch, std::nullopt};
  PT_ASSIGN_OR_RETURN(const PendingSlot slot,
                      host->BeginAppend(tenant, handle, "import", info.length, tokens, inputs,
                                        /*pin_prefix=*/false, deadline));
  const PageGeometry& geometry = host->model().geometry();
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    for (uint32_t layer = 0; layer < geometry.group(g).num_layers(); ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        PT_RETURN_IF_ERROR(WriteLayer(host, tenant, slot, g, layer, kind, info.length, rows));
      }
    }
  }
  PT_ASSIGN_OR_RETURN(const CommitResult done, host->Commit(tenant, handle, slot.pending_id, {}));
  return done.info;
}

// A new sequence with these rows, or nothing. `held`: [group], the rows that there are; for the
// others `rows` gives zeros, which nobody gets to see.
absl::StatusOr<SequenceInfo> Fill(ModelHost* host, const Tenant& tenant,
                                  std::span<const uint32_t> tokens,
                                  std::span<const PositionedInput> inputs, bool is_canonical,
                                  std::span<const std::vector<RowSpan>> held, ModelRows rows,
                                  MonotonicTime deadline) {
  if (tokens.empty()) return absl::InvalidArgumentError("import: the file has no tokens");
  PromptOptions options;
  options.no_reuse = true;
  options.is_private = !is_canonical;
  options.is_copied = true;
  options.keeps_masked_rows = true;
  PT_ASSIGN_OR_RETURN(const OpenResult opened, host->Open(tenant, {}, {}, options));
  SequenceInfo info = opened.info;
  absl::Cleanup close = [&] {
    const absl::Status closed = host->Close(tenant, info.id, info.epoch);
    if (!closed.ok()) LogWarning("worker", "close a failed import: ", closed.message());
  };
  const PageGeometry& geometry = host->model().geometry();
  // All pages of an append are in frames until it is committed.
  const uint64_t pages = std::min(
      PagesAtOnce(host), std::max<uint64_t>(1, kAppendBytes / geometry.bytes_per_page_of_tokens()));
  const uint64_t step = pages * geometry.page_tokens();
  size_t input = 0;
  while (info.length < tokens.size()) {
    const uint64_t count = std::min<uint64_t>(step, tokens.size() - info.length);
    size_t end = input;
    while (end < inputs.size() && inputs[end].position < info.length + count) ++end;
    PT_ASSIGN_OR_RETURN(info, AppendChunk(host, tenant, info, tokens.subspan(info.length, count),
                                          inputs.subspan(input, end - input), rows, deadline));
    input = end;
  }
  PT_ASSIGN_OR_RETURN(info, host->KeepRows(tenant, {info.id, info.epoch, std::nullopt}, held));
  std::move(close).Cancel();
  return info;
}

absl::StatusOr<ImportResult> ImportNative(ModelHost* host, const Tenant& tenant,
                                          absl::string_view bytes, MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(const NativeFile file, NativeFile::Parse(bytes));
  PT_RETURN_IF_ERROR(file.CheckModel(host->model()));
  const NativeHeader& header = file.header();
  ImportResult result;
  result.format = StateFormat::kNative;
  const uint64_t n = header.tokens.size();
  bool is_whole = true;
  std::vector<std::vector<RowSpan>> held;
  for (uint32_t g = 0; g < header.groups.size(); ++g) {
    held.push_back({{header.groups[g].first_row, n}});
    is_whole = is_whole && header.groups[g].first_row == 0;
    if (n > 0) PT_RETURN_IF_ERROR(CheckHeldRows(host->model().geometry(), g, held.back(), n));
  }
  // Pages of rows that are not there must not get a key.
  result.is_canonical = is_whole && header.canonical_length == n && file.IsProvenBy(tenant.salt);
  PT_ASSIGN_OR_RETURN(
      result.info,
      Fill(
          host, tenant, header.tokens,
          result.is_canonical ? std::span(header.inputs) : std::span<const PositionedInput>(),
          result.is_canonical, held,
          [&](uint32_t group, uint32_t layer, RowKind kind, uint64_t first, uint64_t count,
              std::span<std::byte> out) -> absl::Status {
            const uint64_t from = header.groups[group].first_row;
            const uint64_t num_absent = std::clamp<uint64_t>(from, first, first + count) - first;
            const uint64_t absent_bytes = num_absent * (out.size() / count);
            std::memset(out.data(), 0, absent_bytes);
            out = out.subspan(absent_bytes);
            first += num_absent;
            count -= num_absent;
            if (count == 0) return absl::OkStatus();
            PT_ASSIGN_OR_RETURN(const absl::string_view rows,
                                file.Rows(group, layer, kind, first, count));
            if (rows.size() != out.size()) return absl::InternalError("row sizes differ");
            std::memcpy(out.data(), rows.data(), rows.size());
            return absl::OkStatus();
          },
          deadline));
  return result;
}

absl::Status CheckBasis(const SequenceState& state, const ImportOptions& options) {
  if (options.basis == LayerGroupSpec::Basis::kHadamard) {
    return WithReason(
        absl::FailedPreconditionError(
            "import: the rows are in a Hadamard-rotated basis, the model's are plain"),
        "MODEL_MISMATCH");
  }
  if (options.basis.has_value()) return absl::OkStatus();
  for (const RowBlock& block : state.blocks) {
    for (const LayerShape& layer : block.layers) {
      for (const RowShape* shape : {&layer.k, &layer.v}) {
        if (!shape->type || DataTypeGroupElements(*shape->type) == 1) continue;
        return WithReason(
            absl::FailedPreconditionError(absl::StrCat(
                "import: llama.cpp stores rows of ", DataTypeName(*shape->type),
                " rotated unless told otherwise, and the file does not say: give the basis")),
            "BASIS_UNKNOWN");
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ImportResult> ImportState(ModelHost* host, const Tenant& tenant,
                                         const SequenceState& state, BlockRule rule,
                                         const RowReader& reader, const ImportOptions& options,
                                         MonotonicTime deadline) {
  if (state.tokens && !options.tokens.empty() && *state.tokens != options.tokens) {
    return absl::InvalidArgumentError(absl::StrCat("tokens has ", options.tokens.size(),
                                                   " entries that are not the ",
                                                   state.tokens->size(), " of the file"));
  }
  const std::vector<uint32_t>& tokens = state.tokens ? *state.tokens : options.tokens;
  if (tokens.empty()) {
    return absl::InvalidArgumentError(
        "tokens is empty, and this format carries none: give the tokens of the rows");
  }
  PT_ASSIGN_OR_RETURN(const StateMap map,
                      StateMap::Create(&state, rule, host->model().geometry(), tokens.size()));
  ImportResult result;
  PT_ASSIGN_OR_RETURN(result.info,
                      Fill(
                          host, tenant, tokens, {}, /*is_canonical=*/false, map.held(),
                          [&](uint32_t group, uint32_t layer, RowKind kind, uint64_t first,
                              uint64_t count, std::span<std::byte> out) {
                            return map.ReadRows(reader, group, layer, kind, first, count, out);
                          },
                          deadline));
  return result;
}

absl::StatusOr<LlamaCppState> ParseLlama(const PageGeometry& geometry, absl::string_view bytes) {
  LittleEndianReader in(bytes);
  const bool is_file = in.Take<uint32_t>() == kLlamaCppFileMagic;
  const uint32_t version = in.Take<uint32_t>();
  LlamaCppHints hints = LlamaCppHintsFor(geometry, is_file ? version : 0);
  absl::StatusOr<LlamaCppState> state = LlamaCppState::Parse(bytes, hints);
  if (!state.ok() && !is_file && hints.cell_ext_bytes == 12) {
    // The memory form does not say which version's cells it has.
    hints.cell_ext_bytes = 8;
    return LlamaCppState::Parse(bytes, hints);
  }
  return state;
}

// Remembers which cells the state has, and in which order, unless that goes without saying.
void AddCells(const SequenceState& state, const PageGeometry& geometry, uint64_t num_tokens,
              FileLayout* layout) {
  const std::vector<std::vector<RowSpan>> all(geometry.num_groups(), {{0, num_tokens}});
  const auto described = DescribeForLlamaCpp(geometry, std::vector<uint32_t>(num_tokens), all);
  bool is_usual = described.ok();
  uint64_t num_cells = 0;
  for (size_t b = 0; b < state.blocks.size(); ++b) {
    num_cells += state.blocks[b].positions.size();
    is_usual = is_usual && state.blocks[b].positions == described->state.blocks[b].positions;
  }
  if (is_usual || num_cells > kMaxRememberedCells) return;
  for (const RowBlock& block : state.blocks) layout->llama_cells.push_back(block.positions);
}

absl::StatusOr<ImportResult> ImportLlama(ModelHost* host, const Tenant& tenant,
                                         absl::string_view bytes, const ImportOptions& options,
                                         MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckForeignGeometry(host->model().geometry()));
  PT_ASSIGN_OR_RETURN(const LlamaCppState state, ParseLlama(host->model().geometry(), bytes));
  PT_RETURN_IF_ERROR(CheckBasis(state.state(), options));
  PT_ASSIGN_OR_RETURN(
      ImportResult result,
      ImportState(host, tenant, state.state(), BlockRule::kByKind, state, options, deadline));
  const LlamaCppLayout& layout = state.layout();
  result.format = StateFormat::kLlamaCpp;
  result.layout.llama_form = layout.form;
  result.layout.llama_version = layout.version;
  result.layout.llama_sequence_id = layout.sequence_id;
  result.layout.llama_v_transposed = layout.bodies[0].v_transposed;
  result.layout.llama_num_streams = layout.bodies[0].num_streams;
  result.layout.llama_stream = layout.bodies[0].stream;
  AddCells(state.state(), host->model().geometry(), result.info.length, &result.layout);
  return result;
}

absl::StatusOr<ImportResult> ImportMlx(ModelHost* host, const Tenant& tenant,
                                       absl::string_view bytes, const ImportOptions& options,
                                       MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(const MlxCache cache, MlxCache::Parse(bytes));
  if (options.basis == LayerGroupSpec::Basis::kHadamard) {
    PT_RETURN_IF_ERROR(CheckBasis(cache.state(), options));
  }
  PT_RETURN_IF_ERROR(CheckMlxWindows(cache, host->model().geometry()));
  PT_ASSIGN_OR_RETURN(
      ImportResult result,
      ImportState(host, tenant, cache.state(), BlockRule::kByNumber, cache, options, deadline));
  result.format = StateFormat::kMlx;
  result.layout.mlx_layout = cache.layout();
  result.layout.mlx_legacy = cache.is_legacy();
  result.layout.mlx_metadata = cache.user_metadata();
  return result;
}

absl::StatusOr<ImportResult> ImportLlamaSharp(ModelHost* host, const Tenant& tenant,
                                              absl::string_view bytes, const ImportOptions& options,
                                              MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(const LlamaSharpFile file, ParseLlamaSharp(bytes));
  if (file.token_count != options.tokens.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tokens has ", options.tokens.size(), " entries, the conversation has ", file.token_count));
  }
  PT_ASSIGN_OR_RETURN(ImportResult result,
                      ImportLlama(host, tenant, file.state, options, deadline));
  result.format = StateFormat::kLlamaSharp;
  result.layout.llama_sharp_json = std::string(file.json);
  return result;
}

}  // namespace

uint64_t PagesAtOnce(ModelHost* host) {
  uint64_t frames = std::numeric_limits<uint64_t>::max();
  for (const PoolUsage& pool : host->Usage()) frames = std::min(frames, pool.num_frames);
  return std::max<uint64_t>(1, frames / 2);
}

absl::StatusOr<StateFormat> RecogniseFormat(absl::string_view bytes) {
  LittleEndianReader in(bytes);
  const uint32_t magic = in.Take<uint32_t>();
  const uint32_t next = in.Take<uint32_t>();
  if (in.ok()) {
    if (magic == kNativeMagic) return StateFormat::kNative;
    if (magic == kLlamaCppFileMagic || magic == kLlamaCppMemoryMagic) return StateFormat::kLlamaCpp;
    if (magic == __builtin_bswap32(kLlamaSharpMagic)) return StateFormat::kLlamaSharp;
    // A safetensors header: a size below 4 GiB, then JSON.
    if (next == 0 && bytes.size() > 8 && bytes[8] == '{') return StateFormat::kMlx;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("import: the ", bytes.size(), " bytes begin like no format that is known"));
}

absl::StatusOr<ImportResult> ImportSequenceFile(ModelHost* host, const Tenant& tenant,
                                                absl::string_view file,
                                                const ImportOptions& options,
                                                MonotonicTime deadline) {
  StateFormat format;
  if (options.format) {
    format = *options.format;
  } else {
    PT_ASSIGN_OR_RETURN(format, RecogniseFormat(file));
  }
  switch (format) {
    case StateFormat::kNative:
      return ImportNative(host, tenant, file, deadline);
    case StateFormat::kLlamaCpp:
      return ImportLlama(host, tenant, file, options, deadline);
    case StateFormat::kMlx:
      return ImportMlx(host, tenant, file, options, deadline);
    case StateFormat::kLlamaSharp:
      return ImportLlamaSharp(host, tenant, file, options, deadline);
  }
  return absl::InvalidArgumentError(absl::StrCat("format is ", static_cast<int>(format)));
}

}  // namespace pagetide
