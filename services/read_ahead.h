// ReadAhead: what a stream that answers with many items, read one by one, does next. A reader (one
// task at a time) reads items ahead of the wire and queues their messages, a writer (one write at a
// time) sends them; this class says to each what to do, so that the stream neither stops while
// something is left, nor ends while one of the two is at work.
//
// Each turn sees and changes the whole state under one lock: whoever ends his work learns in the
// same moment whether there is more. Once a turn has given its caller neither an item to read nor a
// step, others may have ended the stream: the caller touches it no more.
//
// Thread-safe. Knows neither gRPC nor the store.
#ifndef PAGETIDE_SERVICES_READ_AHEAD_H_
#define PAGETIDE_SERVICES_READ_AHEAD_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "base/mutex.h"

namespace pagetide {

template <typename Message>
class ReadAhead {
 public:
  // Reading pauses while messages of `max_queued_bytes` or more wait for the wire.
  ReadAhead(size_t num_items, uint64_t max_queued_bytes)
      : num_items_(num_items), max_queued_bytes_(max_queued_bytes) {}

  // What the caller of a turn does, without any lock. At most one of write and finish is set.
  struct Turn {
    std::optional<size_t> read;          // reader's turns only: this item, then the next turn
    bool start_reader = false;           // other turns only: begin a task with ReaderTurn
    const Message* write = nullptr;      // send it, then WriterTurn; it stays where it is till then
    std::optional<absl::Status> finish;  // end the stream, with this
  };

  // Of the stream's begin.
  Turn Begin() {
    MutexLock lock(&mu_);
    return Next(/*is_reader=*/false);
  }
  // At the begin of a reader's task, and after each item. `read`: how reading the item went; not OK
  // when there is no task to run. Without an item to read the task is over.
  Turn ReaderTurn(const absl::Status& read) {
    MutexLock lock(&mu_);
    if (error_.ok()) error_ = read;
    return Next(/*is_reader=*/true);
  }
  // After a write.
  Turn WriterTurn(const absl::Status& written) {
    MutexLock lock(&mu_);
    is_writing_ = false;
    queued_bytes_ -= queue_.front().num_bytes;
    queue_.pop_front();
    if (error_.ok()) error_ = written;
    return Next(/*is_reader=*/false);
  }
  // The peer left. The stream ends as soon as nobody is at work.
  Turn CancelTurn(const absl::Status& why) {
    MutexLock lock(&mu_);
    if (error_.ok()) error_ = why;
    return Next(/*is_reader=*/false);
  }

  // Queues a message; the reader calls it for the item it reads. Its next turn sends it.
  void Push(Message message, uint64_t num_bytes) {
    MutexLock lock(&mu_);
    queued_bytes_ += num_bytes;
    queue_.push_back({std::move(message), num_bytes});
  }

 private:
  struct Queued {
    Message message;
    uint64_t num_bytes = 0;
  };

  Turn Next(bool is_reader) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Turn turn;
    const bool wants_item =
        error_.ok() && next_item_ < num_items_ && queued_bytes_ < max_queued_bytes_;
    if (is_reader) {
      is_reading_ = wants_item;
      if (wants_item) turn.read = next_item_++;
    } else if (wants_item && !is_reading_) {
      is_reading_ = turn.start_reader = true;
    }
    if (is_writing_ || is_finished_) return turn;
    if (error_.ok() && !queue_.empty()) {
      is_writing_ = true;
      turn.write = &queue_.front().message;
    } else if (!is_reading_ && (!error_.ok() || next_item_ >= num_items_)) {
      is_finished_ = true;
      turn.finish = error_;
    }
    return turn;
  }

  const size_t num_items_;
  const uint64_t max_queued_bytes_;
  Mutex mu_;
  std::deque<Queued> queue_ ABSL_GUARDED_BY(mu_);  // the front one is on its way if is_writing_
  uint64_t queued_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  size_t next_item_ ABSL_GUARDED_BY(mu_) = 0;
  bool is_reading_ ABSL_GUARDED_BY(mu_) = false;
  bool is_writing_ ABSL_GUARDED_BY(mu_) = false;
  bool is_finished_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status error_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_READ_AHEAD_H_
