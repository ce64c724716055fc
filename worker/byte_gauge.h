// ByteGauge: how many bytes are held somewhere now, and the most that ever were. Thread-safe.
#ifndef PAGETIDE_WORKER_BYTE_GAUGE_H_
#define PAGETIDE_WORKER_BYTE_GAUGE_H_

#include <atomic>
#include <cstdint>

namespace pagetide {

class ByteGauge {
 public:
  // Bytes counted until destroyed. The gauge outlives it; not thread-safe itself.
  class Hold {
   public:
    explicit Hold(ByteGauge* gauge) : gauge_(gauge) {}
    ~Hold() { Set(0); }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;
    void Set(uint64_t bytes) {
      gauge_->Add(bytes - held_);  // unsigned: a smaller number subtracts
      held_ = bytes;
    }

   private:
    ByteGauge* const gauge_;
    uint64_t held_ = 0;
  };

  uint64_t now() const { return now_.load(std::memory_order_relaxed); }
  uint64_t peak() const { return peak_.load(std::memory_order_relaxed); }

 private:
  // Relaxed: figures for people, which order nothing.
  void Add(uint64_t bytes) {
    const uint64_t now = now_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
    uint64_t peak = peak_.load(std::memory_order_relaxed);
    while (now > peak && !peak_.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
    }
  }

  std::atomic<uint64_t> now_ = 0;
  std::atomic<uint64_t> peak_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_BYTE_GAUGE_H_
