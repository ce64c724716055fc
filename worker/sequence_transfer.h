// A sequence on its way from one worker's frames to another's: what the source states of it, and
// the two ends. Knows no gRPC. Every ModelHost is a TransferHost too (TransfersOf).
//
// Rule: a page is the same on both sides if its key and the checksum of its body are. What is
// stated is proven under the tenant's salt; what is pushed is verified as it enters a frame.
#ifndef PAGETIDE_WORKER_SEQUENCE_TRANSFER_H_
#define PAGETIDE_WORKER_SEQUENCE_TRANSFER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/digest.h"
#include "core/page_store.h"
#include "core/session_state.h"
#include "worker/collective.h"
#include "worker/model_host.h"

namespace pagetide {

// A page of a sequence as it lies in frames.
struct TransferPage {
  ManifestPageRef ref;  // the checksum is of the whole frame
  uint32_t rows = 0;    // leading slots that are written
  bool is_full = false;
};

// Values equal the proto enum TransferKind.
enum class TransferKind : uint8_t { kCopy = 1, kMove = 2, kPages = 3 };

// What a sequence is, apart from the bytes of its pages.
struct TransferPlan {
  TransferKind kind = TransferKind::kCopy;
  SessionState state;
  std::vector<TransferPage> pages;  // that state.groups refer to, each by one group
  SequenceIdentity identity;        // kMove: id, and the epoch that it has at the source
};

// Proof that a worker of this deployment states `plan` for this tenant:
//   HMAC-SHA-256(salt, "pagetide.transfer.v1" SHA-256(field state, u32 kind, field sequence id, u64
//   epoch, u64 n, n × {field key, u64 checksum low, u64 high, u32 rows, u32 is_full}))
// `state`: as EncodeSessionState writes it. A field is its u64 length and its bytes; integers are
// little-endian.
Digest ProveTransfer(const TransferPlan& plan, absl::string_view state, const TenantSalt& salt);

// The source's end: a sequence as it was when this was made. Thread-safe; lives no longer than the
// host. Of a move the sequence can be neither changed nor closed by others from then on
// (SEQUENCE_MOVED), until CloseMoved closes it, or EndHold or the end of this object lets it go on.
class OutgoingSequence {
 public:
  virtual ~OutgoingSequence() = default;
  virtual const TransferPlan& plan() const = 0;
  virtual uint64_t page_bytes(uint32_t page) const = 0;
  // Hands the bytes of each page to `sink`, in order; brings them back from the store first where
  // they are there only. Ends with the sink's error. ABORTED when a page is not what the plan says
  // any more.
  using PageSink = absl::FunctionRef<absl::Status(uint32_t page, std::span<const std::byte> body)>;
  virtual absl::Status ReadPages(std::span<const uint32_t> pages, MonotonicTime deadline,
                                 PageSink sink) = 0;
  // Of `pages` those that lie whole in frames now, in their order.
  virtual std::vector<uint32_t> InFrames(std::span<const uint32_t> pages) = 0;
  // Where each of such pages lies, in order, in a frame that keeps it until `sink` returns. Ends
  // with the sink's error. Verifies nothing: who gets the bytes does. FAILED_PRECONDITION
  // (NOT_IN_FRAME) when one has left its frame meanwhile.
  using FrameSink = absl::FunctionRef<absl::Status(uint32_t page, const CollectiveBuffer& frame)>;
  virtual absl::Status VisitFrames(std::span<const uint32_t> pages, FrameSink sink) = 0;
  // Of a move whose outcome is not known: the end of this object does not let the sequence go on;
  // TransferHost::EndHold of this number does.
  virtual uint64_t KeepHold() = 0;
};

// The target's end: frames for the pages that this host lacks. What it holds goes back at its end.
// For one thread at a time.
class IncomingSequence {
 public:
  virtual ~IncomingSequence() = default;
  // Indices of the pages that are to come, ascending.
  virtual std::span<const uint32_t> wanted() const = 0;
  virtual uint64_t wanted_bytes() const = 0;
  // Of them, those that have not come yet.
  virtual uint64_t num_missing() const = 0;
  virtual uint64_t num_pages() const = 0;
  // Bytes of a wanted page from `offset` on; each page from its first byte to its last. True with
  // the last byte of a page that is what the plan says. A page that is there already is passed
  // over. DATA_LOSS (PAGE_DAMAGED): it is not, and counts as not come. INVALID_ARGUMENT: not
  // wanted, or not the bytes that come next.
  virtual absl::StatusOr<bool> Write(uint32_t page, uint64_t offset,
                                     std::span<const std::byte> bytes) = 0;
  // A wanted page as a whole: `fill` writes it where it is to lie, and it is verified there. Errors
  // of `fill`; else as Write. A page that is there already is INVALID_ARGUMENT.
  using PageFill = absl::FunctionRef<absl::Status(const CollectiveBuffer& frame)>;
  virtual absl::Status Fill(uint32_t page, PageFill fill) = 0;
  // Opens the sequence, or of kPages puts what has a key into the cache. Once, when it succeeds:
  // nothing is held then. FAILED_PRECONDITION (PAGES_MISSING), ALREADY_EXISTS, ABORTED,
  // RESOURCE_EXHAUSTED.
  virtual absl::StatusOr<std::optional<SequenceInfo>> Commit() = 0;
};

class TransferHost {
 public:
  virtual ~TransferHost() = default;
  // Frames lie in memory that GPUs address.
  virtual bool has_device_addresses() const = 0;
  // `address`: of kMove, what calls that want to change the sequence are told. Errors of a change
  // of the sequence, of the other kinds those of a snapshot; INVALID_ARGUMENT (SESSION_TOO_LONG).
  virtual absl::StatusOr<std::unique_ptr<OutgoingSequence>> BeginOutgoing(
      const Tenant& tenant, const SequenceHandle& sequence, TransferKind kind,
      absl::string_view address, MonotonicTime deadline) = 0;
  // The sequence goes on; nothing if the hold is over.
  virtual void EndHold(SequenceId id, uint64_t hold) = 0;
  // Closes a sequence that is held for a move: the target has it. ModelHost::Close refuses to. OK
  // for one that is not open. FAILED_PRECONDITION (STALE_EPOCH).
  virtual absl::Status CloseMoved(const Tenant& tenant, SequenceId id, uint64_t epoch) = 0;
  // Waits in line for the frames. `plan` is proven. FAILED_PRECONDITION (MODEL_MISMATCH),
  // INVALID_ARGUMENT, DATA_LOSS: what it says cannot be; ALREADY_EXISTS; those of frames.
  virtual absl::StatusOr<std::unique_ptr<IncomingSequence>> BeginIncoming(
      const Tenant& tenant, TransferPlan plan, MonotonicTime deadline) = 0;
};

TransferHost& TransfersOf(ModelHost& host);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SEQUENCE_TRANSFER_H_
