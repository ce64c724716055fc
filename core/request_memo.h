// RequestMemo: the first answers of mutating calls by request id, so that a call repeated after a
// lost answer gets the same answer and has no second effect (FEATURES A9). Bounded in entries, in
// bytes and in age; the oldest goes first. A request id belongs to one body: with another it is
// refused.
//
// Thread-safe. The clock outlives the memo. Whether two equal calls run at the same time is the
// caller's to exclude: the memo knows finished calls only.
#ifndef PAGETIDE_CORE_REQUEST_MEMO_H_
#define PAGETIDE_CORE_REQUEST_MEMO_H_

#include <cstddef>
#include <list>
#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/byte_size.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/mutex.h"

namespace pagetide {

class RequestMemo {
 public:
  struct Options {
    size_t max_entries = 10'000;
    // Of ids and answers, with kEntryBytes for each. The newest entry stays, whatever its size.
    size_t max_bytes = 64 * kMiB;
    // An answer this old is forgotten.
    absl::Duration ttl = absl::Minutes(10);
  };

  RequestMemo(Options options, Clock* clock);

  // Nullopt: not seen, or forgotten. INVALID_ARGUMENT (REQUEST_ID_REUSED) when the id was used with
  // another body. An empty id is never seen.
  absl::StatusOr<std::optional<std::string>> Find(absl::string_view request_id,
                                                  const Digest& body) const;
  // The first answer stays: a remembered id is left as it is. An empty id is not remembered.
  void Remember(absl::string_view request_id, const Digest& body, std::string answer);

  // Entries held, among them those that aged out since the last Remember.
  size_t size() const;
  // What counts against max_bytes.
  size_t num_bytes() const;

  // An entry's share of list, map and allocator, about.
  static constexpr size_t kEntryBytes = 256;

 private:
  struct Entry {
    std::string request_id;
    Digest body;
    std::string answer;
    MonotonicTime forget_at;
  };

  static size_t BytesOf(const Entry& entry) {
    return kEntryBytes + entry.request_id.size() + entry.answer.size();
  }
  void ForgetOldest() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  Clock* const clock_;
  mutable Mutex mu_;
  std::list<Entry> by_age_ ABSL_GUARDED_BY(mu_);  // oldest first
  size_t num_bytes_ ABSL_GUARDED_BY(mu_) = 0;     // of by_age_
  // Keys view into by_age_, whose nodes do not move.
  absl::flat_hash_map<absl::string_view, std::list<Entry>::iterator> by_id_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_REQUEST_MEMO_H_
