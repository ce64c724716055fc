#include "formats/native.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/little_endian.h"
#include "base/status_macros.h"
#include "formats/byte_parser.h"

namespace pagetide {
namespace {

constexpr uint16_t kVersion = 1;
constexpr uint32_t kMaxGroups = 64;
constexpr uint64_t kTrailerBytes = 64;
constexpr absl::string_view kFormat = "PageTide sequence file";

Digest Proof(const TenantSalt& salt, const Digest& content) {
  return HmacSha256(salt.digest.view(), absl::StrCat("pagetide.sequence_file.v1", content.view()));
}

std::string EncodeHeader(const NativeHeader& header) {
  std::string out;
  AppendLittleEndian(&out, kNativeMagic);
  AppendLittleEndian(&out, kVersion);
  AppendLittleEndian<uint16_t>(&out, 0);
  AppendField(&out, header.model_name);
  const auto append_digest = [&](const Digest& d) { out.append(d.view().data(), d.view().size()); };
  append_digest(header.model_digest);
  append_digest(header.model_identity);
  AppendLittleEndian(&out, header.page_tokens);
  AppendLittleEndian(&out, static_cast<uint32_t>(header.groups.size()));
  for (const NativeGroup& group : header.groups) {
    append_digest(group.fingerprint);
    AppendLittleEndian(&out, group.layers);
    AppendLittleEndian(&out, group.k_row_bytes);
    AppendLittleEndian(&out, group.v_row_bytes);
    AppendLittleEndian(&out, group.first_row);
  }
  AppendLittleEndian(&out, header.canonical_length);
  AppendLittleEndian<uint64_t>(&out, header.tokens.size());
  for (const uint32_t token : header.tokens) AppendLittleEndian(&out, token);
  AppendLittleEndian<uint64_t>(&out, header.inputs.size());
  for (const PositionedInput& input : header.inputs) {
    AppendLittleEndian(&out, input.position);
    append_digest(input.digest);
  }
  return out;
}

absl::StatusOr<Digest> TakeDigest(ByteParser* in, absl::string_view what) {
  PT_ASSIGN_OR_RETURN(const absl::string_view raw, in->TakeRun(what, 1, 32));
  return Digest::FromBytes(raw);
}

absl::Status ParseHeader(ByteParser* in, NativeHeader* header) {
  PT_ASSIGN_OR_RETURN(const uint32_t magic, in->TakeLittleEndian<uint32_t>("magic"));
  PT_ASSIGN_OR_RETURN(const uint16_t version, in->TakeLittleEndian<uint16_t>("version"));
  PT_ASSIGN_OR_RETURN(const uint16_t flags, in->TakeLittleEndian<uint16_t>("flags"));
  if (magic != kNativeMagic || version != kVersion || flags != 0) {
    return absl::InvalidArgumentError(absl::StrCat("read ", kFormat, ": magic 0x",
                                                   absl::Hex(magic, absl::kZeroPad8), ", version ",
                                                   version, ", flags ", flags, " are not known"));
  }
  PT_ASSIGN_OR_RETURN(const uint64_t name_bytes, in->TakeLittleEndian<uint64_t>("model name"));
  PT_ASSIGN_OR_RETURN(const absl::string_view name, in->TakeRun("model name", name_bytes, 1));
  header->model_name = std::string(name);
  PT_ASSIGN_OR_RETURN(header->model_digest, TakeDigest(in, "model digest"));
  PT_ASSIGN_OR_RETURN(header->model_identity, TakeDigest(in, "model identity"));
  PT_ASSIGN_OR_RETURN(header->page_tokens, in->TakeLittleEndian<uint32_t>("page_tokens"));
  PT_ASSIGN_OR_RETURN(const uint32_t groups, in->TakeLittleEndian<uint32_t>("groups"));
  if (groups < 1 || groups > kMaxGroups) return in->DataLoss("it has ", groups, " layer groups");
  for (uint32_t g = 0; g < groups; ++g) {
    NativeGroup group;
    PT_ASSIGN_OR_RETURN(group.fingerprint, TakeDigest(in, "fingerprint"));
    PT_ASSIGN_OR_RETURN(group.layers, in->TakeLittleEndian<uint32_t>("layers"));
    PT_ASSIGN_OR_RETURN(group.k_row_bytes, in->TakeLittleEndian<uint32_t>("K row bytes"));
    PT_ASSIGN_OR_RETURN(group.v_row_bytes, in->TakeLittleEndian<uint32_t>("V row bytes"));
    PT_ASSIGN_OR_RETURN(group.first_row, in->TakeLittleEndian<uint64_t>("first row"));
    if (group.layers < 1 || group.layers > kMaxLayers) {
      return in->DataLoss("group ", g, " has ", group.layers, " layers");
    }
    header->groups.push_back(group);
  }
  PT_ASSIGN_OR_RETURN(header->canonical_length, in->TakeLittleEndian<uint64_t>("canonical length"));
  PT_ASSIGN_OR_RETURN(const uint64_t n, in->TakeLittleEndian<uint64_t>("number of tokens"));
  if (n > kMaxStateTokens) return in->DataLoss(n, " tokens, at most ", kMaxStateTokens);
  if (header->canonical_length > n) {
    return in->DataLoss("canonical length ", header->canonical_length, " of ", n, " tokens");
  }
  for (const NativeGroup& group : header->groups) {
    if (group.first_row == 0 || group.first_row < n) continue;
    return in->DataLoss("a layer group begins at row ", group.first_row, " of ", n);
  }
  PT_ASSIGN_OR_RETURN(const absl::string_view raw, in->TakeRun("tokens", n, 4));
  LittleEndianReader tokens(raw);
  header->tokens.reserve(n);
  for (uint64_t i = 0; i < n; ++i) header->tokens.push_back(tokens.Take<uint32_t>());
  PT_ASSIGN_OR_RETURN(const uint64_t m, in->TakeLittleEndian<uint64_t>("number of inputs"));
  if (m > n) return in->DataLoss(m, " inputs of ", n, " tokens");
  PT_ASSIGN_OR_RETURN(const absl::string_view raw_inputs, in->TakeRun("inputs", m, 40));
  LittleEndianReader inputs(raw_inputs);
  for (uint64_t i = 0; i < m; ++i) {
    PositionedInput input;
    input.position = inputs.Take<uint64_t>();
    PT_ASSIGN_OR_RETURN(input.digest, Digest::FromBytes(inputs.TakeBytes(32)));
    header->inputs.push_back(input);
  }
  return absl::OkStatus();
}

}  // namespace

NativeHeader NativeHeaderOf(const Model& model) {
  NativeHeader header;
  header.model_name = model.spec().name;
  header.model_digest = model.digest();
  header.model_identity = model.identity();
  header.page_tokens = model.geometry().page_tokens();
  for (uint32_t g = 0; g < model.geometry().num_groups(); ++g) {
    const GroupGeometry& group = model.geometry().group(g);
    header.groups.push_back(
        {group.fingerprint(), group.num_layers(), group.k_row_bytes(), group.v_row_bytes()});
  }
  return header;
}

absl::StatusOr<NativeFile> NativeFile::Parse(absl::string_view bytes) {
  if (bytes.size() < kTrailerBytes) {
    return absl::DataLossError(absl::StrCat("read ", kFormat, ": it has ", bytes.size(), " bytes"));
  }
  NativeFile file;
  file.bytes_ = bytes.substr(0, bytes.size() - kTrailerBytes);
  ByteParser in(kFormat, file.bytes_);
  PT_RETURN_IF_ERROR(ParseHeader(&in, &file.header_));
  const uint64_t n = file.header_.tokens.size();
  for (const NativeGroup& group : file.header_.groups) {
    file.group_offsets_.push_back(in.offset());
    const uint64_t token_bytes =
        uint64_t{group.layers} * (uint64_t{group.k_row_bytes} + group.v_row_bytes);
    PT_RETURN_IF_ERROR(in.TakeRun("rows", n - group.first_row, token_bytes).status());
  }
  if (in.remaining() != 0) return in.DataLoss(in.remaining(), " bytes are left over");
  file.content_ = Sha256Of(file.bytes_);
  const absl::string_view trailer = bytes.substr(file.bytes_.size());
  if (trailer.substr(0, 32) != file.content_.view()) {
    return in.DataLoss("the SHA-256 of what stands before differs");
  }
  file.proof_ = trailer.substr(32);
  return file;
}

bool NativeFile::IsProvenBy(const TenantSalt& salt) const {
  const Digest expected = Proof(salt, content_);
  // In constant time: the caller may be guessing.
  uint8_t difference = 0;
  for (size_t i = 0; i < 32; ++i) {
    difference |= static_cast<uint8_t>(expected.view()[i] ^ proof_[i]);
  }
  return difference == 0;
}

absl::Status NativeFile::CheckModel(const Model& model) const {
  const NativeHeader expected = NativeHeaderOf(model);
  const auto mismatch = [&](const auto&... what) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(
                          "read ", kFormat, " of model ", header_.model_name, ": ", what...)),
                      "MODEL_MISMATCH");
  };
  if (header_.page_tokens != expected.page_tokens) {
    return mismatch("page_tokens ", header_.page_tokens, " != ", expected.page_tokens);
  }
  if (header_.groups.size() != expected.groups.size()) {
    return mismatch(header_.groups.size(), " layer groups, the model has ", expected.groups.size());
  }
  for (size_t g = 0; g < expected.groups.size(); ++g) {
    NativeGroup group = header_.groups[g];
    group.first_row = 0;
    if (group != expected.groups[g]) {
      return mismatch(
          "layer group ", g, " differs: ", header_.groups[g].layers, " layers with rows of ",
          header_.groups[g].k_row_bytes, " and ", header_.groups[g].v_row_bytes,
          " bytes, fingerprint ", header_.groups[g].fingerprint.ToShortHex(), "; the model has ",
          expected.groups[g].layers, ", ", expected.groups[g].k_row_bytes, " and ",
          expected.groups[g].v_row_bytes, ", ", expected.groups[g].fingerprint.ToShortHex());
    }
  }
  if (header_.model_identity != expected.model_identity) {
    return mismatch("weights, tokenizer or adapters differ (identity ",
                    header_.model_identity.ToShortHex(),
                    " != ", expected.model_identity.ToShortHex(), ")");
  }
  return absl::OkStatus();
}

absl::StatusOr<absl::string_view> NativeFile::Rows(uint32_t group, uint32_t layer, RowKind kind,
                                                   uint64_t first, uint64_t count) const {
  const uint64_t end = header_.tokens.size();
  if (group >= header_.groups.size() || layer >= header_.groups[group].layers || first > end ||
      count > end - first || first < header_.groups[group].first_row) {
    return absl::InvalidArgumentError(absl::StrCat("read rows ", first, " + ", count, " of layer ",
                                                   layer, " of group ", group, " of a ", kFormat));
  }
  const NativeGroup& g = header_.groups[group];
  const uint64_t row = kind == RowKind::kK ? g.k_row_bytes : g.v_row_bytes;
  const uint64_t n = end - g.first_row;
  const uint64_t layer_offset = n * layer * (uint64_t{g.k_row_bytes} + g.v_row_bytes) +
                                (kind == RowKind::kV ? n * g.k_row_bytes : 0);
  return bytes_.substr(group_offsets_[group] + layer_offset + (first - g.first_row) * row,
                       count * row);
}

uint64_t NativeFileBytes(const NativeHeader& header) {
  uint64_t bytes = EncodeHeader(header).size() + kTrailerBytes;
  for (const NativeGroup& g : header.groups) {
    bytes +=
        (header.tokens.size() - g.first_row) * g.layers * (uint64_t{g.k_row_bytes} + g.v_row_bytes);
  }
  return bytes;
}

absl::Status WriteNative(const NativeHeader& header, const TenantSalt& salt, NativeRowSource rows,
                         ByteSink sink) {
  Sha256 hash;
  const auto put = [&](absl::string_view bytes) -> absl::Status {
    hash.Append(bytes);
    for (size_t at = 0; at < bytes.size(); at += kMaxSinkBytes) {
      PT_RETURN_IF_ERROR(sink(bytes.substr(at, kMaxSinkBytes)));
    }
    return absl::OkStatus();
  };
  PT_RETURN_IF_ERROR(put(EncodeHeader(header)));
  const uint64_t n = header.tokens.size();
  std::vector<std::byte> buffer;
  for (uint32_t g = 0; g < header.groups.size(); ++g) {
    for (uint32_t layer = 0; layer < header.groups[g].layers; ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint64_t row =
            kind == RowKind::kK ? header.groups[g].k_row_bytes : header.groups[g].v_row_bytes;
        if (row == 0) continue;
        const uint64_t step = std::max<uint64_t>(1, kMaxSinkBytes / row);
        for (uint64_t first = header.groups[g].first_row; first < n; first += step) {
          const uint64_t count = std::min(step, n - first);
          buffer.resize(count * row);
          PT_RETURN_IF_ERROR(rows(g, layer, kind, first, count, buffer));
          PT_RETURN_IF_ERROR(put({reinterpret_cast<const char*>(buffer.data()), buffer.size()}));
        }
      }
    }
  }
  const Digest content = hash.Finish();
  PT_RETURN_IF_ERROR(sink(content.view()));
  return sink(Proof(salt, content).view());
}

}  // namespace pagetide
