// PageTide's own file of one sequence: identity, tokens and rows, with a proof of where it comes
// from. The format is specified in docs/formats/native.md.
//
//   u32 "PTSQ", u16 version 1, u16 flags (0), field model name, 32 bytes model digest, 32 bytes
//   model identity, u32 page_tokens, u32 groups, per group {32 bytes component fingerprint, u32
//   layers, u32 K row bytes, u32 V row bytes, u64 first row r}, u64 canonical length, u64 n, n ×
//   u32 token, u64 m, m × {u64 position, 32 bytes digest}, per group and layer the K rows from r to
//   n, then the V rows, 32 bytes SHA-256 of all before, 32 bytes HMAC-SHA-256 of that under the
//   tenant's salt.
// Integers are little-endian; a field is a u64 length and its bytes.
//
// The HMAC is what lets rows be keyed again: only a worker of the same deployment and tenant can
// have written it, and such a worker states how many of the tokens were canonical. A file from
// elsewhere is read as well; its rows are then private.
#ifndef PAGETIDE_FORMATS_NATIVE_H_
#define PAGETIDE_FORMATS_NATIVE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/digest.h"
#include "core/keys.h"
#include "core/model.h"
#include "formats/sequence_state.h"

namespace pagetide {

inline constexpr uint32_t kNativeMagic = 0x51535450;  // "PTSQ"

struct NativeGroup {
  Digest fingerprint;
  uint32_t layers = 0;
  uint32_t k_row_bytes = 0;
  uint32_t v_row_bytes = 0;
  // Rows in front of it are not in the file: behind a window nobody attends to them.
  uint64_t first_row = 0;
  friend bool operator==(const NativeGroup&, const NativeGroup&) = default;
};

struct NativeHeader {
  std::string model_name;  // for people
  Digest model_digest;
  Digest model_identity;
  uint32_t page_tokens = 0;
  std::vector<NativeGroup> groups;
  uint64_t canonical_length = 0;
  std::vector<uint32_t> tokens;
  std::vector<PositionedInput> inputs;
  friend bool operator==(const NativeHeader&, const NativeHeader&) = default;
};

// Everything but tokens, inputs, canonical length and first rows.
NativeHeader NativeHeaderOf(const Model& model);

// A parsed file over bytes that the caller keeps. Immutable; thread-safe.
class NativeFile {
 public:
  // DATA_LOSS when it is cut, contradicts itself, or its SHA-256 is wrong; INVALID_ARGUMENT for
  // another magic or version.
  static absl::StatusOr<NativeFile> Parse(absl::string_view bytes);

  const NativeHeader& header() const { return header_; }
  // Written by a worker of this deployment for this tenant.
  bool IsProvenBy(const TenantSalt& salt) const;
  // FAILED_PRECONDITION (MODEL_MISMATCH) says what differs.
  absl::Status CheckModel(const Model& model) const;
  // Rows [first, first + count) of one layer, not in front of the group's first: a view.
  absl::StatusOr<absl::string_view> Rows(uint32_t group, uint32_t layer, RowKind kind,
                                         uint64_t first, uint64_t count) const;

 private:
  NativeHeader header_;
  std::vector<uint64_t> group_offsets_;  // of rows, in bytes_
  absl::string_view bytes_;
  Digest content_;
  absl::string_view proof_;
};

uint64_t NativeFileBytes(const NativeHeader& header);

// Copies rows of one layer, token-major, to `out`.
using NativeRowSource =
    absl::FunctionRef<absl::Status(uint32_t group, uint32_t layer, RowKind kind, uint64_t first,
                                   uint64_t count, std::span<std::byte> out)>;
absl::Status WriteNative(const NativeHeader& header, const TenantSalt& salt, NativeRowSource rows,
                         ByteSink sink);

}  // namespace pagetide

#endif  // PAGETIDE_FORMATS_NATIVE_H_
