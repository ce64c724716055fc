// FillingChecksum: the checksum of a frame that is filled from front to back, taken block by block
// while what was just copied is still in the cache. Layers that arrive in their order fill pages
// that way. Ranges that come in another order cost a second look at the frame when it is full;
// the value is always that of the bytes that are in the frame.
//
// Claim, Release and Finish under the caller's lock; only who holds the claim updates, without it.
#ifndef PAGETIDE_WORKER_FILLING_CHECKSUM_H_
#define PAGETIDE_WORKER_FILLING_CHECKSUM_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/checksum.h"

namespace pagetide {

class FillingChecksum {
 public:
  // Bytes [offset, offset + num_bytes) of the frame are about to be written. True: the writer hands
  // them to Update in order. Release follows in both cases.
  bool Claim(uint64_t offset, uint64_t num_bytes) {
    if (offset < end_) {
      is_void_ = true;  // written a second time
    } else if (offset == end_ && num_writers_ == 0) {
      // Alone: a writer that came earlier could still put other bytes into this range.
      end_ += num_bytes;
      ++num_writers_;
      return true;
    }
    ++num_writers_;
    return false;
  }
  void Update(std::span<const std::byte> bytes) { stream_.Update(bytes); }
  void Release() { --num_writers_; }

  // Of the whole frame, when nobody writes to it. Reads what Update has not seen.
  Checksum128 Finish(std::span<const std::byte> frame) const {
    if (is_void_) return ChecksumOf(frame);
    ChecksumStream stream = stream_;
    stream.Update(frame.subspan(end_));
    return stream.Get();
  }

 private:
  ChecksumStream stream_;
  uint64_t end_ = 0;  // bytes that Update has seen, or the claim's holder will hand to it
  int num_writers_ = 0;
  bool is_void_ = false;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_FILLING_CHECKSUM_H_
