#include "core/session_state.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "base/error_info.h"
#include "base/little_endian.h"
#include "core/page_store.h"

namespace pagetide {
namespace {

constexpr uint32_t kMagic = 0x53535450;  // "PTSS"
constexpr uint16_t kVersion = 1;
constexpr size_t kTrailerBytes = 16;
constexpr size_t kDigestBytes = 32;
constexpr size_t kInputBytes = 8 + kDigestBytes;
constexpr size_t kExtentBytes = 4 + 4 + 4 + 8 + 4;
constexpr size_t kMinMetadataBytes = 8 + 8;

constexpr size_t kMaxMetadataEntries = 64;
constexpr size_t kMaxMetadataKeyBytes = 128;
constexpr size_t kMaxMetadataBytes = 64 << 10;

Checksum128 ChecksumOfText(absl::string_view text) {
  return ChecksumOf(std::as_bytes(std::span(text.data(), text.size())));
}

void AppendDigest(std::string* out, const Digest& digest) {
  out->append(digest.view().data(), digest.view().size());
}

Digest TakeDigest(LittleEndianReader& in) {
  Digest digest;
  const absl::string_view raw = in.TakeBytes(kDigestBytes);
  if (!raw.empty()) std::memcpy(digest.bytes.data(), raw.data(), raw.size());
  return digest;
}

// A count of things of at least `bytes_each`; the reader fails if they cannot be there.
template <typename T>
uint64_t TakeCount(LittleEndianReader& in, size_t bytes_each) {
  const uint64_t count = in.Take<T>();
  if (in.ok() && count <= in.rest().size() / bytes_each) return count;
  in.TakeBytes(~uint64_t{0});  // fails, and all that follows with it
  return 0;
}

absl::Status Damaged(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("read saved state: ", what));
}

// Extents must lie within their pages and within the rows, one behind the other.
absl::Status CheckExtents(const SessionState& state, uint64_t num_pages) {
  for (size_t g = 0; g < state.groups.size(); ++g) {
    uint64_t end = 0;
    for (const SavedExtent& extent : state.groups[g]) {
      if (extent.page >= num_pages) {
        return Damaged(absl::StrCat("group ", g, " names page ", extent.page, " of ", num_pages));
      }
      if (extent.count == 0 || uint64_t{extent.first_slot} + extent.count > state.page_tokens) {
        return Damaged(absl::StrCat("group ", g, ": slots [", extent.first_slot, ", +",
                                    extent.count, ") in a page of ", state.page_tokens));
      }
      if (extent.first_row < end || extent.first_row > state.length() ||
          extent.count > state.length() - extent.first_row) {
        return Damaged(absl::StrCat("group ", g, ": rows [", extent.first_row, ", +", extent.count,
                                    ") behind row ", end, " of ", state.length()));
      }
      end = extent.end_row();
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::string EncodeSessionState(const SessionState& state) {
  std::string out;
  out.reserve(512 + state.tokens.size() * 4 + state.inputs.size() * kInputBytes);
  AppendLittleEndian<uint32_t>(&out, kMagic);
  AppendLittleEndian<uint16_t>(&out, kVersion);
  AppendLittleEndian<uint16_t>(&out, 0);
  AppendField(&out, state.tenant);
  AppendField(&out, state.model_name);
  AppendDigest(&out, state.model_digest);
  AppendDigest(&out, state.model_identity);
  AppendLittleEndian<uint32_t>(&out, state.page_tokens);
  AppendLittleEndian<uint32_t>(&out, static_cast<uint32_t>(state.fingerprints.size()));
  for (const Digest& fingerprint : state.fingerprints) AppendDigest(&out, fingerprint);
  AppendLittleEndian<uint64_t>(&out, state.canonical_length);
  AppendLittleEndian<uint64_t>(&out, state.tokens.size());
  for (uint32_t token : state.tokens) AppendLittleEndian<uint32_t>(&out, token);
  AppendLittleEndian<uint64_t>(&out, state.positions.size());
  for (int32_t position : state.positions) {
    AppendLittleEndian<uint32_t>(&out, static_cast<uint32_t>(position));
  }
  AppendLittleEndian<uint64_t>(&out, state.inputs.size());
  for (const PositionedInput& input : state.inputs) {
    AppendLittleEndian<uint64_t>(&out, input.position);
    AppendDigest(&out, input.digest);
  }
  for (const std::vector<SavedExtent>& group : state.groups) {
    AppendLittleEndian<uint64_t>(&out, group.size());
    for (const SavedExtent& extent : group) {
      AppendLittleEndian<uint32_t>(&out, extent.page);
      AppendLittleEndian<uint32_t>(&out, extent.first_slot);
      AppendLittleEndian<uint32_t>(&out, extent.count);
      AppendLittleEndian<uint64_t>(&out, extent.first_row);
      AppendLittleEndian<uint32_t>(&out, static_cast<uint32_t>(extent.shift));
    }
  }
  AppendLittleEndian<uint32_t>(&out, static_cast<uint32_t>(state.metadata.size()));
  for (const auto& [key, value] : state.metadata) {
    AppendField(&out, key);
    AppendField(&out, value);
  }
  AppendDigest(&out, state.request_digest);
  AppendLittleEndian<uint64_t>(&out, state.pages_written);
  AppendLittleEndian<uint64_t>(&out, state.bytes_written);
  AppendLittleEndian<uint64_t>(&out, state.bytes_total);
  const Checksum128 checksum = ChecksumOfText(out);
  AppendLittleEndian<uint64_t>(&out, checksum.low);
  AppendLittleEndian<uint64_t>(&out, checksum.high);
  return out;
}

absl::StatusOr<SessionState> ParseSessionState(absl::string_view bytes, uint64_t num_pages) {
  if (bytes.size() < kTrailerBytes) return Damaged(absl::StrCat(bytes.size(), " bytes"));
  const absl::string_view body = bytes.substr(0, bytes.size() - kTrailerBytes);
  LittleEndianReader in(body);
  const uint32_t magic = in.Take<uint32_t>();
  const uint16_t version = in.Take<uint16_t>();
  const uint16_t flags = in.Take<uint16_t>();
  if (!in.ok() || magic != kMagic) return Damaged("magic");
  if (version != kVersion || flags != 0) {
    return absl::UnimplementedError(
        absl::StrCat("read saved state: version ", version, ", flags ", flags));
  }
  LittleEndianReader trailer(bytes.substr(body.size()));
  Checksum128 expected;
  expected.low = trailer.Take<uint64_t>();
  expected.high = trailer.Take<uint64_t>();
  if (const Checksum128 actual = ChecksumOfText(body); actual != expected) {
    return Damaged(absl::StrCat("checksum 0x", actual.ToHex(), " != 0x", expected.ToHex()));
  }

  SessionState state;
  state.tenant = std::string(in.TakeField());
  state.model_name = std::string(in.TakeField());
  state.model_digest = TakeDigest(in);
  state.model_identity = TakeDigest(in);
  state.page_tokens = in.Take<uint32_t>();
  state.fingerprints.resize(TakeCount<uint32_t>(in, kDigestBytes));
  for (Digest& fingerprint : state.fingerprints) fingerprint = TakeDigest(in);
  state.canonical_length = in.Take<uint64_t>();
  state.tokens.resize(TakeCount<uint64_t>(in, sizeof(uint32_t)));
  for (uint32_t& token : state.tokens) token = in.Take<uint32_t>();
  state.positions.resize(TakeCount<uint64_t>(in, sizeof(int32_t)));
  for (int32_t& position : state.positions) {
    position = static_cast<int32_t>(in.Take<uint32_t>());
  }
  state.inputs.resize(TakeCount<uint64_t>(in, kInputBytes));
  for (PositionedInput& input : state.inputs) {
    input.position = in.Take<uint64_t>();
    input.digest = TakeDigest(in);
  }
  state.groups.resize(state.fingerprints.size());
  for (std::vector<SavedExtent>& group : state.groups) {
    group.resize(TakeCount<uint64_t>(in, kExtentBytes));
    for (SavedExtent& extent : group) {
      extent.page = in.Take<uint32_t>();
      extent.first_slot = in.Take<uint32_t>();
      extent.count = in.Take<uint32_t>();
      extent.first_row = in.Take<uint64_t>();
      extent.shift = static_cast<int32_t>(in.Take<uint32_t>());
    }
  }
  const uint64_t num_entries = TakeCount<uint32_t>(in, kMinMetadataBytes);
  for (uint64_t i = 0; i < num_entries && in.ok(); ++i) {
    std::string key(in.TakeField());
    std::string value(in.TakeField());
    if (in.ok() && !state.metadata.empty() && state.metadata.rbegin()->first >= key) {
      return Damaged(absl::StrCat("metadata entry ", i, " is not in order"));
    }
    state.metadata.emplace_hint(state.metadata.end(), std::move(key), std::move(value));
  }
  state.request_digest = TakeDigest(in);
  state.pages_written = in.Take<uint64_t>();
  state.bytes_written = in.Take<uint64_t>();
  state.bytes_total = in.Take<uint64_t>();
  if (!in.ok() || !in.rest().empty()) {
    return Damaged(absl::StrCat("counts do not fit its ", bytes.size(), " bytes"));
  }
  if (state.page_tokens == 0) return Damaged("page_tokens is 0");
  if (state.canonical_length > state.length()) {
    return Damaged(absl::StrCat("canonical length ", state.canonical_length, " of ", state.length(),
                                " tokens"));
  }
  if (!state.positions.empty() &&
      (state.positions.size() != state.length() || state.positions.front() < 0 ||
       !std::is_sorted(state.positions.begin(), state.positions.end()))) {
    return Damaged(absl::StrCat(state.positions.size(), " positions for ", state.length(),
                                " tokens, or not in order"));
  }
  uint64_t last = 0;
  for (const PositionedInput& input : state.inputs) {
    if (input.position < last || input.position >= state.length()) {
      return Damaged(absl::StrCat("input at token ", input.position, " of ", state.length()));
    }
    last = input.position;
  }
  if (absl::Status extents = CheckExtents(state, num_pages); !extents.ok()) return extents;
  return state;
}

absl::Status CheckManifestSize(absl::string_view action, const SessionState& state) {
  uint64_t num_pages = 0;
  for (const std::vector<SavedExtent>& group : state.groups) {
    for (const SavedExtent& extent : group) {
      num_pages = std::max<uint64_t>(num_pages, uint64_t{extent.page} + 1);
    }
  }
  const uint64_t bytes = num_pages * kManifestPageRefBytes + EncodeSessionState(state).size();
  if (bytes <= kMaxManifestBytes) return absl::OkStatus();
  return WithReason(absl::InvalidArgumentError(absl::StrCat(
                        action, ": ", state.length(), " tokens in ", num_pages, " pages and ",
                        state.metadata.size(), " metadata entries make a manifest of ", bytes,
                        " bytes, at most ", kMaxManifestBytes)),
                    "SESSION_TOO_LONG");
}

SessionSummary SummaryOf(const SessionState& state) {
  return {.tokens = state.length(),
          .canonical_length = state.canonical_length,
          .bytes_total = state.bytes_total,
          .model_digest = state.model_digest};
}

std::string EncodeSessionSummary(const SessionSummary& summary) {
  std::string out;
  AppendLittleEndian<uint16_t>(&out, kVersion);
  AppendLittleEndian<uint64_t>(&out, summary.tokens);
  AppendLittleEndian<uint64_t>(&out, summary.canonical_length);
  AppendLittleEndian<uint64_t>(&out, summary.bytes_total);
  AppendDigest(&out, summary.model_digest);
  return out;
}

absl::StatusOr<SessionSummary> ParseSessionSummary(absl::string_view bytes) {
  LittleEndianReader in(bytes);
  const uint16_t version = in.Take<uint16_t>();
  if (in.ok() && version != kVersion) {
    return absl::UnimplementedError(absl::StrCat("read session summary: version ", version));
  }
  SessionSummary summary;
  summary.tokens = in.Take<uint64_t>();
  summary.canonical_length = in.Take<uint64_t>();
  summary.bytes_total = in.Take<uint64_t>();
  summary.model_digest = TakeDigest(in);
  if (!in.ok() || !in.rest().empty()) {
    return absl::DataLossError(absl::StrCat("read session summary: ", bytes.size(), " bytes"));
  }
  return summary;
}

absl::Status ValidateSessionMetadata(const std::map<std::string, std::string>& metadata) {
  if (metadata.size() > kMaxMetadataEntries) {
    return absl::InvalidArgumentError(
        absl::StrCat("metadata has ", metadata.size(), " entries, at most ", kMaxMetadataEntries));
  }
  size_t bytes = 0;
  for (const auto& [key, value] : metadata) {
    if (key.empty() || key.size() > kMaxMetadataKeyBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a metadata key has ", key.size(), " bytes, must have 1 to ", kMaxMetadataKeyBytes));
    }
    bytes += key.size() + value.size();
  }
  if (bytes > kMaxMetadataBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("metadata has ", bytes, " bytes, at most ", kMaxMetadataBytes));
  }
  return absl::OkStatus();
}

absl::Status CheckSameModel(const SessionState& state, const Model& model) {
  if (state.model_digest == model.digest()) return absl::OkStatus();
  const PageGeometry& geometry = model.geometry();
  std::string differs;
  const auto add = [&](const std::string& what) {
    absl::StrAppend(&differs, differs.empty() ? "" : "; ", what);
  };
  if (state.model_identity != model.identity()) {
    add(absl::StrCat("weights, tokenizer, adapters or numerics (identity ",
                     state.model_identity.ToShortHex(), " != ", model.identity().ToShortHex(),
                     ")"));
  }
  if (state.page_tokens != geometry.page_tokens()) {
    add(absl::StrCat("page_tokens ", state.page_tokens, " != ", geometry.page_tokens()));
  }
  if (state.fingerprints.size() != geometry.num_groups()) {
    add(absl::StrCat("layer groups ", state.fingerprints.size(), " != ", geometry.num_groups()));
  }
  for (uint32_t g = 0; g < std::min<size_t>(state.fingerprints.size(), geometry.num_groups());
       ++g) {
    if (state.fingerprints[g] == geometry.group(g).fingerprint()) continue;
    add(absl::StrCat("geometry of layer group ", g, " (fingerprint ",
                     state.fingerprints[g].ToShortHex(),
                     " != ", geometry.group(g).fingerprint().ToShortHex(), ")"));
  }
  return WithReason(absl::FailedPreconditionError(absl::StrCat(
                        "the saved state is of model ", state.model_name, " ",
                        state.model_digest.ToShortHex(), ", not of ", model.spec().name, " ",
                        model.digest().ToShortHex(), ": ", differs, " differ")),
                    "MODEL_MISMATCH", {{"model_digest", state.model_digest.ToHex()}});
}

}  // namespace pagetide
