// StreamSlots: how many long calls of one kind run at once, in all and of one tenant, so that no
// tenant can hold them all. Nobody waits: a call beyond the limits is refused and may come again.
// Thread-safe. Outlives its slots.
#ifndef PAGETIDE_WORKER_STREAM_SLOTS_H_
#define PAGETIDE_WORKER_STREAM_SLOTS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"

namespace pagetide {

class StreamSlots {
 public:
  struct Options {
    std::string what = "imports";
    std::string reason = "TOO_MANY_IMPORTS";
    uint32_t in_all = 8;
    uint32_t per_tenant = 4;
  };
  explicit StreamSlots(Options options) : options_(std::move(options)) {}

  // Held for as long as the object lives.
  class Slot {
   public:
    ~Slot() { slots_->GiveBack(tenant_); }
    Slot(const Slot&) = delete;
    Slot& operator=(const Slot&) = delete;

   private:
    friend class StreamSlots;
    Slot(StreamSlots* slots, absl::string_view tenant) : slots_(slots), tenant_(tenant) {}
    StreamSlots* const slots_;
    const std::string tenant_;
  };
  // RESOURCE_EXHAUSTED (the reason of the options) with the numbers and a retry delay.
  absl::StatusOr<std::unique_ptr<Slot>> Take(absl::string_view tenant);
  uint32_t num_taken() const;

 private:
  void GiveBack(const std::string& tenant);

  const Options options_;
  mutable Mutex mu_;
  uint32_t num_taken_ ABSL_GUARDED_BY(mu_) = 0;
  // Of tenants that hold any. Bounded by Options::in_all.
  absl::flat_hash_map<std::string, uint32_t> by_tenant_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_STREAM_SLOTS_H_
