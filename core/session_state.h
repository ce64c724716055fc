// SessionState: all that a saved sequence is, apart from its pages: whose and of which model, its
// tokens, and which rows of which pages make it up. It is the payload of the manifest that lists
// the pages; sessions, store checkpoints and parked sequences are such manifests.
//
// Stored form, version 1 (docs/store_format.md). Integers are little-endian, a field is a u64
// length and its bytes:
//   u32 "PTSS", u16 version, u16 flags (0), field tenant, field model name, 32 bytes model digest,
//   32 bytes model identity, u32 page_tokens, u32 groups, per group 32 bytes component fingerprint,
//   u64 canonical length, u64 n, n × u32 token, u64 p (0 or n), p × i32 position, u64 m, m × {u64
//   row, 32 bytes digest}, per group u64 e, e × {u32 page, u32 first slot, u32 count, u64 first
//   row, i32 shift},
//   u32 k, k × {field key, field value} in order of key, 32 bytes request digest, u64 pages
//   written, u64 bytes written, u64 bytes total, XXH3-128 (low, high) of all before.
// Pure functions; thread-safe.
#ifndef PAGETIDE_CORE_SESSION_STATE_H_
#define PAGETIDE_CORE_SESSION_STATE_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/digest.h"
#include "core/keys.h"
#include "core/model.h"

namespace pagetide {

// Rows [first_slot, first_slot + count) of a page of the manifest: consecutive rows of the state.
struct SavedExtent {
  uint32_t page = 0;  // index in the manifest's list of pages
  uint32_t first_slot = 0;
  uint32_t count = 0;
  uint64_t first_row = 0;
  int32_t shift = 0;  // pending K rotation in positions
  uint64_t end_row() const { return first_row + count; }
  friend bool operator==(const SavedExtent&, const SavedExtent&) = default;
};

struct SessionState {
  std::string tenant;
  std::string model_name;  // for people; the digests decide
  Digest model_digest;
  Digest model_identity;
  uint32_t page_tokens = 0;
  std::vector<Digest> fingerprints;  // [group]
  // Leading tokens whose rows stand at their original positions: their full pages are keyed.
  uint64_t canonical_length = 0;
  std::vector<uint32_t> tokens;         // [row]
  std::vector<int32_t> positions;       // [row], never decreasing; empty: row n is at position n
  std::vector<PositionedInput> inputs;  // ascending
  // [group], in order of rows. Rows that a group does not need any more are left out.
  std::vector<std::vector<SavedExtent>> groups;
  std::map<std::string, std::string> metadata;  // the caller's own

  // Of the save that made it, to answer its retry: SHA-256 of what was asked for, and the numbers
  // of the first answer. Bytes are raw page bytes.
  Digest request_digest;
  uint64_t pages_written = 0;
  uint64_t bytes_written = 0;
  uint64_t bytes_total = 0;

  uint64_t length() const { return tokens.size(); }
  friend bool operator==(const SessionState&, const SessionState&) = default;
};

std::string EncodeSessionState(const SessionState& state);
// `num_pages`: length of the manifest's list. DATA_LOSS: damage, or numbers that cannot be;
// UNIMPLEMENTED: the version of a newer program. Every count is checked against the bytes that are
// there before anything of its size is allocated.
absl::StatusOr<SessionState> ParseSessionState(absl::string_view bytes, uint64_t num_pages);

// INVALID_ARGUMENT (SESSION_TOO_LONG) if a manifest cannot hold the state, its metadata included,
// with its list of pages. For before any page is sent. What passes also fits in one answer: no
// number takes more than a quarter more there.
absl::Status CheckManifestSize(absl::string_view action, const SessionState& state);

// What a list says of a session without reading it whole: the summary of its manifest.
//   u16 version 1, u64 tokens, u64 canonical length, u64 bytes total, 32 bytes model digest.
struct SessionSummary {
  uint64_t tokens = 0;
  uint64_t canonical_length = 0;
  uint64_t bytes_total = 0;
  Digest model_digest;
  friend bool operator==(const SessionSummary&, const SessionSummary&) = default;
};
SessionSummary SummaryOf(const SessionState& state);
std::string EncodeSessionSummary(const SessionSummary& summary);
// DATA_LOSS, UNIMPLEMENTED as above.
absl::StatusOr<SessionSummary> ParseSessionSummary(absl::string_view bytes);

// INVALID_ARGUMENT beyond 64 entries, keys that do not have 1 to 128 bytes, 64 KiB in all.
absl::Status ValidateSessionMetadata(const std::map<std::string, std::string>& metadata);

// OK when rows of `state` are rows of `model`. FAILED_PRECONDITION (MODEL_MISMATCH) says what
// differs: weights, tokenizer or adapters; page_tokens; which layer group.
absl::Status CheckSameModel(const SessionState& state, const Model& model);

}  // namespace pagetide

#endif  // PAGETIDE_CORE_SESSION_STATE_H_
