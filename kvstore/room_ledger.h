// RoomLedger: bytes of one limit (a disk's free bytes, a capacity) that were promised to writers
// who have not used them yet, so that two who do not both fit are not both let in. What is free is
// measured by the caller, without any lock: between Mark and the measurement others may end their
// holds, so those count as well; a hold that ends after its bytes were used may count twice for a
// moment, never not at all. Thread-safe. Outlives its holds.
#ifndef PAGETIDE_KVSTORE_ROOM_LEDGER_H_
#define PAGETIDE_KVSTORE_ROOM_LEDGER_H_

#include <cstdint>
#include <optional>
#include <utility>

#include "base/mutex.h"

namespace pagetide {

class RoomLedger {
 public:
  // A promise. Movable; ends when destroyed.
  class Hold {
   public:
    Hold() = default;
    Hold(Hold&& other) noexcept
        : ledger_(std::exchange(other.ledger_, nullptr)), bytes_(other.bytes_) {}
    Hold& operator=(Hold&& other) noexcept {
      End();
      ledger_ = std::exchange(other.ledger_, nullptr);
      bytes_ = other.bytes_;
      return *this;
    }
    ~Hold() { End(); }
    // The bytes are used, or never will be: a measurement shows which.
    void End() {
      if (ledger_ != nullptr) std::exchange(ledger_, nullptr)->End(bytes_);
    }

   private:
    friend class RoomLedger;
    Hold(RoomLedger* ledger, uint64_t bytes) : ledger_(ledger), bytes_(bytes) {}
    RoomLedger* ledger_ = nullptr;
    uint64_t bytes_ = 0;
  };

  RoomLedger() = default;
  RoomLedger(const RoomLedger&) = delete;
  RoomLedger& operator=(const RoomLedger&) = delete;

  // To be taken before what is free is measured.
  uint64_t Mark() const {
    MutexLock lock(&mu_);
    return ended_bytes_;
  }
  // What was promised and may not be in a measurement that began at `mark`.
  uint64_t Outstanding(uint64_t mark) const {
    MutexLock lock(&mu_);
    return promised_bytes_ - mark;
  }
  // Null unless `bytes` fit into the measured `room` beside all that is outstanding.
  std::optional<Hold> TryHold(uint64_t bytes, uint64_t room, uint64_t mark) {
    MutexLock lock(&mu_);
    const uint64_t outstanding = promised_bytes_ - mark;
    if (room < bytes || room - bytes < outstanding) return std::nullopt;
    promised_bytes_ += bytes;
    return Hold(this, bytes);
  }

 private:
  void End(uint64_t bytes) {
    MutexLock lock(&mu_);
    ended_bytes_ += bytes;
  }

  mutable Mutex mu_;
  uint64_t promised_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // ever
  uint64_t ended_bytes_ ABSL_GUARDED_BY(mu_) = 0;     // ever; of those
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_ROOM_LEDGER_H_
