#include "kvstore/failpoint.h"

#include <csignal>
#include <cstdlib>

#include <atomic>
#include <memory>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"

namespace pagetide {
namespace {

struct Control {
  Control() {
    const char* given = std::getenv("PAGETIDE_FAILPOINT");
    if (given == nullptr) return;
    const absl::string_view text(given);
    const size_t colon = text.rfind(':');
    uint64_t n = 0;
    if (colon == absl::string_view::npos || !absl::SimpleAtoi(text.substr(colon + 1), &n)) return;
    deadly = std::string(text.substr(0, colon));
    hits_left = static_cast<int64_t>(n);
    is_armed = true;
  }

  std::string deadly;  // const after construction
  std::atomic<int64_t> hits_left{0};
  // Relaxed: whoever arms it starts the threads that are to see it afterwards.
  std::atomic<bool> is_armed{false};
  std::atomic<bool> has_planted{false};

  Mutex mu;
  CondVar idle;
  // shared: a call of the observer outlives its replacement.
  std::shared_ptr<std::function<void(const char*)>> observer ABSL_GUARDED_BY(mu);
  int num_calls ABSL_GUARDED_BY(mu) = 0;
  std::string planted ABSL_GUARDED_BY(mu);
};

Control& GetControl() {
  static Control* const control = new Control;
  return *control;
}

}  // namespace

void HitFailpoint(const char* name) {
  Control& control = GetControl();
  if (!control.is_armed.load(std::memory_order_relaxed)) return;
  if (control.deadly == name && control.hits_left.fetch_sub(1) == 1) {
    std::raise(SIGKILL);
  }
  std::shared_ptr<std::function<void(const char*)>> observer;
  {
    MutexLock lock(&control.mu);
    observer = control.observer;
    if (observer == nullptr) return;
    ++control.num_calls;
  }
  (*observer)(name);
  MutexLock lock(&control.mu);
  if (--control.num_calls == 0) control.idle.SignalAll();
}

void SetFailpointObserver(std::function<void(const char*)> observer) {
  Control& control = GetControl();
  MutexLock lock(&control.mu);
  control.observer = observer == nullptr
                         ? nullptr
                         : std::make_shared<std::function<void(const char*)>>(std::move(observer));
  control.is_armed = control.observer != nullptr || !control.deadly.empty();
  while (control.num_calls > 0) control.idle.Wait(&control.mu);
}

bool IsBugPlanted(const char* name) {
  Control& control = GetControl();
  if (!control.has_planted.load(std::memory_order_relaxed)) return false;
  MutexLock lock(&control.mu);
  return control.planted == name;
}

void PlantBug(std::string name) {
  Control& control = GetControl();
  MutexLock lock(&control.mu);
  control.has_planted = !name.empty();
  control.planted = std::move(name);
}

}  // namespace pagetide
