// InPlaceRows: the committed rows of a sequence where they lie, in the worker's frames, mapped
// read-only into this process. Nothing is copied and no call is made to read them.
//
// The rows stay as they are until the lease ends, whatever happens to the sequence; behind it the
// frames may hold anything else. Read, then ask IsValid: what was read before a true answer is
// right. Immutable; thread-safe. Outlives the sequence if need be.
#ifndef PAGETIDE_CLIENTS_CPP_IN_PLACE_ROWS_H_
#define PAGETIDE_CLIENTS_CPP_IN_PLACE_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "clients/cpp/local_staging.h"
#include "core/geometry.h"
#include "core/model.h"
#include "pagetide/v1/sequence.pb.h"

namespace pagetide {

class InPlaceRows {
 public:
  // Consecutive rows inside one page.
  struct Run {
    uint64_t first_token = 0;
    uint32_t num_tokens = 0;
    std::span<const std::byte> bytes;  // [num_tokens, row_bytes]
  };

  // INVALID_ARGUMENT unless above 0 and at most 30 s.
  static absl::Status CheckLease(absl::Duration lease);
  // INTERNAL when the table names bytes outside the shared memory; FAILED_PRECONDITION
  // (ROWS_SHIFTED) when an edit left K to be rotated: it is not yet what the frames hold.
  static absl::StatusOr<std::unique_ptr<InPlaceRows>> Create(std::shared_ptr<LocalStaging> memory,
                                                             std::shared_ptr<const Model> model,
                                                             const v1::GetBlockTableResponse& table,
                                                             MonotonicTime expires);

  uint64_t length() const { return length_; }
  // In order of tokens, all of them. Empty for a group, layer or kind that the model has not.
  std::vector<Run> Rows(uint32_t group, uint32_t layer, RowKind kind) const;
  // Copies the rows of all tokens to `to`, one behind the other. As fast as memory is, which memcpy
  // out of frames need not be (base/copy_bytes.h). INVALID_ARGUMENT unless `to` has exactly their
  // size; look at IsValid() afterwards.
  absl::Status CopyRows(uint32_t group, uint32_t layer, RowKind kind,
                        std::span<std::byte> to) const;
  // False once the lease has ended, counted from before it was asked for.
  bool IsValid() const { return Clock::Real()->MonotonicNow() < expires_; }

 private:
  struct Extent {
    uint32_t group = 0;
    uint64_t first_row = 0;
    uint32_t first_slot = 0;
    uint32_t count = 0;
    uint64_t pool_offset = 0;
  };

  InPlaceRows(std::shared_ptr<LocalStaging> memory, std::shared_ptr<const Model> model,
              uint64_t length, std::vector<Extent> extents, MonotonicTime expires);

  const std::shared_ptr<LocalStaging> memory_;  // shared with the connection
  const std::shared_ptr<const Model> model_;    // shared with the sequences of the model
  const uint64_t length_;
  const std::vector<Extent> extents_;
  const MonotonicTime expires_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_IN_PLACE_ROWS_H_
