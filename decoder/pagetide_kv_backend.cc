#include "decoder/pagetide_kv_backend.h"

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// The two enumerations list the same types in the same order; the geometry's begins at 1.
static_assert(static_cast<int>(kernels::KvType::kIQ4NL) + 1 == static_cast<int>(DataType::kIQ4NL));
DataType DataTypeOf(kernels::KvType type) {
  return static_cast<DataType>(static_cast<int>(type) + 1);
}

absl::Status NotOpen(absl::string_view action) {
  return absl::FailedPreconditionError(absl::StrCat(action, ": no append is open"));
}

}  // namespace

ModelSpec ModelSpecOf(const Decoder& decoder, absl::string_view name, uint32_t page_tokens) {
  const DecoderConfig& config = decoder.config();
  ModelSpec spec;
  spec.batch_invariant = true;  // a fixed order of summation
  spec.name = std::string(name);
  spec.weights_digest = decoder.weights_digest();
  spec.tokenizer_digest = Sha256Of("bytes 0..255, 256 begins a sequence");
  spec.vocabulary_size = DecoderConfig::kVocabularySize;
  spec.geometry.page_tokens = page_tokens;
  LayerGroupSpec group;
  for (int32_t layer = 0; layer < config.num_layers; ++layer) group.layers.push_back(layer);
  group.k_type = DataTypeOf(config.kv_type);
  group.v_type = group.k_type;
  group.kv_heads = config.num_kv_heads;
  group.k_dim = config.head_dim;
  group.v_dim = config.head_dim;
  group.rope.style = RopeSpec::Style::kNorm;
  group.rope.n_rot = config.head_dim;
  group.rope.base = config.rope_base;
  spec.geometry.groups.push_back(std::move(group));
  return spec;
}

absl::Status PageTideKvBackend::BeginAppend(std::span<const uint32_t> tokens) {
  if (append_ != nullptr || step_ != nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("begin append: ", tokens_.size(), " tokens are already being appended"));
  }
  tokens_.assign(tokens.begin(), tokens.end());
  if (tokens_.size() == 1) {
    PT_ASSIGN_OR_RETURN(step_, sequence_->BeginStep(1));
  } else {
    PT_ASSIGN_OR_RETURN(append_, sequence_->BeginAppend(tokens_));
  }
  return absl::OkStatus();
}

absl::Status PageTideKvBackend::AppendRows(int layer, std::span<const std::byte> k_rows,
                                           std::span<const std::byte> v_rows) {
  if (step_ != nullptr) return step_->WriteRows(0, layer, k_rows, v_rows);
  if (append_ == nullptr) return NotOpen("append rows");
  PT_RETURN_IF_ERROR(append_->WriteRows(0, layer, RowKind::kK, 0, k_rows));
  return append_->WriteRows(0, layer, RowKind::kV, 0, v_rows);
}

absl::Status PageTideKvBackend::Attend(int layer, std::span<const float> queries,
                                       std::span<float> out) {
  AttendCall call;
  call.layer = static_cast<uint32_t>(layer);
  call.query_heads = num_q_heads_;
  call.first_position = sequence_->end_position();
  call.queries = queries;
  call.outputs = out;
  if (step_ != nullptr) return step_->Attend(call);
  if (append_ == nullptr) return NotOpen("attend");
  return append_->Attend(call);
}

absl::Status PageTideKvBackend::Commit() {
  if (step_ != nullptr) {
    PT_RETURN_IF_ERROR(step_->Commit(tokens_));
    step_.reset();
    return absl::OkStatus();
  }
  if (append_ == nullptr) return NotOpen("commit");
  PT_RETURN_IF_ERROR(append_->Commit().status());
  append_.reset();
  return absl::OkStatus();
}

void PageTideKvBackend::Abort() {
  append_.reset();
  step_.reset();
}

}  // namespace pagetide
