// RunTimeLibrary: a shared library that is looked for when it is needed, so that no program needs
// it to start, and the functions found in it.
//
// Immutable, thread-safe. The library stays in the process: it may have threads of its own.
#ifndef PAGETIDE_WORKER_RUN_TIME_LIBRARY_H_
#define PAGETIDE_WORKER_RUN_TIME_LIBRARY_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"

namespace pagetide {

class RunTimeLibrary {
 public:
  // `path`: as dlopen takes it. FAILED_PRECONDITION with `reason` when it cannot be loaded.
  static absl::StatusOr<RunTimeLibrary> Open(const std::string& path, absl::string_view reason);

  // FAILED_PRECONDITION with the reason of Open when the library has no such function.
  template <typename Function>
  absl::Status Find(const char* name, Function* function) const {
    PT_ASSIGN_OR_RETURN(void* const found, Look(name));
    *function = reinterpret_cast<Function>(found);
    return absl::OkStatus();
  }

 private:
  RunTimeLibrary(std::string path, absl::string_view reason, void* handle)
      : path_(std::move(path)), reason_(reason), handle_(handle) {}
  absl::StatusOr<void*> Look(const char* name) const;

  std::string path_;
  std::string reason_;
  void* handle_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_RUN_TIME_LIBRARY_H_
