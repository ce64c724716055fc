#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "formats/llama_sharp.h"
#include "formats/mlx_cache.h"
#include "formats/native.h"
#include "worker/sequence_formats.h"

namespace pagetide {
namespace {

// A fork of the sequence, closed at the end.
class Fork {
 public:
  Fork(ModelHost* host, Tenant tenant, SequenceInfo info)
      : host_(host),
        tenant_(std::move(tenant)),
        info_(std::move(info)),
        pages_at_once_(PagesAtOnce(host)) {}
  ~Fork() {
    const absl::Status closed = host_->Close(tenant_, info_.id, info_.epoch);
    if (!closed.ok()) LogWarning("worker", "close the fork of an export: ", closed.message());
  }
  Fork(const Fork&) = delete;
  Fork& operator=(const Fork&) = delete;

  // Rows of tokens [first, first + count) of one layer; as many at a time as a small pool can hold
  // beside others' pages.
  absl::Status ReadRows(uint32_t group, uint32_t layer, RowKind kind, uint64_t first,
                        uint64_t count, MonotonicTime deadline, std::span<std::byte> out) const {
    const uint64_t page_tokens = host_->model().geometry().page_tokens();
    const uint64_t step = pages_at_once_ * page_tokens;
    const uint64_t row_bytes = out.size() / std::max<uint64_t>(1, count);
    while (count > 0) {
      const uint64_t some = std::min(count, step - first % page_tokens);
      PT_RETURN_IF_ERROR(
          ReadSome(group, layer, kind, first, some, deadline, out.subspan(0, some * row_bytes)));
      out = out.subspan(some * row_bytes);
      first += some;
      count -= some;
    }
    return absl::OkStatus();
  }

 private:
  absl::Status ReadSome(uint32_t group, uint32_t layer, RowKind kind, uint64_t first,
                        uint64_t count, MonotonicTime deadline, std::span<std::byte> out) const {
    PT_ASSIGN_OR_RETURN(const auto rows,
                        host_->PinRows(tenant_, info_.id, group, first, first + count, deadline));
    uint64_t done = 0;
    for (const ModelHost::PinnedRows::Run& run : rows->Runs(layer, kind)) {
      if (run.num_bytes > out.size() - done) {
        return absl::InternalError("pinned rows exceed what was asked for");
      }
      const std::span<std::byte> to = out.subspan(done, run.num_bytes);
      PT_RETURN_IF_ERROR(
          run.shift == 0 ? host_->pool().Read(run.offset, to)
                         : host_->pool().ReadShifted(host_->model().geometry().group(group),
                                                     run.offset, run.num_tokens, run.shift, to));
      done += run.num_bytes;
    }
    if (done != out.size()) {
      return absl::InternalError(
          absl::StrCat("read ", count, " rows: ", done, " bytes of ", out.size(), " are there"));
    }
    return absl::OkStatus();
  }

  ModelHost* const host_;
  const Tenant tenant_;
  const SequenceInfo info_;
  const uint64_t pages_at_once_;
};

// Rows of a described state: block rows by position.
class ForkRows : public RowReader {
 public:
  ForkRows(const Fork* fork, const SequenceState* state,
           const std::vector<std::vector<ModelLayer>>* places, MonotonicTime deadline)
      : fork_(fork), state_(state), places_(places), deadline_(deadline) {}

  absl::Status ReadRows(const RowRange& range, std::span<std::byte> out) const override {
    PT_RETURN_IF_ERROR(CheckRange(*state_, range, out.size()));
    const std::vector<uint32_t>& positions = state_->blocks[range.block].positions;
    const ModelLayer& at = (*places_)[range.block][range.layer];
    const LayerShape& shape = state_->blocks[range.block].layers[range.layer];
    const uint64_t row_bytes = shape.of(range.kind).bytes;
    // K and V of packed rows of another program are one packed row of the model's: K, then V.
    const bool is_joint = !shape.k.type && shape.v.bytes > 0;
    const uint64_t joint_bytes = shape.k.bytes + shape.v.bytes;
    const uint64_t max_run = is_joint ? std::max<uint64_t>(1, kMaxSinkBytes / joint_bytes)
                                      : std::numeric_limits<uint64_t>::max();
    std::vector<std::byte> joint;
    uint64_t run = 0;
    for (uint64_t done = 0; done < range.count; done += run) {
      const uint64_t first = positions[range.first + done];
      run = 1;
      while (done + run < range.count && run < max_run &&
             positions[range.first + done + run] == first + run) {
        ++run;
      }
      const std::span<std::byte> to = out.subspan(done * row_bytes, run * row_bytes);
      if (!is_joint) {
        PT_RETURN_IF_ERROR(
            fork_->ReadRows(at.group, at.layer, range.kind, first, run, deadline_, to));
        continue;
      }
      joint.resize(run * joint_bytes);
      PT_RETURN_IF_ERROR(
          fork_->ReadRows(at.group, at.layer, RowKind::kK, first, run, deadline_, joint));
      const uint64_t begin = range.kind == RowKind::kK ? 0 : shape.k.bytes;
      for (uint64_t r = 0; r < run; ++r) {
        std::memcpy(to.data() + r * row_bytes, joint.data() + r * joint_bytes + begin, row_bytes);
      }
    }
    return absl::OkStatus();
  }

 private:
  const Fork* const fork_;
  const SequenceState* const state_;
  const std::vector<std::vector<ModelLayer>>* const places_;
  const MonotonicTime deadline_;
};

class NativeExport final : public SequenceExport {
 public:
  NativeExport(std::unique_ptr<Fork> fork, NativeHeader header, TenantSalt salt,
               MonotonicTime deadline)
      : fork_(std::move(fork)), header_(std::move(header)), salt_(salt), deadline_(deadline) {}
  uint64_t total_bytes() const override { return NativeFileBytes(header_); }
  uint64_t num_tokens() const override { return header_.tokens.size(); }
  absl::Status Write(ByteSink sink) override {
    return WriteNative(
        header_, salt_,
        [&](uint32_t group, uint32_t layer, RowKind kind, uint64_t first, uint64_t count,
            std::span<std::byte> out) {
          return fork_->ReadRows(group, layer, kind, first, count, deadline_, out);
        },
        sink);
  }

 private:
  const std::unique_ptr<Fork> fork_;
  const NativeHeader header_;
  const TenantSalt salt_;
  const MonotonicTime deadline_;
};

// llama.cpp, and LLamaSharp with something in front.
class LlamaCppExport final : public SequenceExport {
 public:
  LlamaCppExport(std::unique_ptr<Fork> fork, std::string prefix, LlamaCppLayout layout,
                 DescribedState described, uint64_t state_bytes, MonotonicTime deadline)
      : fork_(std::move(fork)),
        prefix_(std::move(prefix)),
        layout_(std::move(layout)),
        described_(std::move(described)),
        state_bytes_(state_bytes),
        deadline_(deadline) {}
  uint64_t total_bytes() const override { return prefix_.size() + state_bytes_; }
  uint64_t num_tokens() const override { return described_.state.tokens->size(); }
  absl::Status Write(ByteSink sink) override {
    if (!prefix_.empty()) PT_RETURN_IF_ERROR(sink(prefix_));
    const ForkRows rows(fork_.get(), &described_.state, &described_.places, deadline_);
    return WriteLlamaCpp(layout_, described_.state, rows, sink);
  }

 private:
  const std::unique_ptr<Fork> fork_;
  const std::string prefix_;
  const LlamaCppLayout layout_;
  const DescribedState described_;
  const uint64_t state_bytes_;
  const MonotonicTime deadline_;
};

class MlxExport final : public SequenceExport {
 public:
  MlxExport(std::unique_ptr<Fork> fork, MlxCache layout,
            std::vector<std::vector<ModelLayer>> places, uint64_t num_tokens,
            MonotonicTime deadline)
      : fork_(std::move(fork)),
        layout_(std::move(layout)),
        places_(std::move(places)),
        num_tokens_(num_tokens),
        deadline_(deadline) {}
  uint64_t total_bytes() const override { return layout_.file_bytes(); }
  uint64_t num_tokens() const override { return num_tokens_; }
  absl::Status Write(ByteSink sink) override {
    const ForkRows rows(fork_.get(), &layout_.state(), &places_, deadline_);
    return WriteMlxCache(layout_, rows, sink);
  }

 private:
  const std::unique_ptr<Fork> fork_;
  const MlxCache layout_;
  const std::vector<std::vector<ModelLayer>> places_;
  const uint64_t num_tokens_;
  const MonotonicTime deadline_;
};

LlamaCppLayout LlamaLayoutOf(const FileLayout& layout, const DescribedState& described) {
  LlamaCppLayout out;
  out.form = layout.llama_form;
  out.version = layout.llama_version;
  out.sequence_id = layout.llama_sequence_id;
  out.bodies.resize(described.state.blocks.size());
  for (LlamaCppLayout::Body& body : out.bodies) {
    body.v_transposed = layout.llama_v_transposed;
    body.num_streams = layout.llama_num_streams;
    body.stream = layout.llama_stream;
  }
  return out;
}

// FAILED_PRECONDITION (CANNOT_EXPRESS) unless the sequence holds all rows of `state`.
absl::Status CheckHeld(const SequenceState& state,
                       const std::vector<std::vector<ModelLayer>>& places,
                       const SequenceContents& contents) {
  for (size_t b = 0; b < state.blocks.size(); ++b) {
    for (const ModelLayer& at : places[b]) {
      for (const uint32_t row : state.blocks[b].positions) {
        if (Holds(contents.held[at.group], row)) continue;
        return WithReason(absl::FailedPreconditionError(
                              absl::StrCat("export: layer group ", at.group, " gave up row ", row,
                                           ", which was behind its window")),
                          "CANNOT_EXPRESS");
      }
    }
  }
  return absl::OkStatus();
}

// The cells that a layout asks for, in its order.
absl::Status TakeCells(const FileLayout& layout, const PageGeometry& geometry,
                       const SequenceContents& contents, DescribedState* described) {
  if (layout.llama_cells.empty()) return absl::OkStatus();
  SequenceState& state = described->state;
  if (layout.llama_cells.size() != state.blocks.size()) {
    return absl::InvalidArgumentError(absl::StrCat("layout.llama_cells is of ",
                                                   layout.llama_cells.size(),
                                                   " bodies, the state has ", state.blocks.size()));
  }
  for (size_t b = 0; b < state.blocks.size(); ++b) {
    if (!layout.llama_cells[b].empty()) state.blocks[b].positions = layout.llama_cells[b];
  }
  const absl::Status cells =
      StateMap::Create(&state, BlockRule::kByKind, geometry, state.tokens->size()).status();
  if (!cells.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("layout.llama_cells: ", cells.message()));
  }
  return CheckHeld(state, described->places, contents);
}

absl::StatusOr<std::unique_ptr<SequenceExport>> BeginLlamaCpp(
    std::unique_ptr<Fork> fork, const PageGeometry& geometry, SequenceContents contents,
    const FileLayout& layout, bool is_sharp, MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(DescribedState described,
                      DescribeForLlamaCpp(geometry, std::move(contents.tokens), contents.held));
  PT_RETURN_IF_ERROR(TakeCells(layout, geometry, contents, &described));
  if (LlamaCppHintsFor(geometry, layout.llama_version).cell_ext_bytes != 0) {
    return WithReason(absl::FailedPreconditionError(
                          "write llama.cpp state: positions of several components are not kept"),
                      "CANNOT_EXPRESS");
  }
  LlamaCppLayout llama = LlamaLayoutOf(layout, described);
  std::string prefix;
  if (is_sharp) {
    if (llama.form == LlamaCppForm::kFile) llama.form = LlamaCppForm::kMemory;
    prefix = LlamaSharpPrefix(layout.llama_sharp_json, described.state.tokens->size());
    const absl::StatusOr<LlamaSharpFile> header = ParseLlamaSharp(prefix);
    if (!header.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("layout.llama_sharp_json: ", header.status().message()));
    }
    if (header->token_count != described.state.tokens->size()) {
      return absl::InvalidArgumentError(absl::StrCat("llama_sharp_json is of ", header->token_count,
                                                     " tokens, the sequence has ",
                                                     described.state.tokens->size()));
    }
  }
  PT_ASSIGN_OR_RETURN(const uint64_t bytes, LlamaCppStateBytes(llama, described.state));
  return std::make_unique<LlamaCppExport>(std::move(fork), std::move(prefix), std::move(llama),
                                          std::move(described), bytes, deadline);
}

absl::StatusOr<std::unique_ptr<SequenceExport>> BeginMlx(std::unique_ptr<Fork> fork,
                                                         const PageGeometry& geometry,
                                                         const SequenceContents& contents,
                                                         const FileLayout& layout,
                                                         MonotonicTime deadline) {
  const uint64_t num_tokens = contents.tokens.size();
  if (!layout.mlx_layout.empty()) {
    // A cache may have room for one step more than it has rows.
    absl::StatusOr<MlxCache> parsed = MlxCache::FromLayout(layout.mlx_layout, num_tokens + 65536);
    if (!parsed.ok()) {  // the caller's bytes, not stored ones
      return absl::InvalidArgumentError(
          absl::StrCat("layout.mlx_layout: ", parsed.status().message()));
    }
    MlxCache cache = *std::move(parsed);
    PT_ASSIGN_OR_RETURN(auto places, PlacesOf(cache.state(), geometry, num_tokens));
    PT_RETURN_IF_ERROR(CheckHeld(cache.state(), places, contents));
    return std::make_unique<MlxExport>(std::move(fork), std::move(cache), std::move(places),
                                       num_tokens, deadline);
  }
  PT_ASSIGN_OR_RETURN(DescribedMlx described, DescribeForMlx(geometry));
  MlxComposeOptions compose;
  compose.legacy = layout.mlx_legacy;
  compose.user_metadata = layout.mlx_metadata;
  compose.layers = described.layers;
  compose.rows = num_tokens;
  PT_ASSIGN_OR_RETURN(MlxCache cache, ComposeMlxLayout(compose));
  PT_RETURN_IF_ERROR(CheckHeld(cache.state(), described.places, contents));
  return std::make_unique<MlxExport>(std::move(fork), std::move(cache), std::move(described.places),
                                     num_tokens, deadline);
}

}  // namespace

absl::StatusOr<std::unique_ptr<SequenceExport>> SequenceExport::Begin(
    ModelHost* host, const Tenant& tenant, SequenceId id, StateFormat format,
    const FileLayout& layout, MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(const SequenceInfo seen, host->Get(tenant, id));
  PT_ASSIGN_OR_RETURN(const ForkResult forked,
                      host->Fork(tenant, {id, seen.epoch, std::nullopt}, std::nullopt, deadline,
                                 /*is_unlisted=*/true));
  auto fork = std::make_unique<Fork>(host, tenant, forked.info);
  PT_ASSIGN_OR_RETURN(SequenceContents contents, host->ReadContents(tenant, forked.info.id));
  if (!contents.positions.empty()) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(
                          "export sequence ", id.ToString(),
                          ": tokens were removed or moved; only sequences with a token at each "
                          "position from 0 on can be written")),
                      "CANNOT_EXPRESS");
  }
  if (contents.tokens.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("export sequence ", id.ToString(), ": it has no tokens"));
  }
  const PageGeometry& geometry = host->model().geometry();
  switch (format) {
    case StateFormat::kNative: {
      for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
        if (geometry.group(g).has_rows()) continue;
        return WithReason(absl::FailedPreconditionError(
                              absl::StrCat("export sequence ", id.ToString(), ": layer group ", g,
                                           " is recurrent or opaque: it has no rows")),
                          "CANNOT_EXPRESS");
      }
      NativeHeader header = NativeHeaderOf(host->model());
      for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
        const std::vector<RowSpan>& held = contents.held[g];
        if (held.size() != 1 || held.front().end != contents.tokens.size()) {
          return WithReason(absl::FailedPreconditionError(absl::StrCat(
                                "export sequence ", id.ToString(), ": layer group ", g, " holds ",
                                held.size(), " separate runs of rows, the file one up to the end")),
                            "CANNOT_EXPRESS");
        }
        header.groups[g].first_row = held.front().begin;
      }
      header.canonical_length = contents.info.canonical_length;
      header.tokens = std::move(contents.tokens);
      header.inputs = std::move(contents.inputs);
      return std::make_unique<NativeExport>(std::move(fork), std::move(header), tenant.salt,
                                            deadline);
    }
    case StateFormat::kLlamaCpp:
    case StateFormat::kLlamaSharp:
      return BeginLlamaCpp(std::move(fork), geometry, std::move(contents), layout,
                           format == StateFormat::kLlamaSharp, deadline);
    case StateFormat::kMlx:
      return BeginMlx(std::move(fork), geometry, contents, layout, deadline);
  }
  return absl::InvalidArgumentError(absl::StrCat("format is ", static_cast<int>(format)));
}

}  // namespace pagetide
